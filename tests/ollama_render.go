// Renders conversations as Ollama does: its types, its json function, its merging of messages.
// Reads the template's path as the only argument and one request per line from stdin; writes one
// JSON string per line.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type propertyType []string

func (t *propertyType) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*t = propertyType{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(t))
}

func (t propertyType) MarshalJSON() ([]byte, error) {
	if len(t) == 1 {
		return json.Marshal(t[0])
	}
	return json.Marshal([]string(t))
}

type property struct {
	AnyOf       []property          `json:"anyOf,omitempty"`
	Type        propertyType        `json:"type,omitempty"`
	Items       any                 `json:"items,omitempty"`
	Description string              `json:"description,omitempty"`
	Enum        []any               `json:"enum,omitempty"`
	Properties  map[string]property `json:"properties,omitempty"`
	Required    []string            `json:"required,omitempty"`
}

type tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		Parameters  struct {
			Type       string              `json:"type"`
			Required   []string            `json:"required,omitempty"`
			Properties map[string]property `json:"properties"`
		} `json:"parameters"`
	} `json:"function"`
}

type toolCall struct {
	Function struct {
		Name      string         `json:"name"`
		Arguments map[string]any `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role      string     `json:"role"`
	Content   string     `json:"content"`
	Thinking  string     `json:"thinking"`
	ToolCalls []toolCall `json:"tool_calls"`
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	source, err := os.ReadFile(os.Args[1])
	check(err)
	functions := template.FuncMap{"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	}}
	chat, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(string(source))
	check(err)
	output := json.NewEncoder(os.Stdout)
	input := bufio.NewScanner(os.Stdin)
	input.Buffer(nil, 1<<24)
	for input.Scan() {
		var request struct {
			Messages []message
			Tools    []tool
		}
		check(json.Unmarshal(input.Bytes(), &request))
		var system []string
		var merged []*message
		for i := range request.Messages {
			next := &request.Messages[i]
			if next.Role == "system" {
				system = append(system, next.Content)
			}
			if n := len(merged); n > 0 && merged[n-1].Role == next.Role && next.Role != "tool" {
				merged[n-1].Content += "\n\n" + next.Content
			} else {
				merged = append(merged, next)
			}
		}
		var text strings.Builder
		check(chat.Execute(&text, map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": merged, "Tools": request.Tools,
			"Response": "", "Think": false, "ThinkLevel": "", "IsThinkSet": false,
		}))
		check(output.Encode(text.String()))
	}
}
