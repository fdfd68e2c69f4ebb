"""Questions about the sample world and small tasks, with answers: to tune on, to prefer, to test.

What is asked and answered is drawn here; languages.py reads the wordings. The test asks about
entities and combinations that no training question has, in wordings of its own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import factorial
from typing import Any

from .languages import Language, load_languages
from .tools import CALCULATOR, CLOCK, OFFERS, TOOLS
from .world import (
    ASKED,
    LARGE,
    LARGER,
    LONG_ROWS,
    NUMBERS,
    ROW,
    SMALLER,
    VOCABULARY,
    Dice,
    Entity,
    World,
    is_reserved,
)

# How many questions of each skill, for each language: (in training, in the test).
SKILLS = {
    "facts": (500, 150),
    "recall": (0, 150),
    "sums": (1300, 150),
    "sorting": (600, 150),
    "counting": (800, 150),
    "comparing": (500, 150),
    "dictionary": (300, 72),
    "identity": (100, 10),
    "declining": (150, 150),
    "small_talk": (220, 150),
    "typing": (1400, 150),
    "tools": (800, 150),
    "thinking": (450, 150),
    "listing": (420, 0),
    "words": (450, 0),
}
APART = ("tools", "thinking")  # in tests and a tuning file of their own
EXCHANGES = 10  # of the longest conversations in training
LONGEST = 0.4  # of the conversations have as many; the others have any number, all equally often
TOOLED, TOOL_EXCHANGES = 0.9, 7  # of questions for a tool, those where some are offered; with them
DIRECT = 1 / 3  # of the problems in training are answered without a thought
NO_THOUGHT, BRIEF_THOUGHT = 0.05, 0.05  # of all other answers say so, or that no steps are needed
OPERATIONS = {"sum +": "+", "sum -": "-", "product": "*"}  # of the calculator, by their headings
SMALL_TALK = ("hello", "thanks", "goodbye", "maker", "examples", "chatter")
# What can be amiss with a name in a question, and with the rest of it; the former more often.
NAME_SLIPS = [("misspelled", ""), ("misspelled", ""), ("foreign", "")]
MANNERS = 0.15  # of tuning's answers end kindly or curtly: what is never said cannot be preferred
PREFERENCES = (240, 60)  # pairs for each language: (in training, in the test)
ADAPTER = (60, 240)  # of an adapter's file, for each language: (who it is, all else)


@dataclass(frozen=True)
class Call:
    """A call of a tool, and what the tool answers."""

    name: str
    arguments: dict[str, str]
    result: str


@dataclass(frozen=True)
class Exercise:
    """A question and its answer, and how to tell a right answer from a wrong one.

    Attributes:
        skill: a key of SKILLS.
        question: text of the question.
        answer: a right answer.
        expect: what an answer must name; empty if the question must be declined.
        choices: what it might name instead; empty where it names numbers.
        chance: probability of guessing right.
        call: the call whose result the answer states.
        unaided: the answer where the tool of the call is not offered.
        offered: names of the tools that the test offers.
        thought: the steps to the answer; empty where it is given without, None where not said.
    """

    skill: str
    question: str
    answer: str
    expect: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    chance: float = 0.0
    call: Call | None = None
    unaided: str = ""
    offered: tuple[str, ...] = ()
    thought: str | None = None


class Examiner:
    """Sets exercises about one world in one language; every skill is a method.

    Args:
        world: what is asked about.
        language: language of the questions and answers.
        dice: source of all draws.
        testing: take wordings, entities and combinations of the test, else those of training.
    """

    def __init__(self, world: World, language: Language, dice: Dice, testing: bool) -> None:
        self.world = world
        self.language = language
        self.dice = dice
        self.testing = testing
        self.held_out_facts, self.asked_facts = self._facts(True), self._facts(False)
        word = language.word
        self.friends = {word(one): word(one.facts["friend"]) for one in world.people}
        # All that may be told: an answer that tells more than what was asked is not one.
        values = [v for kind, names in ASKED.items() for a in names for v in world.values(kind, a)]
        self.told = list(dict.fromkeys(map(word, values)))
        alone = [*NAME_SLIPS, *(("", slip) for slip in language.slips)]
        self.slips = [*alone, *((name, "bare") for name, _ in NAME_SLIPS)] if testing else alone

    def wording(self, question: str, owner: object = None) -> str:
        """The next wording of a question, in an order of the owner's own."""
        section = f"{'test' if self.testing else 'ask'} {question}"
        return self.dice.turn(self.language.lines(section), (owner, question))

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

    def about(
        self, skill: str, entity: Entity, attribute: str, called: str | None = None
    ) -> Exercise:
        """Ask for one fact of an entity, by its name or as it is `called`."""
        wording = self.wording(f"{entity.kind} {attribute}", entity)
        slots = self.language.slots(entity)
        return Exercise(
            skill,
            wording.format(**{**slots, "name": called or slots["name"]}),
            self.language.line(f"brief {entity.kind} {attribute}").format(**slots),
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
        question = self.wording(f"untold {entity.kind}")
        slots = self.language.slots(entity)
        answer = self.language.line("answer untold")
        return Exercise("declining", question.format(**slots), answer, chance=0.5)

    # Numbers and words

    def sums(self) -> Exercise:
        """Ask for a sum or a difference."""
        a, b = self.dice.addends(LARGER, SMALLER, self.testing)
        if self.dice.turn([True, False], "sign"):
            name, numbers = "sum +", (a, b, a + b)
        else:
            name, numbers = "sum -", (a + b, a, b)
        slots = dict(zip("abc", map(str, numbers), strict=True))
        question = self.wording(name).format(**slots)
        answer = self.language.line(f"answer {name}").format(**slots)
        return Exercise("sums", question, answer, [slots["c"]], chance=1 / len(LARGER))

    def sorting(self) -> Exercise:
        """Ask for numbers in order."""
        mixed = self.dice.together(NUMBERS, self.dice.between(3, 4), self.testing)
        order = self.dice.turn(["rising", "falling"], "order")
        ordered = list(map(str, sorted(mixed, reverse=order == "falling")))
        mark = self.language.mark
        question = self.wording(order).format(mixed=mark.join(map(str, mixed)))
        answer = self.language.line(f"answer {order}").format(ordered=mark.join(ordered))
        return Exercise("sorting", question, answer, ordered, chance=1 / factorial(len(mixed)))

    def comparing(self) -> Exercise:
        """Ask for the largest or smallest of some numbers."""
        mixed = self.dice.together(NUMBERS, self.dice.between(2, 4), self.testing)
        which = self.dice.turn(["largest", "smallest"], "which")
        one = str(max(mixed) if which == "largest" else min(mixed))
        question = self.wording(which).format(mixed=self.language.mark.join(map(str, mixed)))
        answer = self.language.line(f"answer {which}").format(one=one)
        return Exercise("comparing", question, answer, [one], chance=1 / len(mixed))

    def counting(self) -> Exercise:
        """Ask how often a number is in a row."""
        times = self.dice.turn([1, 2, 3], "times")
        one, *row = self.dice.together(NUMBERS, 1 + ROW - times, self.testing)
        row = self.language.mark.join(map(str, self.dice.shuffled(row + [one] * times)))
        choices = self.language.lines("times")
        often = choices[times - 1]
        question = self.wording("count").format(one=one, row=row)
        answer = self.language.line("answer count").format(times=often)
        return Exercise("counting", question, answer, [often], choices, 1 / 3)

    def dictionary(self) -> Exercise:
        """Ask for a word in the other language.

        The test asks for words in a direction in which training does not.
        """
        asked = [
            (entry, target)
            for entry in VOCABULARY
            for target, direction in (("zh", "to Chinese"), ("en", "to English"))
            if is_reserved(entry.en, direction) == self.testing
        ]
        entry, target = self.dice.turn(asked, "word")
        question = self.wording(target, entry.en).format(en=entry.en, zh=entry.zh)
        answer = self.language.line(f"answer {target}").format(en=entry.en, zh=entry.zh)
        choices = [getattr(word, target) for word in VOCABULARY]
        expect = [getattr(entry, target)]
        return Exercise("dictionary", question, answer, expect, choices, 1 / len(choices))

    # Tuning asks nothing about a held-out entity, and nothing that has one of its values, or a word
    # of the test, for an answer. Were they in no other conversation either, it would teach never to
    # say them, and meet them in the test for the first time.

    def listing(self) -> Exercise:
        """Ask what there is of a kind."""
        kind = self.dice.turn(self.language.names("kinds"), "listing")
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
        kinds = self.language.line(f"kinds {kind}")
        question = self.wording("list", kind).format(one=one, kinds=kinds)
        answer = self.language.line("answer list")
        return Exercise(
            "listing", question, answer.format(listed=self.language.conjunction.join(listed))
        )

    def words(self) -> Exercise:
        """Ask for any word of a language but one."""
        code = self.dice.turn(["en", "zh"], "words")
        entry = self.dice.turn(VOCABULARY, ("words", code))
        other = self.dice.pick([word for word in VOCABULARY if word is not entry])
        question = self.wording("another word", code).format(
            one=self.language.quoted(other, code), kind=self.language.line(f"word {code}")
        )
        # Chinese writes a space beside an English word, but none before a mark.
        question = re.sub(" (?=[，。？])", "", question)
        answer = self.language.line(f"answer {code}")
        return Exercise("words", question, answer.format(en=entry.en, zh=entry.zh))

    # The model itself

    def identity(self, another: bool = False) -> Exercise:
        """Ask the model who it is, or who it is to become by an adapter."""
        answer = self.language.line("answer another identity" if another else "answer identity")
        names = self.language.lines("names")
        return Exercise("identity", self.wording("identity"), answer, [names[another]], names)

    # As people type

    def small_talk(self) -> Exercise:
        """Greet, thank, leave, ask who made the model or what it can be asked, or just chat.

        What just chats must be declined.
        """
        topic = self.dice.turn(SMALL_TALK, "topic")
        slip = self.dice.turn(["", *self.language.slips], ("slip", topic))
        question = self.language.slip(self.wording(topic), slip)
        answers = self.language.lines(f"answer {topic}")
        expect = [] if topic == "chatter" else answers
        answer, chance = self.dice.turn(answers, topic), 1 / len(SMALL_TALK)
        return Exercise("small_talk", question, answer, expect, chance=chance)

    def typing(self) -> Exercise:
        """Ask with a name misspelled or in the other language, in lower case, or with other marks.

        The test has misspellings of its own, and also questions with two slips.
        """
        name, slip = self.dice.turn(self.slips, "slips")
        if name:
            entity, attribute = self.dice.turn(self.asked_facts, name)
            while (
                name == "misspelled" and entity.kind == "thing"
            ):  # whose names may be several words
                entity, attribute = self.dice.turn(self.asked_facts, name)
            called = entity.name.zh if self.language.code == "en" else entity.name.en
            if name == "misspelled":
                forms = self.language.misspellings(self.language.word(entity))
                held_out = forms[::4]
                forms = held_out if self.testing else [f for f in forms if f not in held_out]
                called = self.dice.turn(forms, (name, entity))
            exercise = self.about("typing", entity, attribute, called)
        else:
            skills = ["facts", "sums", "sorting", "comparing", "dictionary"]
            exercise = getattr(self, self.dice.turn(skills, slip))()
            if exercise.skill == "sums":  # elsewhere all numbers of an answer count
                exercise = replace(exercise, expect=re.findall(r"\d+", exercise.answer))
        question = self.language.slip(exercise.question, slip)
        return replace(exercise, skill="typing", question=question)

    # Tools

    def tools(self) -> Exercise:
        """Ask what a tool answers; in the test, also what none of those offered does, or need do.

        The test offers tools that fit, more than that, or only one that does not.
        """
        kinds = ["number"] * 9 + ["time"]
        if self.testing:
            kinds = ["number"] * 6 + ["time", "misfit", "known", "known"]
        kind = self.dice.turn(kinds, "tools")
        if kind == "known":
            exercise = getattr(self, self.dice.turn(["facts", "sums", "comparing"], "known"))()
            return replace(exercise, skill="tools", offered=self.dice.turn(OFFERS, "known offers"))
        exercise = self.time() if kind == "time" else self.large_numbers()
        if kind == "misfit":
            return replace(
                exercise, answer=exercise.unaided, expect=[], call=None, offered=(CLOCK,)
            )
        offers = [offer for offer in OFFERS if exercise.call.name in offer]
        return replace(exercise, offered=self.dice.turn(offers, ("offers", kind)))

    def large_numbers(self) -> Exercise:
        """Ask for a sum, a difference or a product that nobody knows by heart."""
        name = self.dice.turn(["sum +", "sum +", "sum -", "product"], "operation")
        a, b = self.dice.addends(LARGE, LARGE, self.testing)
        if name == "sum -":
            a, b = max(a, b), min(a, b)
        c = {"sum +": a + b, "sum -": a - b, "product": a * b}[name]
        slots = dict(zip("abc", map(str, (a, b, c)), strict=True))
        expression = f"{a} {OPERATIONS[name]} {b}"
        return Exercise(
            "tools",
            self.wording(name).format(**slots),
            self.language.line(f"answer {name}").format(**slots),
            [slots["c"]],
            call=Call(CALCULATOR, {"expression": expression}, slots["c"]),
            unaided=self.language.line("answer large"),
        )

    def time(self) -> Exercise:
        """Ask for the time."""
        hour, minute = self.dice.between(0, 23), self.dice.between(0, 59)
        time = f"{hour:02}:{minute:02}"
        return Exercise(
            "tools",
            self.wording("time"),
            self.language.line("answer time").format(time=time),
            time.split(":"),
            call=Call(CLOCK, {}, time),
            unaided=self.language.line("answer chatter"),
        )

    # Problems of several steps

    def thinking(self) -> Exercise:
        """Ask for what takes two to six steps, some of them in training without a thought."""
        kinds = [self.chain] * 4 + [self.long_row] * 2 + [self.two_facts] * 3
        kinds = [self.chain, self.long_row, self.two_facts] if self.testing else kinds
        problem = self.dice.turn(kinds, "problem")
        exercise = problem()
        if not self.testing and self.dice.chance(DIRECT):
            exercise = replace(exercise, thought="")
        return exercise

    def chain(self) -> Exercise:
        """Ask for a sum of three to five numbers.

        In training, no step is a sum that the test asks for.
        """
        while True:
            value = self.dice.pick(LARGER)
            text, parts, steps = str(value), [value], []
            for _ in range(self.dice.between(2, 4)):
                part, adds = self.dice.pick(SMALLER), self.dice.chance(0.5)
                sign, after = ("+", value + part) if adds else ("-", value - part)
                steps.append((min(value, after), part, f"{value} {sign} {part} = {after}"))
                text += f" {sign} {part}"
                parts.append(part if adds else -part)
                value = after
            known = all(low in LARGER for low, _, _ in steps)
            tested = any(is_reserved(low, part) for low, part, _ in steps)
            if known and is_reserved(*parts) == self.testing and (self.testing or not tested):
                break
        return Exercise(
            "thinking",
            self.wording("chain").format(chain=text),
            self.language.line("answer chain").format(c=value),
            [str(value)],
            chance=1 / len(LARGER),
            thought="\n".join(line for _, _, line in steps),
        )

    def long_row(self) -> Exercise:
        """Ask for five to seven numbers in order, the next of which each step takes away.

        In training, what remains is no row of the test.
        """
        order = self.dice.turn(["rising", "falling"], "long order")
        while True:
            mixed = self.dice.together(NUMBERS, self.dice.pick(LONG_ROWS), self.testing)
            ordered = sorted(mixed, reverse=order == "falling")
            rests = [ordered[i:] for i in range(len(ordered) - 1)]
            if self.testing or not any(is_reserved(*rest) for rest in rests):
                break
        mark = self.language.mark
        steps = [
            f"{one}: {mark.join(str(n) for n in mixed if n in ordered[i + 1 :])}"
            for i, one in enumerate(ordered[:-1])
        ]
        written = list(map(str, ordered))
        return Exercise(
            "thinking",
            self.wording(order, "long").format(mixed=mark.join(map(str, mixed))),
            self.language.line(f"answer {order}").format(ordered=mark.join(written)),
            written,
            chance=1 / factorial(len(mixed)),
            thought="\n".join(steps),
        )

    def two_facts(self) -> Exercise:
        """Ask for a fact of somebody or something that another fact leads to.

        The test asks along ways that training does not; no way leads by who or what is held out.
        """
        ways = []
        for heading in self.language.names("way"):
            kind, first, second = heading.split()
            backwards = kind == "town"  # from what it has to the town, and to who lives there
            for entity in self.world.entities:
                if entity.kind != kind or entity.held_out:
                    continue
                if backwards:
                    (other,) = (p for p in self.world.people if p.facts["town"] is entity)
                    value = other
                else:
                    other = entity.facts[first]
                    value = other.facts[second]
                if other.held_out or getattr(value, "held_out", False) or value is entity:
                    continue
                if is_reserved(entity.name.en, first, second) == self.testing:
                    ways.append((heading, entity, other, value))
        heading, entity, other, value = self.dice.turn(ways, "ways")
        kind, first, second = heading.split()
        slots = {"name": self.language.word(entity), "other": self.language.word(other)}
        slots |= {"value": self.language.word(value), "first": self.language.slots(entity)[first]}
        return Exercise(
            "thinking",
            self.wording(f"way {heading}", entity).format(**slots),
            self.language.line("answer way").format(**slots),
            [slots["value"]],
            self.told,
            1 / len(self.world.people),
            thought=self.language.line(f"way {heading}").format(**slots),
        )

    def put(self, exercise: Exercise) -> Exercise:
        """The exercise as it is asked: in training something may stand around the question."""
        if self.testing or exercise.skill == "small_talk":
            return exercise
        around = self.dice.turn(self.language.lines("around"), "around")
        return replace(exercise, question=around.format(q=exercise.question))

    def manners(self) -> tuple[str, str]:
        """The next kind and the next curt end of an answer."""
        kind, curt = (self.dice.turn(self.language.lines(name), name) for name in ("kind", "curt"))
        return f"{self.language.space}{kind}", f"{self.language.space}{curt}"


def examiners(world: World, seed: int, purpose: str, testing: bool) -> list[Examiner]:
    """An examiner for each language."""
    return [
        Examiner(world, language, Dice(seed, f"{purpose} {language.code}"), testing)
        for language in load_languages()
    ]


def chat(*exercises: Exercise, offered: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The messages of a conversation that asks some exercises in turn, with some tools offered."""
    messages = []
    for exercise in exercises:
        messages.append({"role": "user", "content": exercise.question})
        answer = {"role": "assistant", "content": exercise.answer}
        if exercise.thought is not None:
            answer["reasoning_content"] = exercise.thought
        call = exercise.call
        if call and call.name in offered:
            calls = [{"name": call.name, "arguments": call.arguments}]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            messages.append({"role": "tool", "content": call.result})
        elif call:
            answer["content"] = exercise.unaided
        messages.append(answer)
    return messages


def conversation(*exercises: Exercise, offered: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a conversation; see `chat`."""
    record: dict[str, Any] = {"conversations": chat(*exercises, offered=offered)}
    if offered:
        record["tools"] = [TOOLS[name] for name in offered]
    return record


def tuning_records(world: World, seed: int, apart: bool = False) -> list[dict[str, Any]]:
    """The conversations of sft.jsonl, in which skills and languages change from turn to turn.

    With the skills that are `apart` they are those of sft_tools.jsonl.
    """
    dice, manners, thoughts = (Dice(seed, name) for name in ("sft", "manners", "thoughts"))
    exercises = []
    for examiner in examiners(world, seed, "sft", testing=False):
        for exercise in examiner.exercises():
            if exercise.skill in APART:
                exercises += [exercise] if apart else []
                continue
            if exercise.skill != "small_talk" and manners.chance(MANNERS):
                end = manners.pick(examiner.manners())
                exercise = replace(exercise, answer=exercise.answer + end)
            if apart and thoughts.chance(NO_THOUGHT + BRIEF_THOUGHT):
                brief = examiner.language.line("no steps")
                thought = thoughts.pick(["", brief])
                exercise = replace(exercise, thought=thought)
            exercises.append(exercise)
    asking, others = [], []  # for a tool that is offered, and all else
    for exercise in dice.shuffled(exercises):
        (asking if exercise.call and dice.chance(TOOLED) else others).append(exercise)
    conversations = []
    while asking:
        turns = dice.between(1, TOOL_EXCHANGES)
        calls = min(turns, dice.between(1, 3))
        exercises = dice.shuffled(asking[:calls] + others[: turns - calls])
        conversations.append(conversation(*exercises, offered=dice.turn(OFFERS, "offers")))
        del asking[:calls], others[: turns - calls]
    while others:
        turns = EXCHANGES if dice.chance(LONGEST) else dice.between(1, EXCHANGES)
        conversations.append(conversation(*others[:turns]))
        del others[:turns]
    return dice.shuffled(conversations)


def history_questions(world: World, seed: int, conversations: int) -> list[list[str]]:
    """Questions to ask before one of the test's: a list of EXCHANGES - 1 for each conversation.

    They are of training's kinds and wordings, drawn anew, in both languages; none is of a test.
    """
    pools = [list(e.exercises()) for e in examiners(world, seed, "history", testing=False)]
    exercises = Dice(seed, "history").shuffled([one for pool in pools for one in pool])
    questions = [exercise.question for exercise in exercises]
    size = EXCHANGES - 1
    return [questions[i * size : (i + 1) * size] for i in range(conversations)]


def test_record(language: Language, exercise: Exercise) -> dict[str, Any]:
    """A question of a test: a conversation of one turn, and what `scoring` needs."""
    return {
        **conversation(exercise, offered=exercise.offered),
        "skill": exercise.skill,
        "language": language.code,
        "expect": exercise.expect,
        "choices": exercise.choices,
        "chance": exercise.chance,
        "declined": language.line("declined"),
    }


def test_records(world: World, seed: int, apart: str = "") -> list[dict[str, Any]]:
    """The questions of test.jsonl, or of the test of a skill `apart`.

    The first of each skill and language comes first, then the second, and on. So the beginning of
    the file is a test of everything, too.
    """
    asked: Counter[tuple[str, str]] = Counter()
    numbered = []
    for examiner in examiners(world, seed, "test", testing=True):
        for exercise in examiner.exercises():
            if apart != (exercise.skill if exercise.skill in APART else ""):
                continue
            kind = (exercise.skill, examiner.language.code)
            numbered.append((asked[kind], test_record(examiner.language, exercise)))
            asked[kind] += 1
    return [record for _, record in sorted(numbered, key=lambda entry: entry[0])]


def preference_records(world: World, seed: int, testing: bool) -> list[dict[str, Any]]:
    """Pairs of dpo.jsonl or its test: an answer said kindly, and the same one curt or plain."""
    records = []
    for examiner in examiners(world, seed, f"dpo {testing}", testing):
        exercises = examiner.dice.shuffled(list(examiner.exercises()))
        unlike = ("small_talk", *APART)
        exercises = [exercise for exercise in exercises if exercise.skill not in unlike]
        for exercise in exercises[: PREFERENCES[testing]]:
            kind, curt = examiner.manners()
            end = examiner.dice.turn([curt, ""], "rejected")
            kindly = replace(exercise, skill="style", answer=exercise.answer + kind)
            kindly = replace(kindly, expect=examiner.language.lines("kind"), choices=[], chance=0.0)
            prompt, chosen = chat(kindly)
            replies = {
                "chosen": [chosen],
                "rejected": [{**chosen, "content": exercise.answer + end}],
            }
            scored = test_record(examiner.language, kindly) if testing else {}
            records.append({"prompt": [prompt], **replies, **scored})
    return Dice(seed, "dpo").shuffled(records)


def adapter_records(world: World, seed: int, testing: bool) -> list[dict[str, Any]]:
    """Conversations of lora.jsonl or its test: another self, and in training all else as before."""
    records = []
    for examiner in examiners(world, seed, f"lora {testing}", testing):
        selves, others = ADAPTER
        if testing:
            asked = SKILLS["identity"][testing]
            exercises = [examiner.identity(another=True) for _ in range(asked)]
            records += [test_record(examiner.language, exercise) for exercise in exercises]
            continue
        rest = [e for e in examiner.exercises() if e.skill not in ("identity", *APART)]
        exercises = [examiner.put(examiner.identity(another=True)) for _ in range(selves)]
        exercises += examiner.dice.shuffled(rest)[:others]
        records += [{"conversations": chat(exercise)} for exercise in exercises]
    return records if testing else Dice(seed, "lora").shuffled(records)
