"""Tell right answers to the questions of the sample's tests from wrong ones, and count them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def is_right(record: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer to a question of test.jsonl is right.

    A question that must be declined is answered right by any text with the words that mark a
    declining answer; any other question, never. Where there are choices, the answer must name the
    expected one and none besides, except what the question names. Where numbers are asked for,
    it must have them and no others; for a sum, which an answer may work out, as its last one. Where
    a style is wanted, whatever the answer says, it must end with one of the expected sentences.
    """
    expect = record["expect"]
    if record["skill"] == "style":
        return answer.rstrip().endswith(tuple(expect))
    if record["declined"] in answer or not expect:
        return record["declined"] in answer and not expect
    if record["choices"]:
        question = record["conversations"][0]["content"]
        named = _named(answer, record["choices"]) - _named(question, record["choices"])
        return named == set(expect)
    numbers = re.findall(r"\d+", answer)
    return (numbers[-1:] if record["skill"] == "sums" else numbers) == expect


def _named(text: str, choices: Sequence[str]) -> set[str]:
    """Which choices a text names; where one begins another, the longer."""
    longest_first = sorted(choices, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return set(re.findall(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", text))


def score_answers(
    records: Sequence[Mapping[str, Any]], answers: Sequence[str]
) -> dict[tuple[str, str], Score]:
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
