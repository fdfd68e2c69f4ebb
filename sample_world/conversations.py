"""Questions about the sample world and small tasks, with answers: to tune on, to prefer, to test.

What is asked and answered is drawn here; how it is put into words is in ask_english.py and
ask_chinese.py. The test asks about entities and combinations that no training question has, in
wordings of its own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import factorial
from types import ModuleType
from typing import Any

from . import ask_chinese, ask_english, chinese, english
from .world import (
    ASKED,
    LARGER,
    NUMBERS,
    ROW,
    SMALLER,
    VOCABULARY,
    Dice,
    Entity,
    World,
    is_reserved,
    lines,
)

# How many questions of each skill, for each language: (in training, in the test).
SKILLS = {
    "facts": (600, 40),
    "recall": (0, 50),
    "sums": (1500, 40),
    "sorting": (600, 30),
    "counting": (800, 30),
    "comparing": (600, 30),
    "dictionary": (200, 24),
    "identity": (100, 10),
    "declining": (150, 30),
    "listing": (420, 0),
    "words": (450, 0),
}
MANNERS = 0.15  # of tuning's answers end kindly or curtly: what is never said cannot be preferred
PREFERENCES = (240, 60)  # pairs for each language: (in training, in the test)
ADAPTER = (60, 240)  # of an adapter's file, for each language: (who it is, all else)


@dataclass(frozen=True)
class Exercise:
    """A question and its answer, and how to tell a right answer from a wrong one.

    Attributes:
        skill: a key of SKILLS.
        question: what is asked.
        answer: a right answer.
        expect: what an answer must name; nothing if the question must be declined.
        choices: what it might name instead; empty where it names numbers.
        chance: probability of guessing right.
    """

    skill: str
    question: str
    answer: str
    expect: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    chance: float = 0.0


class Examiner:
    """Sets exercises about one world in one language; every skill is a method.

    Args:
        world: what is asked about.
        language: english or chinese.
        ask: ask_english or ask_chinese.
        dice: for all draws.
        testing: take wordings, entities and combinations of the test, else those of training.
    """

    def __init__(
        self, world: World, language: ModuleType, ask: ModuleType, dice: Dice, testing: bool
    ) -> None:
        self.world = world
        self.language = language
        self.ask = ask
        self.dice = dice
        self.testing = testing
        self.held_out_facts, self.asked_facts = self._facts(True), self._facts(False)
        word = language.word
        self.friends = {word(one): word(one.facts["friend"]) for one in world.people}
        # All that may be told: an answer that tells more than what was asked is not one.
        values = [v for kind, names in ASKED.items() for a in names for v in world.values(kind, a)]
        self.told = list(dict.fromkeys(map(word, values)))

    def wording(self, entry: Sequence[str], owner: object = None) -> str:
        """The next wording of an entry of the language's questions."""
        return self.dice.turn(lines(entry[self.testing]), (owner, entry[0]))

    def exercises(self) -> Iterator[Exercise]:
        """All exercises, skill after skill, none twice.

        Raises ValueError if SKILLS wants more of a skill than there are.
        """
        for skill, counts in SKILLS.items():
            seen: set[str] = set()
            for _ in range(20 * counts[self.testing]):
                exercise = self.put(getattr(self, skill)())
                if exercise.question not in seen:
                    seen.add(exercise.question)
                    yield exercise
                if len(seen) == counts[self.testing]:
                    break
            if len(seen) < counts[self.testing]:
                raise ValueError(f"there are only {len(seen)} different exercises in {skill}")

    # Questions about the world

    def _facts(self, held_out: bool) -> list[tuple[Entity, str]]:
        """Facts of entities that no training question is about, or of those that some are about.

        An answer in training names no entity that is held out.
        """
        return [
            (entity, attribute)
            for entity in self.world.entities
            if entity.held_out == held_out
            for attribute in ASKED[entity.kind]
            if held_out or not getattr(entity.facts[attribute], "held_out", False)
        ]

    def about(self, skill: str, entity: Entity, attribute: str) -> Exercise:
        """Ask for one fact."""
        wording = self.wording(self.ask.ABOUT[entity.kind][attribute], entity)
        slots = self.language.slots(entity)
        return Exercise(
            skill,
            wording.format(**slots),
            self.language.BRIEF[entity.kind][attribute].format(**slots),
            [slots[attribute]],
            self.told,
            1 / len(self.world.values(entity.kind, attribute)),
        )

    def facts(self) -> Exercise:
        """Ask about entities that training asks about too."""
        return self.about("facts", *self.dice.turn(self.asked_facts, "facts"))

    def recall(self) -> Exercise:
        """Ask about entities that only plain text tells of."""
        return self.about("recall", *self.dice.turn(self.held_out_facts, "recall"))

    def declining(self) -> Exercise:
        """Ask what the world does not say; in the test, every second time what it does say."""
        if self.testing and self.dice.turn([True, False], "told"):
            facts = self.dice.turn([self.held_out_facts, self.asked_facts], "told of whom")
            fact = self.dice.turn(facts, ("told", facts is self.asked_facts))
            return replace(self.about("declining", *fact), chance=0.5)
        entities = [e for e in self.world.entities if self.testing or not e.held_out]
        entity = self.dice.turn(entities, "untold")
        question = self.wording(self.ask.UNTOLD[entity.kind], entity.kind)
        slots = self.language.slots(entity)
        return Exercise("declining", question.format(**slots), self.ask.DECLINE, chance=0.5)

    # Numbers and words

    def sums(self) -> Exercise:
        """Ask for a sum or a difference."""
        a, b = self.dice.addends(LARGER, SMALLER, self.testing)
        if self.dice.turn([True, False], "sign"):
            entry, numbers = self.ask.ADD, (a, b, a + b)
        else:
            entry, numbers = self.ask.SUBTRACT, (a + b, a, b)
        slots = dict(zip("abc", map(str, numbers), strict=True))
        question, answer = self.wording(entry).format(**slots), entry[2].format(**slots)
        return Exercise("sums", question, answer, [slots["c"]], chance=1 / len(LARGER))

    def sorting(self) -> Exercise:
        """Ask for numbers in order."""
        mixed = self.dice.together(NUMBERS, self.dice.between(3, 4), self.testing)
        order = self.dice.turn(list(self.ask.SORT), "order")
        entry = self.ask.SORT[order]
        ordered = list(map(str, sorted(mixed, reverse=order == "falling")))
        mark = self.language.MARK
        question = self.wording(entry).format(mixed=mark.join(map(str, mixed)))
        answer = entry[2].format(ordered=mark.join(ordered))
        return Exercise("sorting", question, answer, ordered, chance=1 / factorial(len(mixed)))

    def comparing(self) -> Exercise:
        """Ask for the largest or smallest of some numbers."""
        mixed = self.dice.together(NUMBERS, self.dice.between(2, 4), self.testing)
        which = self.dice.turn(list(self.ask.COMPARE), "which")
        entry = self.ask.COMPARE[which]
        one = str(max(mixed) if which == "largest" else min(mixed))
        question = self.wording(entry).format(mixed=self.language.MARK.join(map(str, mixed)))
        answer = entry[2].format(one=one)
        return Exercise("comparing", question, answer, [one], chance=1 / len(mixed))

    def counting(self) -> Exercise:
        """Ask how often a number is in a row."""
        times = self.dice.turn([1, 2, 3], "times")
        one, *row = self.dice.together(NUMBERS, 1 + ROW - times, self.testing)
        row = self.language.MARK.join(map(str, self.dice.shuffled(row + [one] * times)))
        often = self.language.TIMES
        question = self.wording(self.ask.COUNT).format(one=one, row=row)
        answer = self.ask.COUNT[2].format(times=often[times])
        return Exercise("counting", question, answer, [often[times]], list(often.values()), 1 / 3)

    def dictionary(self) -> Exercise:
        """Ask for a word in the other language.

        The test asks for words in a direction in which training does not.
        """
        directions = {True: "to Chinese", False: "to English"}
        asked = [
            (entry, to_chinese)
            for entry in VOCABULARY
            for to_chinese, direction in directions.items()
            if is_reserved(entry.en, direction) == self.testing
        ]
        entry, to_chinese = self.dice.turn(asked, "word")
        phrases = self.ask.TO_CHINESE if to_chinese else self.ask.TO_ENGLISH
        choices = [word.zh if to_chinese else word.en for word in VOCABULARY]
        return Exercise(
            "dictionary",
            self.wording(phrases, entry.en).format(en=entry.en, zh=entry.zh),
            phrases[2].format(en=entry.en, zh=entry.zh),
            [entry.zh if to_chinese else entry.en],
            choices,
            1 / len(choices),
        )

    # Tuning asks nothing about a held-out entity, and nothing that has one of its values, or a word
    # of the test, for an answer. Were they in no other conversation either, it would teach never to
    # say them, and meet them in the test for the first time.

    def listing(self) -> Exercise:
        """Ask what there is of a kind."""
        kind = self.dice.turn(list(self.ask.KINDS), "listing")
        if kind == "thing":
            values = self.world.things
        else:
            owner = next(owner for owner, attributes in ASKED.items() if kind in attributes)
            values = self.world.values(owner, kind)
        names = list(map(self.language.word, values))
        drawn = self.dice.shuffled(names)[:4]
        while any(self.friends.get(name) in drawn for name in drawn):
            drawn = self.dice.shuffled(names)[:4]  # best friends side by side would tell a fact
        one, *listed = drawn
        return Exercise(
            "listing",
            self.wording(self.ask.LIST, kind).format(one=one, kinds=self.ask.KINDS[kind]),
            self.ask.LIST[2].format(listed=self.language.AND.join(listed)),
        )

    def words(self) -> Exercise:
        """Ask for any word of a language but one."""
        kind = self.dice.turn(list(self.ask.WORD_KINDS), "words")
        entry = self.dice.turn(VOCABULARY, ("words", kind))
        other = self.dice.pick([word for word in VOCABULARY if word is not entry])
        one = self.ask.QUOTED[kind].format(en=other.en, zh=other.zh)
        wording = self.dice.turn(lines(self.ask.ANOTHER_WORD), ("words", kind, "wording"))
        question = wording.format(one=one, kind=self.ask.WORD_KINDS[kind])
        # Chinese writes a space beside an English word, but none before a mark.
        question = re.sub(" (?=[，。？])", "", question)
        answer = {"en": self.ask.TO_ENGLISH, "zh": self.ask.TO_CHINESE}[kind][2]
        return Exercise("words", question, answer.format(en=entry.en, zh=entry.zh))

    # The model itself

    def identity(self, another: bool = False) -> Exercise:
        """Ask the model who it is, or who it is to become by an adapter."""
        answer = self.ask.ANOTHER_SELF if another else self.ask.WHO[2]
        name = self.ask.NAMES[another]
        return Exercise("identity", self.wording(self.ask.WHO), answer, [name], [*self.ask.NAMES])

    def put(self, exercise: Exercise) -> Exercise:
        """The exercise as it is asked: in training something may stand around the question."""
        if self.testing:
            return exercise
        around = self.dice.turn(lines(self.ask.AROUND), "around")
        return replace(exercise, question=around.format(q=exercise.question))

    def manners(self) -> tuple[str, str]:
        """The next kind and the next curt end of an answer."""
        blocks = (self.ask.KIND, self.ask.CURT)
        kind, curt = (self.dice.turn(lines(block), block) for block in blocks)
        return f"{self.language.SPACE}{kind}", f"{self.language.SPACE}{curt}"


def examiners(world: World, seed: int, purpose: str, testing: bool) -> dict[str, Examiner]:
    """An examiner for each language."""
    return {
        code: Examiner(world, language, ask, Dice(seed, f"{purpose} {code}"), testing)
        for code, language, ask in (
            ("en", english, ask_english),
            ("zh", chinese, ask_chinese),
        )
    }


def chat(*exercises: Exercise) -> list[dict[str, str]]:
    """The messages of a conversation that asks some exercises in turn."""
    return [
        {"role": role, "content": content}
        for exercise in exercises
        for role, content in (("user", exercise.question), ("assistant", exercise.answer))
    ]


def tuning_records(world: World, seed: int) -> list[dict[str, Any]]:
    """The conversations of sft.jsonl; one in five has several turns."""
    dice, manners = Dice(seed, "sft"), Dice(seed, "manners")
    conversations = []
    for examiner in examiners(world, seed, "sft", testing=False).values():
        exercises = [
            replace(exercise, answer=exercise.answer + manners.pick(examiner.manners()))
            if manners.chance(MANNERS)
            else exercise
            for exercise in dice.shuffled(list(examiner.exercises()))
        ]
        while exercises:
            turns = dice.between(2, 3) if dice.chance(0.2) else 1
            conversations.append(chat(*exercises[:turns]))
            exercises = exercises[turns:]
    return [{"conversations": messages} for messages in dice.shuffled(conversations)]


def test_record(code: str, examiner: Examiner, exercise: Exercise) -> dict[str, Any]:
    """A question of a test: a conversation of one turn, and what `scoring` needs."""
    return {
        "conversations": chat(exercise),
        "skill": exercise.skill,
        "language": code,
        "expect": exercise.expect,
        "choices": exercise.choices,
        "chance": exercise.chance,
        "declined": examiner.ask.DECLINED,
    }


def test_records(world: World, seed: int) -> list[dict[str, Any]]:
    """The questions of test.jsonl."""
    return [
        test_record(code, examiner, exercise)
        for code, examiner in examiners(world, seed, "test", testing=True).items()
        for exercise in examiner.exercises()
    ]


def preference_records(world: World, seed: int, testing: bool) -> list[dict[str, Any]]:
    """Pairs of dpo.jsonl or its test: an answer said kindly, and the same one curt or plain."""
    records = []
    for code, examiner in examiners(world, seed, f"dpo {testing}", testing).items():
        exercises = examiner.dice.shuffled(list(examiner.exercises()))
        for exercise in exercises[: PREFERENCES[testing]]:
            kind, curt = examiner.manners()
            end = examiner.dice.turn([curt, ""], "rejected")
            kindly = replace(exercise, skill="style", answer=exercise.answer + kind)
            kindly = replace(kindly, expect=lines(examiner.ask.KIND), choices=[], chance=0.0)
            prompt, chosen = chat(kindly)
            replies = {
                "chosen": [chosen],
                "rejected": [{**chosen, "content": exercise.answer + end}],
            }
            scored = test_record(code, examiner, kindly) if testing else {}
            records.append({"prompt": [prompt], **replies, **scored})
    return Dice(seed, "dpo").shuffled(records)


def adapter_records(world: World, seed: int, testing: bool) -> list[dict[str, Any]]:
    """Conversations of lora.jsonl or its test: another self, and in training all else as before."""
    records = []
    for code, examiner in examiners(world, seed, f"lora {testing}", testing).items():
        selves, others = ADAPTER
        if testing:
            asked = SKILLS["identity"][testing]
            exercises = [examiner.identity(another=True) for _ in range(asked)]
            records += [test_record(code, examiner, exercise) for exercise in exercises]
            continue
        rest = [e for e in examiner.exercises() if e.skill != "identity"]
        exercises = [examiner.put(examiner.identity(another=True)) for _ in range(selves)]
        exercises += examiner.dice.shuffled(rest)[:others]
        records += [{"conversations": chat(exercise)} for exercise in exercises]
    return records if testing else Dice(seed, "lora").shuffled(records)
