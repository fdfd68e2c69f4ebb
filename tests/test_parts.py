"""Reasoning, content and tool calls of a generated answer."""

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import ChatEncoder, render_chat
from inference.parts import AnswerParts, Delta, parse_answer, read_call

USER = {"role": "user", "content": "Hi"}
words = ["\n", " ", "a", "é", "好", "🙂", "<think>", "</s>", '"', "}"]
texts = st.lists(st.sampled_from(words), max_size=8).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
calls = st.fixed_dictionaries({"name": texts, "arguments": st.dictionaries(texts, values)})


@st.composite
def answers(draw):
    message = {"role": "assistant", "content": draw(texts)}
    if draw(st.booleans()):
        message["reasoning_content"] = draw(texts)
    if draw(st.booleans()):
        message["tool_calls"] = draw(st.lists(calls, min_size=1, max_size=3))
    return message


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChatEncoder(tokenizer)


def ids_of(encoder, messages, **options):
    return encoder.encode([render_chat(messages, **options)]).ids.tolist()


def by_value(message):
    """A message whose calls' arguments are values."""
    made = [{**c, "arguments": json.loads(c["arguments"])} for c in message.get("tool_calls", [])]
    return {**message, "tool_calls": made} if made else message


@settings(deadline=None, max_examples=150)
@given(answer=answers(), thinking=st.sampled_from([None, True, False]))
def test_an_answer_is_what_training_rendered(encoder, tokenizer, answer, thinking):
    """The tokens of a rendered message give the message, and that the tokens, after any prompt."""
    if thinking is not None:
        answer = {**answer, "reasoning_content": answer.get("reasoning_content", "x")}
        if not thinking:
            answer["reasoning_content"] = ""
    prompt = ids_of(encoder, [USER], add_generation_prompt=True, enable_thinking=thinking)
    whole = ids_of(encoder, [USER, answer])
    if thinking and not answer["reasoning_content"]:
        return  # an empty thought is rendered for a prompt that wants none
    assert whole[: len(prompt)] == prompt
    end = len(whole) - 1 - whole[::-1].index(tokenizer.eos_token_id)
    found = parse_answer(tokenizer, whole[len(prompt) : end], thinking)
    assert by_value(found) == answer
    assert ids_of(encoder, [USER, found]) == whole


def generate(tokenizer, *pieces):
    """Ids of texts and, in tuples, control tokens."""
    ids = []
    for piece in pieces:
        if isinstance(piece, tuple):
            ids += map(tokenizer.convert_tokens_to_ids, piece)
        else:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
    return ids


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<think>\na\n</think>\nb"], [("content", "<think>\na\n</think>\nb")]),
        ([("<think>",), "\na\n"], [("reasoning", "a\n")]),
        (["b", ("<think>",), "c"], [("content", "bc")]),
        ([("</think>",), "b", ("</tool_call>",)], [("content", "b")]),
        ([("<tool_call>",), '\n{"name": "f"'], [("broken", '{"name": "f"')]),
        ([("<tool_call>",), "\nf(1)\n", ("</tool_call>",)], [("broken", "f(1)")]),
    ],
)
def test_parts_that_are_not_as_trained(tokenizer, pieces, expected):
    deltas = AnswerParts(tokenizer).parse(generate(tokenizer, *pieces))
    kinds = groupby(deltas, lambda delta: delta.kind)
    assert [(kind, "".join(d.text for d in some)) for kind, some in kinds] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"x":  1}}', Delta("call", '{"x":  1}', "f")),
        ('{"arguments": {"x": "é"}, "name": "f"}', Delta("call", '{"x": "é"}', "f")),
        ('{"name": "f"}', Delta("call", "{}", "f")),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 1, "arguments": {}}', None),
        ('["f"]', None),
        ('{"name": "f", "arguments": {"x": NaN}}', None),
        (r'{"name": "f", "arguments": {"x": "\ud800"}}', Delta("call", r'{"x": "\ud800"}', "f")),
        (r'{"name":"f","arguments":{"x":"\ud800"}}', None),
        (r'{"name": "\ud800", "arguments": {}}', None),
        ("", None),
        ('{"name": "f", "arguments": {"x": 1}', None),
        ("[" * 100_000, None),
    ],
)
def test_a_call_has_a_name_and_arguments(text, expected):
    assert read_call(text) == (expected or Delta("broken", text))


def test_text_ends_before_a_stop_string(tokenizer):
    parts = AnswerParts(tokenizer, stop=["STOP"])
    found = "".join(d.text for d in parts.parse(generate(tokenizer, "a\nST", "OP and more")))
    assert (found, parts.stopped) == ("a\n", True)


def test_a_stop_string_ends_the_content_alone(tokenizer):
    """Neither a line of the thought nor the newline after it is the end."""
    generated = generate(tokenizer, "a\nb\n", ("</think>",), "\nc\nd")
    parts = AnswerParts(tokenizer, thinks=True, stop=["\n"])
    kinds = groupby(parts.parse(generated), lambda delta: delta.kind)
    joined = [(kind, "".join(d.text for d in some)) for kind, some in kinds]
    assert joined == [("reasoning", "a\nb"), ("content", "c")] and parts.stopped
