"""A Modelfile, by which Ollama runs a GGUF file with our chat format.

Ollama renders prompts by a template of Go's text/template, from its own types. What reaches the
template is not all that a conversation holds, so these differ from the tokenizer's chat template:

* Successive messages of one role, except tool results, arrive as one, joined by an empty line.
* Tools arrive with the fields that Ollama knows. Their properties, and the arguments of calls, are
  sorted by name; a property with more than type, description and enum is JSON without spaces.
* Numbers are Go's: 2.0 becomes 2. Characters that do not print are escaped Go's way.
* An answer at the end of the messages stays open, for the model to continue.
"""

from pathlib import Path

from common import ROOT, UserError
from model import Tokenizer, load_tokenizer

# Ollama reads from this template which tags surround thoughts and tool calls: those texts stand
# first and last beside .Thinking, and first under the first `if .ToolCalls`.
TEMPLATE = r"""
{{- define "value" }}
{{- $type := printf "%T" . }}
{{- if eq $type "string" }}{{ printf "%q" . }}
{{- else if eq $type "map[string]interface {}" }}{{ template "object" . }}
{{- else if eq $type "[]interface {}" }}[
  {{- range $i, $value := . }}{{ if $i }}, {{ end }}{{ template "value" $value }}{{ end }}]
{{- else }}{{ json . }}
{{- end }}
{{- end }}

{{- define "object" }}{
  {{- $comma := "" }}
  {{- range $name, $value := . }}{{ $comma }}{{ printf "%q" $name }}: {{ template "value" $value }}
    {{- $comma = ", " }}
  {{- end }}}
{{- end }}

{{- define "property" }}
{{- $compact := printf "{\"type\":%s" (json .Type) }}
{{- $spaced := printf "{\"type\": %s" (json .Type) }}
{{- if .Description }}
  {{- $compact = printf "%s,\"description\":%s" $compact (json .Description) }}
  {{- $spaced = printf "%s, \"description\": %q" $spaced .Description }}
{{- end }}
{{- if .Enum }}
  {{- $compact = printf "%s,\"enum\":%s" $compact (json .Enum) }}
  {{- $comma := "" }}
  {{- $spaced = printf "%s, \"enum\": [" $spaced }}
  {{- range .Enum }}{{ $spaced = printf "%s%s%s" $spaced $comma (json .) }}{{ $comma = ", " }}
  {{- end }}
  {{- $spaced = printf "%s]" $spaced }}
{{- end }}
{{- if eq (printf "%s}" $compact) (json .) }}{{ $spaced }}}{{ else }}{{ json . }}{{ end }}
{{- end }}

{{- define "tools" }}You can call these tools, described by one JSON schema per line:
{{ range . }}{"type": {{ printf "%q" .Type }}, "function": {"name": {{ printf "%q" .Function.Name }}
  {{- if .Function.Description }}, "description": {{ printf "%q" .Function.Description }}{{ end }}
  {{- with .Function.Parameters }}, "parameters": {"type": {{ printf "%q" .Type }}, "properties": {
    {{- $comma := "" }}
    {{- range $name, $property := .Properties }}{{ $comma }}{{ printf "%q" $name }}:
      {{- " " }}{{ template "property" $property }}{{ $comma = ", " }}
    {{- end }}}
    {{- with .Required }}, "required": [
      {{- range $i, $name := . }}{{ if $i }}, {{ end }}{{ printf "%q" $name }}{{ end }}]
    {{- end }}}
  {{- end }}}}
{{ end }}To call one, put a JSON object with its "name" and "arguments" in a tool_call block;
{{- " an answer may contain several." }}
{{- end }}

{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- $system := eq .Role "system" }}
{{- if and $.Tools (eq $i 0) }}<s>system
{{ if and $system .Content }}{{ .Content }}

{{ end }}{{ template "tools" $.Tools }}</s>
{{ end }}
{{- if not (and $.Tools (eq $i 0) $system) }}<s>{{ .Role }}
{{ if eq .Role "tool" }}<tool_response>
{{ .Content }}
</tool_response>
{{- else }}
{{- if and (eq .Role "assistant") .Thinking }}<think>
{{ .Thinking }}
</think>
{{ end }}
{{- .Content }}
{{- with .ToolCalls }}{{ if $message.Content }}
{{ end }}{{ end }}
{{- if .ToolCalls }}{{ range $j, $call := .ToolCalls }}<tool_call>
{"name": {{ printf "%q" .Function.Name }}, "arguments": {{ template "object" .Function.Arguments }}}
</tool_call>{{ if gt (len (slice $message.ToolCalls $j)) 1 }}
{{ end }}{{ end }}{{ end }}
{{- end }}
{{- if not (and $last (eq .Role "assistant") (not .ToolCalls)) }}</s>
{{ if $last }}<s>assistant
{{ end }}{{ end }}
{{- end }}
{{- end }}
{{- if not (len .Messages) }}<s>assistant
{{ end }}
""".strip()


def write_modelfile(
    folder: Path, gguf_name: str, tokenizer: Tokenizer, context_length: int
) -> None:
    """Write Modelfile beside a GGUF file; `ollama create NAME -f Modelfile` takes both.

    Args:
        folder: folder of the GGUF file.
        gguf_name: file name of it.
        tokenizer: tokenizer of the model.
        context_length: positions of the model.

    Raises:
        UserError: if the tokenizer has another chat template than ours.
    """
    ours = load_tokenizer(ROOT / "model" / "minimind_tokenizer").chat_template
    if tokenizer.chat_template != ours:
        raise UserError(
            f"{tokenizer.name_or_path}: --to ollama knows the chat template of "
            "scripts/train_tokenizer.py only"
        )
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{TEMPLATE}"""',
        f"PARAMETER num_ctx {context_length}",
        *(f'PARAMETER stop "{token}"' for token in (tokenizer.eos_token, tokenizer.bos_token)),
    ]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
