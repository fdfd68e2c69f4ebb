import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.records import (
    BadLines,
    DataError,
    RecordError,
    check_file,
    parse_chat,
    parse_text,
)

# Bad lines, and a part of the reason to be named. test_token_store.py puts them into files.
BAD_LINES = {
    "blank": (b"", "blank line"),
    "spaces": (b"  \t", "blank line"),
    "not JSON": (b"hello", "broken JSON: Expecting value at column 1"),
    "column": (b'{"text": "a" "b"}', "broken JSON: Expecting ',' delimiter at column 14"),
    "column counts characters": ('{"text": "中文" 1}'.encode(), "at column 15"),
    "control character": (b'{"text": "a\tb"}', "Invalid control character at column 12"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "Extra data at column 14"),
    "array": (b'["text"]', "an array, not a JSON object"),
    "string": (b'"text"', "a string, not a JSON object"),
    "null": (b"null", "null, not a JSON object"),
    "missing": (b'{"content": "a"}', '"text" is missing'),
    "text is null": (b'{"text": null}', '"text" is null, not a string'),
    "text is a number": (b'{"text": 1}', '"text" is a number, not a string'),
    "text is a boolean": (b'{"text": true}', '"text" is a boolean, not a string'),
    "text is an array": (b'{"text": ["a"]}', '"text" is an array, not a string'),
    "text is an object": (b'{"text": {}}', '"text" is an object, not a string'),
    "empty text": (b'{"text": ""}', '"text" is empty'),
    "blank text": ('{"text": " \\n\\t　"}'.encode(), '"text" is blank'),
    "not UTF-8": ('{"text": "中文"}'.encode("gbk"), "invalid UTF-8 at byte 11"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8 at byte 11"),
    "lone surrogate": (b'{"text": "ab\\ud83d!"}', r"lone surrogate, \ud83d, at character 3"),
    "low surrogate": (b'{"text": "\\ude00"}', r"lone surrogate, \ude00, at character 1"),
    "cut in a string": (b'{"text": "to be cont', "column 20; truncated?"),
    "cut before the brace": (b'{"text": "a"', "column 12; truncated?"),
    "cut in an escape": (b'{"text": "a\\u4e', "column 15; truncated?"),
    "cut in a character": (
        '{"text": "中'.encode()[:-1],
        "in the middle of a character; truncated?",
    ),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "long number": (b'{"text": "a", "n": ' + b"1" * 5_000 + b"}", "thousand digits"),
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


def test_the_report_names_ten_lines_and_the_total():
    bad = BadLines()
    for number in range(3, 1237):
        bad.add(number, f"reason {number}")
    report = bad.report("data.jsonl").splitlines()
    assert report[:10] == [f"data.jsonl:{n}: reason {n}" for n in range(3, 13)]
    assert len(report) == 11
    assert "1,234" in report[10]
    assert "--skip_bad_lines" in report[10]


def test_files_that_cannot_be_data(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    wide = tmp_path / "wide.jsonl"
    wide.write_text('{"text": "a"}\n', encoding="utf-16")
    missing = tmp_path / "missing.jsonl"
    for path, reason in [
        (empty, "empty"),
        (packed, "gzip"),
        (wide, "UTF-16"),
        (missing, "no such file"),
        (tmp_path, "folder"),
    ]:
        with pytest.raises(DataError) as error:
            check_file(path)
        assert str(path) in str(error.value)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


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


# Records, their messages, and their tools if there are any.
CHATS = {
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
    "no shape": ({"text": "a"}, 'no "conversations", "messages" or "instruction"'),
    "preference pair": ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "no "),
    "not an array": ({"messages": "q"}, '"messages" is a string, not an array'),
    "no messages": ({"conversations": []}, "no assistant message"),
    "no assistant": ({"messages": [SYSTEM, USER]}, "no assistant message"),
    "message is null": ({"messages": [USER, None]}, "message 2 is null, not an object"),
    "two users": ({"messages": [USER, USER, ANSWER]}, "message 2: two user messages in a row"),
    "two answers": ({"messages": [USER, ANSWER, ANSWER]}, "message 3: two assistant messages in a"),
    "assistant first": ({"messages": [ANSWER]}, "message 1: an assistant message before any user"),
    "assistant after system": ({"messages": [SYSTEM, ANSWER]}, "message 2: an assistant message b"),
    "late system": (
        {"messages": [USER, SYSTEM, ANSWER]},
        "message 2: a system message that is not",
    ),
    "two systems": ({"messages": [SYSTEM, SYSTEM, USER, ANSWER]}, "message 2: a system message"),
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
        "message 4: a user message be",
    ),
    "unknown role": (
        {"messages": [{"role": "bot\n", "content": "q"}]},
        r'message 1: unknown role "bot\n"',
    ),
    "no role": ({"messages": [{"content": "q"}]}, "message 1: its role is null, not a string"),
    "role is an array": ({"messages": [{"role": []}]}, "message 1: its role is an array"),
    "no content": (
        {"messages": [{"role": "user"}]},
        "message 1: its content is null, not a string",
    ),
    "content of parts": (
        turn(content=[{"type": "text", "text": "a"}]),
        "message 2: its content is an array, not a string",
    ),
    "content is a number beside calls": (
        turn(content=0, tool_calls=[CALL]),
        "message 2: its content is a number",
    ),
    "reasoning alone": (turn(content=None, reasoning_content="h"), "content is null"),
    "surrogate": (
        turn(content="ab\ud83d"),
        r"content holds a lone surrogate, \ud83d, at character 3",
    ),
    "surrogate in reasoning": (turn(reasoning_content="\ud83d"), "reasoning_content holds a lone"),
    "surrogate in arguments": (
        turn(tool_calls=[{"name": "f", "arguments": {"\ud83d": 1}}]),
        "the arguments of a tool call holds a lone surrogate",
    ),
    "surrogate in tools": (
        {**turn(), "tools": [{"a": "\ud83d"}]},
        '"tools" holds a lone surrogate',
    ),
    "surrogate in JSON in tools": (
        {**turn(), "tools": r'["\ud83d"]'},
        '"tools" is not an array of',
    ),
    "surrogate in system": ({**turn(), "system": "\ud83d"}, '"system" holds a lone surrogate'),
    "reasoning is a number": (turn(reasoning_content=1), "reasoning_content is a number"),
    "calls are an object": (turn(tool_calls=CALL), "its tool_calls are an object, not an array"),
    "call is a string": (turn(tool_calls=["f"]), "a tool call is not an object"),
    "function is a string": (turn(tool_calls=[{"function": "f"}]), "a tool call is not an object"),
    "call without a name": (turn(tool_calls=[{"arguments": {}}]), "name of a tool call is null"),
    "arguments are an array": (
        turn(tool_calls=[{"name": "f", "arguments": []}]),
        "the arguments of a tool call are an array, not an object",
    ),
    "function_call is prose": (
        sharegpt(("human", "q"), ("function_call", "f(1)")),
        "message 2: the function_call is not the JSON",
    ),
    "function_call holds none": (sharegpt(("human", "q"), ("function_call", "[]")), "message 2: "),
    "function_call first": (sharegpt(("function_call", json.dumps(CALL))), "before any user"),
    "function_call weighs otherwise": (
        {
            "messages": [
                *[USER, {**ANSWER, "weight": 0}],
                {"from": "function_call", "value": json.dumps(CALL)},
            ]
        },
        "message 3: two assistant messages in a row",
    ),
    "tools are prose": ({**turn(), "tools": "none"}, '"tools" is not the JSON that it should be'),
    "tools are deep": ({**turn(), "tools": "[" * 100_000}, '"tools" is not the JSON'),
    "tools are an object": ({**turn(), "tools": CALL}, '"tools" is not an array of objects'),
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
    "a list": ([USER, ANSWER], "an array, not a JSON object"),
}


@pytest.mark.parametrize(("record", "reason"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_conversation_is_refused_with_its_reason(record, reason):
    with pytest.raises(RecordError) as error:
        parse_chat(json.dumps(record).encode("utf-8"))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120


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
