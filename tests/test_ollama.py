"""The Modelfile, whose template Go's own text/template renders here."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from common import UserError
from export.ollama import TEMPLATE, write_modelfile


def modelfile(folder: Path, tokenizer) -> str:
    write_modelfile(folder, "model-q8_0.gguf", tokenizer, 4096)
    return (folder / "Modelfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def render(tmp_path_factory, root):
    """Render requests as Ollama does."""
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    folder = tmp_path_factory.mktemp("ollama")
    (folder / "chat.tmpl").write_text(TEMPLATE, encoding="utf-8", newline="")
    program = folder / "render"
    source = root / "tests" / "ollama_render.go"
    subprocess.run(["go", "build", "-o", program, source], check=True, timeout=300)

    def render(requests: list[dict]) -> list[str]:
        done = subprocess.run(
            [program, folder / "chat.tmpl"],
            input="\n".join(map(json.dumps, requests)),
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    return render


def tool(name: str = "weather", **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties}
    if properties:
        parameters["required"] = list(properties)
    function = {"name": name, "description": f"What {name} <does> & 说明", "parameters": parameters}
    return {"type": "function", "function": function}


def call(**arguments) -> dict:
    return {"function": {"name": "weather", "arguments": arguments}}


TOOLS = [
    tool(),
    tool(city={"type": "string", "description": 'A "city", 城市'}),
    tool("two", a={"type": "integer"}, b={"type": "string", "enum": ["x", "y"]}),
]
VALUES = [
    "杭州",
    'a\n"b"\t<c> & \\',
    "",
    2,
    2.5,
    -1,
    True,
    None,
    [1, "x", [], {}],
    {"k": {"l": []}},
]
TEXTS = [
    "Hello",
    "你好。\n再见",
    "",
    " two  spaces ",
    "<b>&amp;</b> {{ .Role }}",
    "a\n\nb",
    '"q" \\n 😀',
]


def conversation(source: random.Random) -> list[dict]:
    """Messages as Ollama hands them on: roles alternate, except results of tools."""
    messages = []
    if source.random() < 0.5:
        messages.append({"role": "system", "content": source.choice(TEXTS)})
    for _ in range(source.randint(1, 4)):
        messages.append({"role": "user", "content": source.choice(TEXTS)})
        answer = {"role": "assistant", "content": source.choice(TEXTS)}
        if source.random() < 0.4:
            answer["reasoning_content"] = source.choice(TEXTS) or "hm"  # Ollama has no empty ones
        calls = source.choice([0, 0, 1, 2])
        names = ["a", "b c", "城"]
        answer["tool_calls"] = [
            call(**{n: source.choice(VALUES) for n in names[: source.randint(0, 3)]})
            for _ in range(calls)
        ]
        messages.append(answer)
        for _ in range(calls):
            messages.append({"role": "tool", "content": source.choice(TEXTS)})
    if source.random() < 0.5:
        messages.append({"role": "user", "content": source.choice(TEXTS)})
    return messages


def as_ollama(message: dict) -> dict:
    """A message under the names of Ollama's API."""
    message = dict(message)
    if "reasoning_content" in message:
        message["thinking"] = message.pop("reasoning_content")
    return message


def test_the_template_renders_our_format(render, tokenizer):
    source = random.Random(3)
    requests, expected = [], []
    for _ in range(1000):
        messages = conversation(source)
        tools = source.sample(TOOLS, source.randint(0, 3))
        requests.append({"messages": [as_ollama(m) for m in messages], "tools": tools})
        last = messages[-1]
        stays_open = last["role"] == "assistant" and not last["tool_calls"]
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=not stays_open
        )
        expected.append(text.removesuffix("</s>\n") if stays_open else text)
    for request, ours, theirs in zip(requests, expected, render(requests), strict=True):
        assert theirs == ours, request


def test_what_ollama_changes(render):
    """The differences that a template cannot undo."""
    user = {"role": "user", "content": "a"}
    (merged,) = render([{"messages": [user, user]}])
    assert merged == "<s>user\na\n\na</s>\n<s>assistant\n"
    answer = {"role": "assistant", "content": "", "tool_calls": [call(b=2.0, a="\u00ad")]}
    (sorted_,) = render([{"messages": [user, answer, {"role": "tool", "content": "x"}]}])
    assert '"arguments": {"a": "\\u00ad", "b": 2}}' in sorted_
    nested = tool(z={"type": "array", "items": {"type": "string"}}, a={"type": "string"})
    (compact,) = render([{"messages": [user], "tools": [nested]}])
    properties = '{"a": {"type": "string"}, "z": {"type":"array","items":{"type":"string"}}}'
    assert f'"properties": {properties}, "required": ["z", "a"]' in compact


def test_modelfile(tmp_path, tokenizer):
    text = modelfile(tmp_path, tokenizer)
    match = re.fullmatch(r'FROM ([^\n]+)\nTEMPLATE """(.*?)"""\n(.*)', text, re.DOTALL)
    assert match[1] == "./model-q8_0.gguf"
    assert match[2] == TEMPLATE
    assert match[3].splitlines() == [
        "PARAMETER num_ctx 4096",
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<s>"',
    ]


def test_tags_stand_where_ollama_looks_for_them():
    assert re.search(r"<think>\n{{ \.Thinking }}\n</think>\n{{ end }}", TEMPLATE)
    calls = r"{{- if \.ToolCalls }}{{ range [^}]*\.ToolCalls }}<tool_call>\n"
    assert (
        re.search(r"if [^}]*\.ToolCalls", TEMPLATE).start()
        == re.search(calls, TEMPLATE).start() + 4
    )


def test_another_chat_template_is_refused(tmp_path, tokenizer):
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, name_or_path="/a/folder", chat_template="x"
    )
    with pytest.raises(UserError, match="/a/folder: --to ollama"):
        write_modelfile(tmp_path, "m.gguf", other, 64)
    assert not list(tmp_path.iterdir())
