import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from dataset.fields import RecordError
from dataset.reader import Place, read_records
from dataset.records import (
    BadLines,
    LeftOut,
    RecordOptions,
    pair_judged,
    parse_chat,
    parse_preference,
    parse_question,
    parse_text,
    record_kind,
)

# Bad lines, and a part of the reason to be named. test_token_store.py puts them into files.
BAD_LINES = {
    "not JSON": (b"hello", "broken JSON: Expecting value at column 1"),
    "column": (b'{"text": "a" "b"}', "broken JSON: Expecting ',' delimiter at column 14"),
    "column counts characters": ('{"text": "中文" 1}'.encode(), "at column 15"),
    "control character": (b'{"text": "a\tb"}', "Invalid control character at column 12"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "Extra data at column 14"),
    "array": (b'["text"]', "an array, not an object"),
    "string": (b'"text"', "a string, not an object"),
    "null": (b"null", "null, not an object"),
    "missing": (b'{"body": "a"}', 'no text: its fields are "body"; nearest: text ("text")'),
    "text is null": (b'{"text": null}', '"text" is null, not a string'),
    "text is a number": (b'{"text": 1}', '"text" is a number, not a string'),
    "text is a boolean": (b'{"text": true}', '"text" is a boolean, not a string'),
    "text is an array": (b'{"text": ["a"]}', '"text" is an array, not a string'),
    "text is an object": (b'{"text": {}}', '"text" is an object, not a string'),
    "empty text": (b'{"text": ""}', '"text" is empty'),
    "blank text": ('{"text": " \\n\\t　"}'.encode(), '"text" is blank'),
    "not UTF-8": ('{"text": "中文"}'.encode("gbk"), "invalid UTF-8 at byte 11"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8 at byte 11"),
    "lone surrogate": (b'{"text": "ab\\ud83d!"}', r"'\ud83d' in position 12: surrogates"),
    "low surrogate": (b'{"text": "\\ude00"}', r"'\ude00' in position 10: surrogates"),
    "cut in a string": (b'{"text": "to be cont', "column 20; truncated?"),
    "cut before the brace": (b'{"text": "a"', "column 12; truncated?"),
    "cut in an escape": (b'{"text": "a\\u4e', "column 15; truncated?"),
    "cut in a character": (
        '{"text": "中'.encode()[:-1],
        "in the middle of a character; truncated?",
    ),
    "deep": (b"[" * 100_000, "recursion"),
    "long number": (b'{"text": "a", "n": ' + b"1" * 5_000 + b"}", "digits"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_bad_line_is_refused_with_its_reason(line, reason, end):
    with pytest.raises(RecordError) as error:
        parse_text(line + end)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(texts, st.booleans(), st.sampled_from(["", "\n", "\r\n"]))
def test_a_good_line_gives_its_text(text, ascii_only, end):
    line = json.dumps({"id": 7, "text": text}, ensure_ascii=ascii_only) + end
    assert parse_text(line.encode("utf-8")) == text


@given(texts, st.booleans(), st.data())
def test_every_cut_of_a_line_is_called_truncated(text, ascii_only, data):
    line = json.dumps({"text": text}, ensure_ascii=ascii_only).encode("utf-8")
    cut = data.draw(st.integers(1, len(line) - 1))
    with pytest.raises(RecordError, match="truncated"):
        parse_text(line[:cut])


def test_a_byte_order_mark_is_accepted():
    assert parse_text(b'\xef\xbb\xbf{"text": "a"}\n') == "a"


def bad_lines(count, total):
    bad = BadLines(total=total)
    for number in range(count):
        bad.add(Place("", number + 3), f"reason {number + 3}")
    return bad


CHECK = "; scripts/check_data.py shows what it holds"


def refusal(bad, allowed):
    with pytest.raises(UserError) as error:
        bad.check(Path("data.jsonl"), allowed)
    return str(error.value).splitlines()


def test_the_report_names_ten_lines_and_the_total():
    report = refusal(bad_lines(1234, 100_000), 0)
    assert report[:10] == [f"data.jsonl:{n}: reason {n}" for n in range(3, 13)]
    assert report[10:] == [
        "data.jsonl: 1,234 of 100,000 lines are bad; --skip_bad_lines 0.02 goes on without them; "
        "scripts/check_data.py shows what it holds"
    ]


@pytest.mark.parametrize(
    ("count", "total", "advice"),
    [
        (10, 100, "; --skip_bad_lines 0.1 goes on without them"),
        (11, 100, "; --skip_bad_lines 0.11 goes on without them"),
        (29, 100, "; --skip_bad_lines 0.29 goes on without them"),
        (1, 3, "; --skip_bad_lines 0.34 goes on without them"),
        (5, 10, "; --skip_bad_lines 0.5 goes on without them"),
        (501, 1000, ", most of the file"),
        (3, 3, ", most of the file"),
    ],
)
def test_what_loses_most_of_a_file_is_not_advised(count, total, advice):
    """And what is advised is enough."""
    bad = bad_lines(count, total)
    assert refusal(bad, 0)[-1] == f"data.jsonl: {count} of {total:,} lines are bad{advice}{CHECK}"
    words = advice.split()
    if "--skip_bad_lines" in words:
        bad.check(Path("data.jsonl"), float(words[2].rstrip(";")))
    if count / total > 0.1:  # without a number it is not enough
        assert advice in refusal(bad, 0.1)[-1]
    bad.check(Path("data.jsonl"), 1)
    bad_lines(0, total).check(Path("data.jsonl"), 0)
    bad_lines(0, 0).check(Path("data.jsonl"), 0)


def test_a_place_in_a_record_of_several_lines():
    record = json.dumps({"text": "a", "b": 1}, indent=1).replace("1", "x")
    with pytest.raises(RecordError, match="Expecting value at line 3 of the record, column 7"):
        parse_text(record.encode())


# ---- conversations

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}


def sharegpt(*messages, **record):
    return {"conversations": [{"from": f, "value": v} for f, v in messages], **record}


def openai_call(**function):
    call = {"id": "call_1", "type": "function", "function": function}
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


def flagged(**fields):
    """A record with an answer that has these fields, before one without."""
    return {"messages": [USER, {**ANSWER, **fields}, USER, ANSWER]}


UNLEARNT = [USER, {**ANSWER, "weight": 0.0}, USER, ANSWER]
LEARNT = [USER, ANSWER, USER, ANSWER]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

# Records, their messages, and their tools if there are any.
CHATS = {
    **{
        f"{name} is {json.dumps(value)}": (flagged(**{name: value}), UNLEARNT)
        for name in ("train", "training", "loss", "loss_mask")
        for value in (False, 0)
    },
    **{
        f"{name} is {json.dumps(value)}": (flagged(**{name: value}), LEARNT)
        for name in ("train", "training", "loss", "loss_mask")
        for value in (True, 1, None)
    },
    "a flag beats a weight": (flagged(weight=2, train=False), UNLEARNT),
    "a flag leaves a weight": (
        flagged(weight=2, train=True),
        [USER, {**ANSWER, "weight": 2.0}, USER, ANSWER],
    ),
    "one flag of two": (flagged(loss=True, loss_mask=0), UNLEARNT),
    "a user's flag": ({"messages": [{**USER, "train": False}, ANSWER]}, [USER, ANSWER]),
    "ShareGPT, a flag": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a", "training": False},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        UNLEARNT,
    ),
    "mask_history": ({**flagged(), "mask_history": True}, UNLEARNT),
    "mask_history is false": ({**flagged(), "mask_history": False}, LEARNT),
    "mask_history, tools": (
        {"messages": [USER, CALLS, RESULT, ANSWER, USER, CALLS, RESULT, ANSWER], "mask_history": 1},
        [
            *[USER, {**CALLS, "weight": 0.0}, RESULT, {**ANSWER, "weight": 0.0}],
            *[USER, CALLS, RESULT, ANSWER],
        ],
    ),
    "mask_history, nobody answers": (
        {"messages": [SYSTEM, *LEARNT, USER], "mask_history": True},
        [SYSTEM, *UNLEARNT, USER],
    ),
    "mask_history, Alpaca": (
        {"instruction": "q", "output": "a", "history": [["q", "a"]], "mask_history": True},
        UNLEARNT,
    ),
    "calls as JSON": (
        {"messages": [USER, {**ANSWER, "content": "", "tool_calls": json.dumps([CALL])}]},
        [USER, CALLS],
    ),
    **{
        f"calls are {json.dumps(value)}": (
            {"messages": [USER, {**ANSWER, "tool_calls": value}]},
            [USER, ANSWER],
        )
        for value in (None, [], "", " ", "[]", "null")
    },
    "function_call beside text": (
        {
            "messages": [
                *[USER, {**ANSWER, "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
                *[{"role": "function", "name": "f", "content": "r"}, ANSWER],
            ]
        },
        [
            *[USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}],
            *[RESULT, ANSWER],
        ],
    ),
    "function_call beside null": (
        {"messages": [USER, {**ANSWER, "content": None, "function_call": json.dumps(CALL)}]},
        [USER, CALLS],
    ),
    "function_call is null": (
        {"messages": [USER, {**ANSWER, "function_call": None}]},
        [USER, ANSWER],
    ),
    "tools of the system message": (
        {"messages": [{**SYSTEM, "tools": [TOOL]}, USER, ANSWER]},
        [SYSTEM, USER, ANSWER],
        [TOOL],
    ),
    "tools of the system message as JSON": (
        {"messages": [{**SYSTEM, "tools": json.dumps([TOOL])}, USER, ANSWER]},
        [SYSTEM, USER, ANSWER],
        [TOOL],
    ),
    "tools twice": (
        {"messages": [{**SYSTEM, "tools": [TOOL]}, USER, ANSWER], "tools": json.dumps([TOOL])},
        [SYSTEM, USER, ANSWER],
        [TOOL],
    ),
    "null and empty tools of messages": (
        {"messages": [{**SYSTEM, "tools": "[]"}, {**USER, "tools": None}, {**ANSWER, "tools": []}]},
        [SYSTEM, USER, ANSWER],
    ),
    "conversations": ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "messages": ({"messages": [SYSTEM, USER, ANSWER, USER]}, [SYSTEM, USER, ANSWER, USER]),
    "one is null": ({"conversations": None, "messages": [USER, ANSWER]}, [USER, ANSWER]),
    "other keys": ({"id": 1, "messages": [{**USER, "name": "Bo"}, ANSWER]}, [USER, ANSWER]),
    "ShareGPT": (
        sharegpt(("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "q"), ("gpt", "a")),
        [SYSTEM, USER, ANSWER, USER, ANSWER],
    ),
    "system": ({"messages": [USER, ANSWER], "system": "s"}, [SYSTEM, USER, ANSWER]),
    "system, empty": ({"messages": [USER, ANSWER], "system": ""}, [USER, ANSWER]),
    "system, twice": ({"messages": [SYSTEM, USER, ANSWER], "system": "s"}, [SYSTEM, USER, ANSWER]),
    "Alpaca": ({"instruction": "q", "output": "a"}, [USER, ANSWER]),
    "Alpaca, no input": ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
    "Alpaca, input only": ({"instruction": "", "input": "q", "output": "a"}, [USER, ANSWER]),
    "Alpaca, all": (
        {
            "instruction": "q",
            "input": "i",
            "output": "a",
            "system": "s",
            "history": [["q", "a"], ["q", "b"]],
            "tools": "[]",
        },
        [
            *[SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "b"}],
            *[{"role": "user", "content": "q\ni"}, ANSWER],
        ],
    ),
    "call of OpenAI": (openai_call(name="f", arguments={"x": 1}), [USER, CALLS]),
    "arguments as JSON": (
        openai_call(name="f", arguments='{"x":1}'),
        [USER, {**CALLS, "tool_calls": [{"name": "f", "arguments": '{"x":1}'}]}],
    ),
    "no arguments": (
        openai_call(name="f"),
        [USER, {**CALLS, "tool_calls": [{"name": "f", "arguments": {}}]}],
    ),
    "bare call beside null": (
        {"messages": [USER, {**CALLS, "content": None}, RESULT, ANSWER]},
        [USER, CALLS, RESULT, ANSWER],
    ),
    "call that nobody answers": (
        {"messages": [USER, CALLS, USER, ANSWER]},
        [USER, CALLS, USER, ANSWER],
    ),
    "no calls": ({"messages": [USER, {**ANSWER, "tool_calls": []}]}, [USER, ANSWER]),
    "two calls, two rounds": (
        {"messages": [USER, {**CALLS, "tool_calls": [CALL] * 2}, RESULT, RESULT, CALLS, RESULT]},
        [USER, {**CALLS, "tool_calls": [CALL] * 2}, RESULT, RESULT, CALLS, RESULT],
    ),
    "function_call": (
        sharegpt(
            ("human", "q"),
            ("function_call", json.dumps(CALL)),
            ("observation", "r"),
            ("gpt", "a"),
        ),
        [USER, CALLS, RESULT, ANSWER],
    ),
    "function_calls in a row": (
        sharegpt(
            ("human", "q"),
            ("gpt", "a"),
            ("function_call", json.dumps([CALL, CALL])),
            ("function_call", json.dumps(CALL)),
            *[("observation", "r")] * 3,
            ("gpt", "a"),
        ),
        [USER, {**ANSWER, "tool_calls": [CALL] * 3}, *[RESULT] * 3, ANSWER],
    ),
    "tools": ({"messages": [USER, ANSWER], "tools": [CALL]}, [USER, ANSWER], [CALL]),
    "tools as JSON": (
        {"messages": [USER, ANSWER], "tools": json.dumps([CALL])},
        [USER, ANSWER],
        [CALL],
    ),
    "no tools": ({"messages": [USER, ANSWER], "tools": None}, [USER, ANSWER]),
    "blank tools": ({"messages": [USER, ANSWER], "tools": " "}, [USER, ANSWER]),
    "reasoning": (
        {"messages": [USER, {**ANSWER, "reasoning_content": "h"}]},
        [USER, {**ANSWER, "reasoning_content": "h"}],
    ),
    "no reasoning": ({"messages": [USER, {**ANSWER, "reasoning_content": None}]}, [USER, ANSWER]),
    "weights": (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1.5}]},
        [USER, {**ANSWER, "weight": 0.0}, USER, {**ANSWER, "weight": 1.5}],
    ),
    "no weight": (
        {"messages": [{**USER, "weight": 1}, {**ANSWER, "weight": None}]},
        [USER, ANSWER],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": x} for x in "ab"]},
            ]
        },
        [USER, {"role": "assistant", "content": "ab"}],
    ),
    "names of roles": (
        {
            "messages": [
                {"role": "Developer", "content": "s"},
                *[{"role": "Human", "content": "q"}, {"from": "bot", "value": "a"}],
                *[{"role": "prompter", "content": "q"}, {"role": "AI", "content": "a"}],
                *[{"role": "user", "content": "q"}, {"role": "model", "content": "a"}],
            ]
        },
        [SYSTEM, USER, ANSWER, USER, ANSWER, USER, ANSWER],
    ),
    "function_response": (
        sharegpt(("human", "q"), ("function_call", json.dumps(CALL)), ("function_response", "r")),
        [USER, CALLS, RESULT],
    ),
    "two of a role": (
        {"messages": [SYSTEM, {**SYSTEM, "content": "t"}, USER, USER, ANSWER, ANSWER]},
        [
            {"role": "system", "content": "s\nt"},
            {"role": "user", "content": "q\nq"},
            {"role": "assistant", "content": "a\na"},
        ],
    ),
    "the assistant begins": (
        {"messages": [SYSTEM, ANSWER, ANSWER, USER, ANSWER]},
        [SYSTEM, USER, ANSWER],
    ),
    "thinking": (
        {"messages": [USER, {**ANSWER, "thinking": "h"}]},
        [USER, {**ANSWER, "reasoning_content": "h"}],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
    "only the completion is learnt": (
        {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]},
        [SYSTEM, *UNLEARNT],
    ),
    "prompt and answer": ({"prompt": "q", "answer": "a"}, [USER, ANSWER]),
    "prompt and response": ({"prompt": "q", "response": "a"}, [USER, ANSWER]),
    "question and answer": (
        {"question": "q", "answer": "a", "system": "s"},
        [SYSTEM, USER, ANSWER],
    ),
    "query and response": ({"query": "q", "response": "a"}, [USER, ANSWER]),
    "Dolly": (
        {"instruction": "q", "context": "i", "response": "a"},
        [{"role": "user", "content": "q\ni"}, ANSWER],
    ),
    "JSON in a cell": ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
    "empty texts": (
        {"messages": [{**USER, "content": ""}, {**ANSWER, "content": ""}]},
        [{**USER, "content": ""}, {**ANSWER, "content": ""}],
    ),
}


@pytest.mark.parametrize("case", CHATS.values(), ids=CHATS)
def test_a_conversation_of_any_shape(case):
    record, messages, *tools = case
    parsed = parse_chat(json.dumps(record).encode("utf-8") + b"\n")
    assert parsed.messages == messages
    assert parsed.tools == (tools[0] if tools else [])


def turn(**message):
    return {"messages": [USER, {**ANSWER, **message}]}


BAD_CHATS = {
    "a text": ({"text": "a"}, 'no conversation, but of the shape text ("text")'),
    "preference pair": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        "no conversation, but of the shape preference pair",
    ),
    "no shape": (
        {"questions": "q", "answers": "a"},
        'its fields are "questions", "answers"; nearest: question and answer',
    ),
    "no fields": ({}, "no conversation: it has no fields"),
    "no answer": ({"question": "q"}, 'no conversation: its fields are "question"'),
    "answer is a number": ({"question": "q", "answer": 7}, '"answer" is a number, not a string'),
    "not an array": ({"messages": 1}, '"messages" is a number, not an array'),
    "no messages": ({"conversations": []}, "no assistant message"),
    "no assistant": ({"messages": [SYSTEM, USER]}, "no assistant message"),
    "message is null": ({"messages": [USER, None]}, "message 2: it is null, not an object"),
    "two answers of which one is not learnt": (
        {"messages": [USER, ANSWER, {**ANSWER, "train": False}]},
        "message 3: its weight is not that of the message before",
    ),
    "an answer after calls": (
        {"messages": [USER, CALLS, ANSWER]},
        "message 3: an answer after calls that have no result yet",
    ),
    "assistant alone": ({"messages": [ANSWER]}, "no assistant message after a user's"),
    "assistant after system": (
        {"messages": [SYSTEM, ANSWER]},
        "no assistant message after a user's",
    ),
    "late system": (
        {"messages": [USER, SYSTEM, ANSWER]},
        "message 2: role system cannot come after user",
    ),
    "tools of two systems": (
        {"messages": [{**SYSTEM, "tools": [TOOL]}, {**SYSTEM, "tools": [CALL]}, USER, ANSWER]},
        "message 2: its tools are not those of the message before",
    ),
    "systems differ": ({"messages": [SYSTEM, USER, ANSWER], "system": "t"}, "differ"),
    "tool first": (
        {"messages": [RESULT, USER, ANSWER]},
        "message 1: a tool message without a call",
    ),
    "tool without a call": (
        {"messages": [USER, ANSWER, RESULT]},
        "message 3: a tool message without a call",
    ),
    "more results than calls": (
        {"messages": [USER, CALLS, RESULT, RESULT]},
        "message 4: a tool message without a call",
    ),
    "result of an older call": ({"messages": [USER, CALLS, USER, RESULT]}, "without a call"),
    "user after a tool": (
        {"messages": [USER, CALLS, RESULT, USER]},
        "message 4: role user cannot come after tool",
    ),
    "unknown role": (
        {"messages": [{"role": "critic\n", "content": "q"}]},
        r'message 1: unknown role "critic\n"',
    ),
    "no role": ({"messages": [{"content": "q"}]}, "message 1: its role is null, not a string"),
    "role is an array": ({"messages": [{"role": []}]}, "message 1: its role is an array"),
    "no content": (
        {"messages": [{"role": "user"}]},
        "message 1: its content is null, not a string",
    ),
    "an image": (
        turn(content=[{"type": "image_url", "image_url": {"url": "data:,"}}]),
        'message 2: a part of kind "image_url": only text can be learnt',
    ),
    "a part without text": (turn(content=[{"type": "text"}]), "the text of a part is null"),
    "a part is null": (turn(content=[None]), "a part of its content is null"),
    "content is a number beside calls": (
        turn(content=0, tool_calls=[CALL]),
        "message 2: its content is a number",
    ),
    "reasoning alone": (turn(content=None, reasoning_content="h"), "content is null"),
    "surrogate": (
        turn(content="ab\ud83d"),
        "surrogates not allowed",
    ),
    "surrogate in reasoning": (turn(reasoning_content="\ud83d"), "surrogates not allowed"),
    "surrogate in arguments": (
        turn(tool_calls=[{"name": "f", "arguments": {"\ud83d": 1}}]),
        "surrogates not allowed",
    ),
    "surrogate in tools": (
        {**turn(), "tools": [{"a": "\ud83d"}]},
        "surrogates not allowed",
    ),
    "surrogate in JSON in tools": (
        {**turn(), "tools": r'["\ud83d"]'},
        '"tools" is not the JSON',
    ),
    "surrogate in system": ({**turn(), "system": "\ud83d"}, "surrogates not allowed"),
    "reasoning is a number": (turn(reasoning_content=1), "its reasoning is a number"),
    "calls are an object": (turn(tool_calls=CALL), '"tool_calls" is an object, not an array'),
    "call is a string": (turn(tool_calls=["f"]), "a tool call is a string, not an object"),
    "function is a string": (
        turn(tool_calls=[{"function": "f"}]),
        "a tool call is a string, not an object",
    ),
    "call without a name": (turn(tool_calls=[{"arguments": {}}]), "name of a tool call is null"),
    "arguments are an array": (
        turn(tool_calls=[{"name": "f", "arguments": []}]),
        '"arguments" of a tool call is an array, not an object',
    ),
    "function_call is prose": (
        sharegpt(("human", "q"), ("function_call", "f(1)")),
        "message 2: the function_call is not the JSON",
    ),
    "function_call holds none": (sharegpt(("human", "q"), ("function_call", "[]")), "message 2: "),
    "function_call first": (
        sharegpt(("function_call", json.dumps(CALL)), ("observation", "r")),
        "message 2: a tool message without a call",
    ),
    "function_call weighs otherwise": (
        {
            "messages": [
                *[USER, {**ANSWER, "weight": 0}],
                {"from": "function_call", "value": json.dumps(CALL)},
            ]
        },
        "message 3: its weight is not that of the message before",
    ),
    **{
        f"{name} is {json.dumps(value)}": (
            flagged(**{name: value}),
            f'message 2: "{name}" is neither true or 1 nor false or 0',
        )
        for name in ("train", "training", "loss", "loss_mask")
        for value in ("false", 0.5, 2, [0], {}, float("nan"))
    },
    "a user's flag": (
        {"messages": [{**USER, "train": "no"}, ANSWER]},
        'message 1: "train" is neither',
    ),
    "mask_history is a string": (
        {**flagged(), "mask_history": "true"},
        '"mask_history" is neither true or 1 nor false or 0',
    ),
    "calls as JSON of an object": (
        turn(tool_calls=json.dumps(CALL)),
        'message 2: "tool_calls" is an object, not an array',
    ),
    "calls are prose": (turn(tool_calls="f(1)"), 'message 2: "tool_calls" is not the JSON'),
    "function_call has no name": (turn(function_call={"arguments": {}}), "name of a tool call"),
    "tools of two kinds": (
        {"messages": [{**SYSTEM, "tools": [TOOL]}, USER, ANSWER], "tools": [CALL]},
        '"tools" and the "tools" of the system message differ',
    ),
    "tools of a user": (
        {"messages": [{**USER, "tools": [TOOL]}, ANSWER]},
        'message 1: "tools" belong to the system message',
    ),
    "tools of the system message are prose": (
        {"messages": [{**SYSTEM, "tools": "none"}, USER, ANSWER]},
        'message 1: "tools" is not the JSON',
    ),
    "tools are prose": ({**turn(), "tools": "none"}, '"tools" is not the JSON that it should be'),
    "tools are deep": ({**turn(), "tools": "[" * 100_000}, '"tools" is not the JSON'),
    "tools are an object": ({**turn(), "tools": CALL}, '"tools" is an object, not an array'),
    "weight is a string": (turn(weight="1"), "message 2: its weight is not a number from 0 to 1,0"),
    "weight is true": (turn(weight=True), "weight is not a number"),
    "weight is negative": (turn(weight=-1), "weight is not a number"),
    "weight is NaN": (turn(weight=float("nan")), "weight is not a number"),
    "weight is huge": (turn(weight=10**400), "weight is not a number"),
    "output is missing": ({"instruction": "q"}, '"output" is null, not a string'),
    "instruction is null": ({"instruction": None, "output": "a"}, '"instruction" is null, not'),
    "input is a number": ({"instruction": "q", "input": 1, "output": "a"}, '"input" is a number'),
    "history": (
        {"instruction": "q", "output": "a", "history": [["q"]]},
        '"history" is not an array',
    ),
    "history of numbers": (
        {"instruction": "q", "output": "a", "history": [[1, 2]]},
        "message 1: its content is a number",
    ),
    "a list": ([USER, ANSWER], "an array, not an object"),
}


@pytest.mark.parametrize(("record", "reason"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_conversation_is_refused_with_its_reason(record, reason):
    with pytest.raises(RecordError) as error:
        parse_chat(json.dumps(record).encode("utf-8"))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *[
                            "role",
                            "from",
                            "content",
                            "value",
                            "tool_calls",
                            "function",
                            "name",
                            "arguments",
                        ],
                        *[
                            "conversations",
                            "messages",
                            "system",
                            "tools",
                            "weight",
                            "instruction",
                            "output",
                        ],
                    ]
                ),
                inner | st.sampled_from(["user", "assistant", "tool"]),
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_a_line_holds_it_is_parsed_or_refused(value):
    for record in (
        value,
        {"messages": value},
        {"messages": [USER, value]},
        {**turn(), "tools": value},
    ):
        try:
            parsed = parse_chat(json.dumps(record).encode("utf-8"))
        except RecordError:
            continue
        assert all(isinstance(message["content"], str) for message in parsed.messages)


# ---- the same in questions and pairs


def test_questions_have_the_tools_of_their_system_message():
    record = {
        "messages": [{**SYSTEM, "tools": json.dumps([TOOL])}, USER, {**ANSWER, "content": ""}]
    }
    (messages, tools), reference = parse_question(json.dumps(record).encode())
    assert (messages, tools, reference) == ([SYSTEM, USER], [TOOL], None)


def test_pairs_have_the_tools_of_their_system_message():
    system = {**SYSTEM, "tools": [TOOL]}
    whole = {"chosen": [system, USER, ANSWER], "rejected": [system, USER, CALLS]}
    apart = {"prompt": [system, USER], "chosen": [ANSWER], "rejected": [CALLS]}
    for record in (whole, apart, {**whole, "tools": json.dumps([TOOL])}):
        pair = parse_preference(json.dumps(record).encode())
        assert pair.tools == [TOOL]
        assert pair.chosen == [SYSTEM, USER, ANSWER]
        assert pair.rejected == [SYSTEM, USER, CALLS]
    other = {**whole, "rejected": [SYSTEM, USER, CALLS]}
    with pytest.raises(RecordError, match="no prompt in common"):
        parse_preference(json.dumps(other).encode())


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({}, None),
        ({"score_chosen": 8.5, "score_rejected": 3}, (8.5, 3)),
        ({"score_chosen": 8.5}, None),
        ({"score_chosen": None, "score_rejected": None}, None),
        ({"score_chosen": True, "score_rejected": False}, None),
        ({"score_chosen": "8.5", "score_rejected": "3"}, None),
    ],
)
def test_scores_of_pairs(fields, scores):
    record = {"prompt": "q", "chosen": "a", "rejected": "b", **fields}
    assert parse_preference(json.dumps(record).encode()).scores == scores


def count(record):
    counts = Counter()
    parse_chat(json.dumps(record).encode(), counts=counts)
    return +counts


def test_what_a_conversation_was_made_into_is_counted():
    thought = {**ANSWER, "content": "<think>\nh\n</think>\n\na"}
    assert count({"messages": [ANSWER, USER, USER, ANSWER, ANSWER, USER, thought]}) == {
        "leading_answers": 1,
        "joined_messages": 2,
        "inline_thoughts": 1,
    }
    calls = [("function_call", json.dumps(CALL))] * 2
    assert count(sharegpt(("human", "q"), ("gpt", "a"), *calls)) == {}


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>\nh\n</think>\n\na", "a", "h"),
        (" <think>h</think>a</think>", "a</think>", "h"),
        ("<think>\n\n</think>\n\na", "a", None),
        ("a <think>h</think>", "a <think>h</think>", None),
        ("<think>h", "<think>h", None),
    ],
)
def test_thoughts_in_a_text_are_parsed_where_that_is_asked_for(text, content, reasoning):
    record = json.dumps(turn(content=text)).encode()
    assert parse_chat(record).messages[1] == {"role": "assistant", "content": text}
    parsed = parse_chat(record, RecordOptions(parse_think=True)).messages[1]
    assert (parsed["content"], parsed.get("reasoning_content")) == (content, reasoning)


# ---- texts


def text(record, **options):
    return parse_text(json.dumps(record).encode(), RecordOptions(**options))


def test_a_text_may_have_another_name_and_a_title():
    record = {"title": "T", "body": "b", "content": "c", "none": None}
    assert text(record) == "c"
    assert text({**record, "text": "t"}) == "t"
    assert text(record, text_column="body") == "b"
    assert text(record, text_template="{title}{none}\n{body}") == "T\nb"
    for options, reason in [
        ({"text_column": "text"}, '"text", the --text_column, is missing'),
        ({"text_template": "{titel} {body}"}, '"titel" is missing'),
        ({"text_template": "{none}"}, "the text is empty"),
    ]:
        with pytest.raises(RecordError, match=reason):
            text(record, **options)


def test_a_conversation_is_no_text_and_is_named():
    with pytest.raises(RecordError, match=r'no text, but of the shape conversation \("messages"\)'):
        text({"messages": [USER, ANSWER]})


# ---- pairs


def pair(record, **options):
    return parse_preference(json.dumps(record).encode(), RecordOptions(**options))


def test_pairs_in_the_strings_of_hh():
    start = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant: "
    parsed = pair({"chosen": start + "Human kind.\n\nYes.", "rejected": start + "b"})
    assert parsed.chosen == [*LEARNT[:3], {"role": "assistant", "content": "Human kind.\n\nYes."}]
    assert parsed.rejected[3]["content"] == "b" and parsed.shared == 3


def test_pairs_of_nested_messages():
    record = {"chosen": {"messages": [USER, ANSWER]}, "rejected": {"messages": [USER, CALLS]}}
    assert pair(record).chosen == [USER, ANSWER]


def test_pairs_below_the_margin_are_left_out():
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 5}
    assert pair({**record, "score_rejected": 4}, min_margin=1).scores == (5, 4)
    with pytest.raises(LeftOut, match="min_margin"):
        pair({**record, "score_rejected": 4.5}, min_margin=1)
    with pytest.raises(RecordError, match="score_rejected"):
        pair(record, min_margin=1)


def judged(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_judged_completions_become_pairs():
    whole = {"messages": [USER, ANSWER], "label": 0}
    records = [
        *[judged("q", "bad", False), judged("p", "good", True), judged("q", "good", True)],
        *[judged("q", "worse", False), {"prompt": "x", "chosen": "a", "rejected": "b"}],
        *[whole, judged([USER], [{**ANSWER, "content": "b"}], True), {"label": True}],
    ]
    places = [(Place("", n), json.dumps(r).encode()) for n, r in enumerate(records, 1)]
    bad = BadLines()
    paired = list(pair_judged(places, bad))
    assert [place.line for place, _ in paired] == [1, 5, 4, 8]
    first, other, last = (parse_preference(record) for _, record in paired[:3])
    assert [first.chosen[1]["content"], first.rejected[1]["content"]] == ["good", "bad"]
    assert other.chosen[1]["content"] == "a"
    assert [last.chosen[1]["content"], last.rejected[1]["content"]] == ["b", "worse"]
    assert list(bad.left_out.values()) == [2]  # "p", and one of three for "q"


def test_questions_bring_their_answers():
    for record, answer in [
        ({"prompt": "q", "answer": "a"}, {"content": "a"}),
        ({"prompt": "q"}, None),
        ({"messages": [USER, {**ANSWER, "content": ""}], "gt": ["1", "2"]}, {"content": "1, 2"}),
        ({"messages": [USER], "gt": "1"}, {"content": "1"}),
        ({"messages": [USER, CALLS]}, {k: CALLS[k] for k in ("content", "tool_calls")}),
    ]:
        (messages, _), reference = parse_question(json.dumps(record).encode())
        answer = answer and {"role": "assistant", **answer}
        assert (messages, reference) == ([{**USER, **messages[0]}], answer)


def test_the_invented_files_are_read(shared_dir):
    """All records of all shapes, but for the two that cannot be."""
    folder, bad = shared_dir / "data" / "formats", []
    for path in sorted(folder.iterdir()):
        for place, record in pair_judged(read_records(path), BadLines()):
            kind = record_kind(record)
            parse = {"text": parse_text, "conversation": parse_chat, "pair": parse_preference}[kind]
            try:
                parse(record)
            except RecordError:
                bad.append((path.name, place.line))
    assert bad == [("content_parts.jsonl", 2), ("odd_turns.jsonl", 4)]
