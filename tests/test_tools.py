"""Tools that a model calls: the calculator, functions of a file, and rounds of calls."""

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from dataset import parse_chat
from inference.calculator import calculator
from inference.conversations import Conversation
from inference.parts import Delta
from inference.tools import BUILT_IN, MOST_ROUNDS, Tool, answer_in_rounds, find_tools, run_call

USER = {"role": "user", "content": "?"}


@settings(deadline=None)
@given(
    a=st.integers(-9999, 9999),
    b=st.integers(1, 9999),
    sign=st.sampled_from(["+", "-", "*", "//", "%"]),
)
def test_whole_numbers_are_exact(a, b, sign):
    assert calculator(f"{a} {sign} {b}") == str(eval(f"{a} {sign} {b}"))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("(2 + 3) × 4 =", "20"),
        ("9 ÷ 3", "3"),
        ("1 / 3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("2^10", "1024"),
        ("-2 ** 2", "-4"),
        ("sqrt(2)", f"{math.sqrt(2):.12g}"),
        ("max(1, 2.5)", "2.5"),
        ("99999999999 * 99999999999", "9999999999800000000001"),
    ],
)
def test_values(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *["", "1 +", "1 / 0", "x", "True", "'a' * 9", "1, 2", "[1]", "1 if 2 else 3"],
        *["9 ** 9 ** 9", "10 ** 101", "1e99 * 1e99", "1e400", "(-8) ** 0.5", "2 << 9", "1j"],
        *["().__class__", "__import__('os')", "open('a')", "sqrt(-1)", "max()", "abs(x=1)"],
        *["1" * 201, "(" * 150 + "1" + ")" * 20, "\0", "round(1e308 * 10)", "(lambda: 1)()"],
        *["round(1, -1000000000)", "round(2.5, 10 ** 9)"],
    ],
)
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(
        ValueError, match=r"expression|number|digits|power|zero|argument|domain|too large"
    ):
        calculator(expression)


@settings(deadline=None, max_examples=300)
@given(st.text("0123456789.+-*/%()e ×,", max_size=60))
def test_any_text_has_a_value_or_is_refused(expression):
    with contextlib.suppress(ValueError):
        assert calculator(expression)


def test_built_in_schemas_are_those_of_the_sample_world():
    """A model that learnt to call a tool by its schema meets the very same one."""
    world = pytest.importorskip("sample_world.tools")
    assert {name: tool.schema for name, tool in BUILT_IN.items()} == world.TOOLS


FILE = '''
import math
from pathlib import Path as _Path

def area(radius: float, unit: str = "m") -> str:
    """Work out the area of a circle.

    Args:
        radius: half of its width
        unit: of length
    """
    return {"area": round(math.pi * radius**2, 2), "unit": f"{unit}²"}

def _hidden(x: int):
    raise RuntimeError

def fail():
    """Fail."""
    raise KeyError("gone")
'''


def test_functions_of_a_file_are_tools(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    tools = find_tools(["clock"], path)
    assert list(tools) == ["clock", "area", "fail"]
    parameters = tools["area"].schema["function"]["parameters"]
    assert parameters["required"] == ["radius"]
    assert parameters["properties"]["radius"] == {
        "type": "number",
        "description": "half of its width",
    }
    call = {"name": "area", "arguments": '{"radius": 2}'}
    assert json.loads(run_call(call, tools)) == {"area": 12.57, "unit": "m²"}
    assert run_call({"name": "fail", "arguments": {}}, tools) == "error: KeyError: 'gone'"
    assert "radius" in run_call({"name": "area", "arguments": {}}, tools)
    assert run_call({"name": "other", "arguments": {}}, tools) == "error: there is no tool other"
    assert run_call({"name": "clock", "arguments": "{}"}, tools).count(":") == 1
    assert all("return" not in tool.schema["function"] for tool in tools.values())
    long = {"long": Tool({}, lambda: "x" * 5000)}
    assert run_call({"name": "long", "arguments": {}}, long) == "x" * 4000 + "…"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1", "no public function"),
        ("def f(x: int):\n    return x", "f: "),
        ('def f(x):\n    """Say x."""', "f: "),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def f(:", "SyntaxError"),
        ('def calculator():\n    """Calculate."""', "calculator is one of --tools"),
    ],
)
def test_mistakes_of_a_file_are_named(tmp_path, text, named):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"--tool_file .*mine.py: .*{named}"):
        find_tools(["calculator"], path)
    with pytest.raises(UserError, match="no such"):
        find_tools([], tmp_path / "nowhere.py")


def talk(*answers, schemas=None, tools=BUILT_IN):
    """The rounds of a model with these answers: prompts, deltas, and the messages made."""
    prompts, made, rest = [], [], iter(answers)

    def stream(messages):
        prompts.append(messages)
        yield from next(rest)

    schemas = [tool.schema for tool in BUILT_IN.values()] if schemas is None else schemas
    deltas = list(answer_in_rounds(stream, [USER], made, schemas, tools))
    return prompts, deltas, made


def call(expression):
    return Delta("call", json.dumps({"expression": expression}), "calculator")


SAYS = Delta("content", "It is 5.")


def test_a_call_its_result_and_the_answer():
    thought = Delta("reasoning", "hm")
    prompts, deltas, made = talk([thought, call("2 + 3"), call("1 / 0")], [SAYS])
    results = [
        Delta("result", "5", "calculator"),
        Delta("result", "error: ValueError: division by zero", "calculator"),
    ]
    assert deltas == [thought, call("2 + 3"), call("1 / 0"), *results, SAYS]
    assert [m["role"] for m in made] == ["assistant", "tool", "tool", "assistant"]
    assert prompts == [[USER], [USER, *made[:3]]]
    line = json.dumps({"conversations": [USER, *made]}).encode()
    assert parse_chat(line).messages == [USER, *made]


def test_rounds_end():
    """At the limit, and at a call that nothing here runs; an unknown tool is an error text."""
    prompts, _, made = talk(*[[call("1")]] * (MOST_ROUNDS + 1))
    assert len(prompts) == MOST_ROUNDS + 1
    assert made[-1]["tool_calls"]
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    asks = [Delta("call", "{}", "weather")]
    _, _, made = talk(asks, schemas=[schema])
    assert [m["role"] for m in made] == ["assistant"]
    _, _, made = talk(asks, [SAYS])
    assert made[1] == {"role": "tool", "content": "error: there is no tool weather"}
    _, _, made = talk([call("1")], [SAYS], schemas=[schema])  # not offered
    assert made[1]["content"] == "error: there is no tool calculator"


def test_what_has_come_is_kept_when_it_is_interrupted():
    made = []
    rounds = answer_in_rounds(lambda _: iter([SAYS, SAYS]), [USER], made)
    assert next(rounds) == SAYS
    rounds.close()
    assert made == [{"role": "assistant", "content": "It is 5."}]


def test_a_conversation_to_read_has_thoughts_and_calls():
    chat = Conversation(system="Be kind.")
    call = {"name": "clock", "arguments": "{}"}
    chat.messages = [
        {"role": "user", "content": "Late?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.\nSo.", "tool_calls": [call]},
        {"role": "tool", "content": "10:20"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": ""},
    ]
    assert chat.markdown() == (
        "**system**\n\nBe kind.\n\n**user**\n\nLate?\n\n**assistant**\n\n> Hm.\n> So.\n\n"
        "`clock {}`\n\n**tool**\n\n10:20\n\n**assistant**\n\nYes.\n\n"
    )
