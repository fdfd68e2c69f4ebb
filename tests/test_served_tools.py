"""Thoughts, calls and answers of a given form on the server, by clients that others wrote.

What the untrained model cannot do by itself, a grammar makes it do, or its tokens are given.
"""

import json

import httpx
import jsonschema
import openai
import pydantic
import pytest
from test_server import HI, serving
from tiny_models import random_model, save_tuned

from inference.batcher import Batcher
from model import SamplingLoop

MODEL = "full_sft_32"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Forecast", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "clock", "parameters": CLOCK, "strict": True}},
]
CALL = {"name": "weather", "arguments": {"city": "南京", "days": 2}}
CALL_TEXT = json.dumps(CALL, ensure_ascii=False)


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer_dir, tokenizer):
    out = tmp_path_factory.mktemp("out")
    save_tuned(random_model(max_seq_len=2048), out, tokenizer, MODEL)
    with serving(out, tokenizer_dir) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served}/v1", api_key="any", max_retries=0)


@pytest.fixture
def prompts(monkeypatch):
    """The ids of the prompts that the model gets."""
    found, submit = [], Batcher.submit

    def noted(batcher, requests):
        found.extend(request.ids for request in requests)
        return submit(batcher, requests)

    monkeypatch.setattr(Batcher, "submit", noted)
    return found


@pytest.fixture
def script(monkeypatch, tokenizer):
    """A function that makes the model give a text, in which control tokens are such."""

    def give(text):
        ids = tokenizer.encode(text, add_special_tokens=False)

        def sample(loop, rows, logits):
            for row in rows:
                row.append(ids[len(row.new_tokens)], loop.decoder.max_seq_len)

        monkeypatch.setattr(SamplingLoop, "sample", sample)

    return give


def ask(client, messages=HI, **more):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 200, **more}
    return client.chat.completions.create(messages=messages, **options)


def thinking(value):
    return {"extra_body": {"chat_template_kwargs": {"enable_thinking": value}}}


# Calls


THOUGHT = "<think>\nHm.\nSo.\n</think>\n"
CALLS = "\n".join(f"<tool_call>\n{t}\n</tool_call>" for t in (CALL_TEXT, CALL_TEXT))
LOOK = f"{THOUGHT}I look.\n{CALLS}</s>"


def test_calls_and_thoughts_come_apart_and_go_back_in(client, script, prompts, tokenizer):
    script(LOOK)
    done = ask(client, tools=TOOLS).choices[0]
    assert done.finish_reason == "tool_calls" and done.message.content == "I look."
    assert done.message.reasoning_content == "Hm.\nSo."
    calls = done.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [CALL["arguments"]] * 2
    assert len({call.id for call in calls}) == 2
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"{i} °C"}
        for i, call in enumerate(calls)
    ]
    script("Cold.</s>")
    end = ask(client, [*HI, done.message.model_dump(), *results], tools=TOOLS).choices[0]
    assert (end.message.content, end.finish_reason) == ("Cold.", "stop")
    assert end.message.tool_calls is None
    shown = [{**t, "function": dict(t["function"])} for t in TOOLS]
    shown[1]["function"].pop("strict")
    said = {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}
    said["reasoning_content"] = "Hm.\nSo."
    for found, messages in zip(prompts, (HI, [*HI, said, *results]), strict=True):
        ids = tokenizer.apply_chat_template(
            messages, tools=shown, add_generation_prompt=True, return_dict=False
        )
        assert found == ids


def test_streamed_calls_are_put_together(client, script):
    script(LOOK)
    with client.chat.completions.stream(
        model=MODEL, messages=HI, tools=TOOLS, max_tokens=200
    ) as stream:
        deltas = [e.chunk.choices[0].delta for e in stream if e.type == "chunk"]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [CALL["arguments"]] * 2
    assert [call.function.name for call in calls] == ["weather"] * 2
    assert len({call.id for call in calls}) == 2
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == "Hm.\nSo."
    assert deltas[0].role == "assistant"


def test_one_call_at_most(client, script):
    script(LOOK)
    for stream in (False, True):
        done = ask(client, tools=TOOLS, parallel_tool_calls=False, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in done]
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
            reason = chunks[-1].finish_reason
        else:
            calls, reason = done.choices[0].message.tool_calls, done.choices[0].finish_reason
        assert (len(calls), reason) == (1, "tool_calls")


def test_a_call_that_is_cut_is_content(client, script):
    script(LOOK)
    done = ask(client, tools=TOOLS, max_tokens=30).choices[0]
    assert done.finish_reason == "length" and not done.message.tool_calls
    assert done.message.content.startswith('I look.{"name"')


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_forced(client, choice, stream):
    """On an untrained model: as many as it likes, or one."""
    names = {"weather", "clock"} if choice == "required" else {"clock"}
    seen, schemas = set(), {"weather": WEATHER, "clock": CLOCK}
    for seed in range(4):
        one = bool(seed % 2)
        options = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": seed}
        options |= {"parallel_tool_calls": not one, **thinking(False), "max_tokens": 400}
        done = ask(client, **options, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in done]
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
            reason, content = chunks[-1].finish_reason, None
            assert [call.index for call in calls] == [*range(len(calls))]
        else:
            message, reason = done.choices[0].message, done.choices[0].finish_reason
            calls, content = message.tool_calls, message.content
        assert reason == "tool_calls" and content is None
        assert len(calls) == 1 if one else calls
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
            seen.add(call.function.name)
    assert seen == names


def test_no_tool_is_shown_where_none_may_be_called(client, prompts):
    ask(client, tools=TOOLS, tool_choice="none", max_tokens=1)
    ask(client, max_tokens=1)
    assert prompts[0] == prompts[1]


# Answers of a given form


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=6)
    age: int = pydantic.Field(ge=0, le=120)
    kind: str | None = pydantic.Field(max_length=3)


def test_an_answer_is_parsed_into_a_pydantic_model(client):
    for seed in range(4):
        done = client.chat.completions.parse(
            model=MODEL, messages=HI, response_format=Person, seed=seed, **thinking(False)
        ).choices[0]
        assert isinstance(done.message.parsed, Person) and done.finish_reason == "stop"
        assert done.message.content == done.message.parsed.model_dump_json()
    again = ask(client, [*HI, done.message.model_dump(), *HI], max_tokens=1)
    assert again.choices[0].finish_reason == "length"


def test_a_schema_holds_after_the_thought(client, prompts, tokenizer):
    """A bias ends the thought, and would prevent the JSON."""
    end = tokenizer.convert_tokens_to_ids("</think>")
    closed = {**Person.model_json_schema(), "additionalProperties": False}
    schema = {"name": "p", "schema": closed, "strict": True}
    done = ask(
        client,
        response_format={"type": "json_schema", "json_schema": schema},
        logit_bias={str(end): 100},
        **thinking(True),
    ).choices[0]
    assert Person.model_validate_json(done.message.content) and done.finish_reason == "stop"
    text = "<s>assistant\n<think>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert prompts[0][-len(ids) :] == ids


def test_an_object(client):
    done = ask(
        client,
        response_format={"type": "json_object"},
        temperature=1,
        n=8,
        seed=3,
        **thinking(False),
    )
    reasons = set()
    for choice in done.choices:
        reasons.add(choice.finish_reason)
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    assert "stop" in reasons


def test_what_a_schema_asks_in_vain_is_named(client):
    schema = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        ask(client, response_format=form)
    assert refused.value.param == "response_format"
    form["json_schema"]["strict"] = False  # as well as it can
    text = ask(client, response_format=form, max_tokens=20, **thinking(False)).choices[0].message
    assert text.content.startswith("[")
    function = {"name": "f", "strict": True, "parameters": schema}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        tools = [{"type": "function", "function": function}]
        ask(client, tools=tools, tool_choice="required")
    assert refused.value.param == "tools"


def test_a_bias_changes_the_answer(client, tokenizer):
    yes = tokenizer.encode("yes", add_special_tokens=False)[0]
    done = ask(client, logit_bias={str(yes): 100}, max_tokens=3).choices[0].message.content
    assert done == 3 * tokenizer.decode([yes])


# Clients that others wrote


def test_langchain_binds_tools_and_schemas(served, script):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{served}/v1", api_key="any", model=MODEL, max_tokens=300)
    chat.extra_body = {"chat_template_kwargs": {"enable_thinking": False}}
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Person, method=method, strict=True).invoke("Who?")
        assert isinstance(found, Person), method
    bound = chat.bind_tools(TOOLS)
    script(LOOK)
    said = bound.invoke("Hi")
    assert [call["args"] for call in said.tool_calls] == [CALL["arguments"]] * 2
    pieces = list(bound.stream("Hi"))
    whole = sum(pieces[1:], pieces[0])
    assert [call["args"] for call in whole.tool_calls] == [CALL["arguments"]] * 2
    script("Cold.</s>")
    results = [ToolMessage("3", tool_call_id=call["id"]) for call in said.tool_calls]
    assert bound.invoke([HumanMessage("Hi"), said, *results]).content == "Cold."


def test_litellm(served, script):
    litellm = pytest.importorskip("litellm")
    script(LOOK)
    options = {"model": f"openai/{MODEL}", "messages": HI, "tools": TOOLS, "max_tokens": 200}
    options |= {"api_base": f"{served}/v1", "api_key": "any"}
    done = litellm.completion(**options).choices[0]
    assert done.finish_reason == "tool_calls" and done.message.reasoning_content == "Hm.\nSo."
    wanted = [json.loads(call.function.arguments) for call in done.message.tool_calls]
    assert wanted == [CALL["arguments"]] * 2
    chunks = list(litellm.completion(**options, stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=HI).choices[0].message
    found = [json.loads(call.function.arguments) for call in whole.tool_calls]
    assert found == wanted


def test_open_webui(served, script):
    """Native function calling, as its middleware sends it: a stream, then the results."""
    script(LOOK)
    tools = [{"type": "function", "function": {**tool["function"]}} for tool in TOOLS]
    body = {"model": MODEL, "stream": True, "messages": HI, "tools": tools, "max_tokens": 200}
    body |= {"stream_options": {"include_usage": True}, "metadata": {"chat_id": "1"}}
    done = httpx.post(f"{served}/v1/chat/completions", json=body)
    events = [json.loads(x[6:]) for x in done.text.splitlines() if x.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    content = "".join(delta.get("content") or "" for delta in deltas)
    said = {"role": "assistant", "content": content, "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "3"} for c in calls]
    script("Cold.</s>")
    body |= {"messages": [*HI, said, *results], "stream": False, "stream_options": None}
    done = httpx.post(f"{served}/v1/chat/completions", json=body)
    assert done.json()["choices"][0]["message"]["content"] == "Cold."


def test_librechat(served, script):
    """An agent's turn: its messages have parts, its tools come from MCP."""
    script(LOOK)
    parameters = {**WEATHER, "$schema": "http://json-schema.org/draft-07/schema#"}
    function = {"name": "weather_mcp_local", "description": "", "parameters": parameters}
    body = {
        "model": MODEL,
        "user": "65f0",
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "max_tokens": 200,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "a", "type": "function",
                 "function": {"name": "weather_mcp_local", "arguments": "{}"}}
            ]},
            {"role": "tool", "tool_call_id": "a", "name": "weather_mcp_local",
             "content": [{"type": "text", "text": "3"}]},
        ],
    }  # fmt: skip
    done = httpx.post(f"{served}/v1/chat/completions", json=body)
    assert done.status_code == 200 and '"tool_calls"' in done.text
