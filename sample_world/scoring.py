"""Tests of the sample: read the questions, judge the answers, tabulate the scores."""

import json
import re
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError
from dataset import RecordError, locate, read_records
from dataset.fields import parse_object

QUESTION = {"conversations", "skill", "language", "expect", "choices", "chance", "declined"}
LANGUAGES = {"en": "English", "zh": "Chinese"}
Z = 1.96  # standard deviations on either side that hold 95 % of a normal distribution
WHERE_DUE, WHERE_NOT_DUE = "declined where it must be", "answered where it can be"


class Score(NamedTuple):
    """Right answers to some questions, and the share that a guesser gets right."""

    right: int
    asked: int
    chance: float

    @property
    def share(self) -> float:
        """Right answers, from 0 to 1."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share (Wilson's), if the questions are drawn by chance."""
        weight = Z**2 / self.asked
        center = (self.share + weight / 2) / (1 + weight)
        spread = sqrt(self.share * (1 - self.share) * weight + weight**2 / 4) / (1 + weight)
        return center - spread, center + spread

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


Calls = Sequence[Mapping[str, Any]]  # name and arguments of each
Scores = Mapping[tuple[str, str], Score]  # by skill and language, as `score_answers` gives them


def read_test(path: Path) -> list[dict[str, Any]]:
    """The questions of a test of the sample.

    Raises:
        UserError: if the file cannot be read, or a line is not a question of such a test.
    """
    records = []
    for place, content in read_records(path):
        try:
            record = parse_object(content)
        except RecordError as error:
            raise UserError(f"{locate(path, place)}: {error}") from None
        if not record.keys() >= QUESTION:
            raise UserError(f"{locate(path, place)}: not a question of the sample world's test")
        records.append(record)
    return records


def is_right(record: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer to a question of test.jsonl is right.

    A question that must be declined is answered right by any text with the words that mark a
    declining answer; any other question, never. Where there are choices, the answer must name the
    expected one and none besides, except what the question names. Where numbers are asked for,
    it must have them and no others; where an answer may work them out, as its last ones. Where
    a style is wanted, whatever the answer says, it must end with one of the expected sentences; to
    small talk it must begin with one.
    """
    expect = record["expect"]
    if record["skill"] == "style":
        return answer.rstrip().endswith(tuple(expect))
    if record["skill"] == "small_talk" and expect:
        return answer.lstrip().startswith(tuple(expect))
    if record["declined"] in answer or not expect:
        return record["declined"] in answer and not expect
    if record["choices"]:
        question = record["conversations"][0]["content"]
        named = _named(answer, record["choices"]) - _named(question, record["choices"])
        return named == set(expect)
    numbers = re.findall(r"\d+", answer)
    worked_out = record["skill"] in ("sums", "tools", "thinking")
    return (numbers[-len(expect) :] if worked_out else numbers) == expect


def calls_are_right(record: Mapping[str, Any], calls: Calls) -> bool:
    """Whether the calls before an answer are those of the record, which are one or none.

    Expressions may differ in spaces and in the sign of a product.
    """
    expected = [call for m in record["conversations"] for call in m.get("tool_calls", ())]
    return list(map(_plain_call, calls)) == list(map(_plain_call, expected))


def score_calls(
    records: Sequence[Mapping[str, Any]], made: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, float]:
    """The shares of right calls, where one is needed, and of calls where tools are for nothing.

    `made` are a model's messages to each question, with calls as in training data.
    """
    right, unneeded = [], []
    for record, messages in zip(records, made, strict=True):
        calls = [
            {**call, "arguments": json.loads(call["arguments"])}
            for message in messages
            for call in message.get("tool_calls", ())
        ]
        if any(message.get("tool_calls") for message in record["conversations"]):
            right.append(calls_are_right(record, calls))
        elif record.get("tools"):
            broken = any(message.get("broken_calls") for message in messages)
            unneeded.append(bool(calls) or broken)
    found = {"right calls": right, "unneeded calls": unneeded}
    return {name: sum(some) / len(some) for name, some in found.items() if some}


def _plain_call(call: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """A call without what does not matter in its expression."""
    arguments = call["arguments"]
    plain = {name: re.sub(r"\s", "", str(text)) for name, text in arguments.items()}
    return call["name"], {name: text.replace("×", "*") for name, text in plain.items()}


def _named(text: str, choices: Sequence[str]) -> set[str]:
    """Which choices a text names; where one begins another, the longer."""
    longest_first = sorted(choices, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return set(re.findall(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", text))


def score_answers(records: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Scores:
    """The score of each (skill, language), each (skill, "") and ("overall", "").

    Declining is counted both ways too, as (WHERE_DUE, "") and (WHERE_NOT_DUE, "").
    """
    verdicts: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for record, answer in zip(records, answers, strict=True):
        skill, verdict = record["skill"], (is_right(record, answer), record["chance"])
        keys = [(skill, record["language"]), (skill, ""), ("overall", "")]
        if skill == "declining":
            keys.append((WHERE_NOT_DUE if record["expect"] else WHERE_DUE, ""))
        for key in keys:
            verdicts.setdefault(key, []).append(verdict)
    return {
        key: Score(sum(v[0] for v in found), len(found), sum(v[1] for v in found) / len(found))
        for key, found in verdicts.items()
    }


def format_scorecard(scores: Mapping[str, Scores]) -> str:
    """A Markdown table of scores: skills and languages down; chance, and a column of each name.

    A score is followed by its 95 % interval.
    """
    first = next(iter(scores.values()))
    # Single languages first, then both, then all skills together.
    order = sorted(first, key=lambda key: (key == ("overall", ""), not key[1]))
    rows = [["skill", "language", "questions", "chance", *scores]]
    rows += [["---"] * 2 + ["---:"] * (len(scores) + 2)]
    for skill, language in order:
        score = first[skill, language]
        columns = [f"{100 * score.chance:.0f} %"]
        columns += [str(given[skill, language]) for given in scores.values()]
        rows.append([skill, LANGUAGES.get(language, "both"), str(score.asked), *columns])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_examples(records: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> str:
    """The middle question of each skill and language, and the answer to it."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault((record["skill"], record["language"]), []).append(i)
    lines = []
    for (skill, _), members in groups.items():
        i = members[len(members) // 2]
        mark = "+" if is_right(records[i], answers[i]) else "-"
        question = records[i]["conversations"][0]["content"]
        lines.append(f"{mark} {skill:<10} {question}  →  {' '.join(answers[i].split())}")
    return "\n".join(lines)
