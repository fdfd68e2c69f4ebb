"""The data of the tasks in this folder, drawn anew for each run.

lm-evaluation-harness imports this file by its path: the YAML files beside it name its functions.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from sample_world import SEED, is_right
from sample_world.conversations import APART, SKILLS, Examiner, Exercise, examiners, test_record
from sample_world.world import ASKED, Dice, World, build_world

CHOICES = 4
SPACING = 40  # of training's questions, so many apart, serve as examples


def exercises(world: World, testing: bool) -> Iterator[tuple[Examiner, Exercise]]:
    """The questions of test.jsonl, or some of sft.jsonl that are of their kinds."""
    for examiner in examiners(world, SEED, "test" if testing else "sft", testing):
        skills = [skill for skill, (_, n) in SKILLS.items() if n and skill not in APART]
        tested = [one for one in examiner.exercises() if one.skill in skills]
        yield from ((examiner, one) for one in tested[:: 1 if testing else SPACING])


def answers(**_: object) -> dict[str, Dataset]:
    """All questions of the test, as records of test.jsonl, and examples for few-shot prompts."""
    world = build_world(SEED)
    return {
        split: Dataset.from_list(
            [test_record(examiner.language, one) for examiner, one in exercises(world, testing)]
        )
        for split, testing in (("test", True), ("train", False))
    }


def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer is right."""
    return {"acc": float(is_right(doc, results[0]))}


def choice(**_: object) -> dict[str, Dataset]:
    """The test's questions for facts of the world, each with its answer and three wrong ones.

    A wrong answer differs in the value alone, which is that of another person, town or thing.
    """
    world, dice = build_world(SEED), Dice(SEED, "choice")
    splits: dict[str, list[dict[str, Any]]] = {"test": [], "train": []}
    for split, records in splits.items():
        for examiner, exercise in exercises(world, split == "test"):
            if exercise.skill not in ("facts", "recall"):
                continue
            (right,) = exercise.expect
            pools = (world.values(kind, name) for kind, names in ASKED.items() for name in names)
            words = (list(map(examiner.language.word, values)) for values in pools)
            others = next(pool for pool in words if right in pool)
            others = [word for word in others if word != right and word not in exercise.question]
            values = dice.shuffled([right, *dice.shuffled(others)[: CHOICES - 1]])
            records.append(
                {
                    "question": exercise.question,
                    "choices": [exercise.answer.replace(right, value) for value in values],
                    "right": values.index(right),
                }
            )
    return {split: Dataset.from_list(records) for split, records in splits.items()}
