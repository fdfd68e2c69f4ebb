"""The invented world that the sample data describes: people, towns, things and their facts.

Everything has a name in English and in Chinese (templates/words.txt). The facts are drawn once from
a seed and never contradicted; languages.py puts them into words.
"""

import random
import re
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

TEMPLATES = Path(__file__).parent / "templates"

Item = TypeVar("Item")


class Dice:
    """Random draws that are the same on every platform and Python version.

    Only Random.random() is used: Python promises its sequence for a seed, but not that of
    shuffle, sample or choice. Each purpose has a sequence of its own.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._random = random.Random((seed << 32) + zlib.crc32(purpose.encode("utf-8")))
        self._decks: dict[Hashable, list] = {}

    def between(self, low: int, high: int) -> int:
        """Draw an integer, both ends included."""
        return low + int(self._random.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """Draw True with the given probability."""
        return self._random.random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """Draw one item."""
        return items[self.between(0, len(items) - 1)]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return the items in a drawn order (Fisher-Yates)."""
        deck = list(items)
        for last in range(len(deck) - 1, 0, -1):
            other = self.between(0, last)
            deck[last], deck[other] = deck[other], deck[last]
        return deck

    def turn(self, items: Sequence[Item], purpose: Hashable) -> Item:
        """Return the next of the items in a drawn order that is kept for this purpose.

        So all are used before any is used again.
        """
        deck = self._decks.setdefault(purpose, [])
        if not deck:
            deck += self.shuffled(items)
        return deck.pop()

    def addends(
        self, first: Sequence[int], second: Sequence[int], reserved: bool
    ) -> tuple[int, int]:
        """Draw two numbers to add, or to take away from their sum; see `is_reserved`."""
        while True:
            a, b = self.pick(first), self.pick(second)
            if is_reserved(a, b) == reserved:
                return a, b

    def together(self, numbers: Sequence[int], count: int, reserved: bool) -> list[int]:
        """Draw different numbers for one row; see `is_reserved`."""
        while True:
            drawn = self.shuffled(numbers)[:count]
            if is_reserved(*drawn) == reserved:
                return drawn


@dataclass(frozen=True)
class Word:
    """A word in both languages, with what a sentence about it needs besides.

    `measure` is the Chinese measure word, or for an instrument the verb of playing it; `plural` is
    English; `en_does` and `zh_does` tell what someone of a trade does.
    """

    en: str
    zh: str
    measure: str = ""
    plural: str = ""
    en_does: str = ""
    zh_does: str = ""


@dataclass(eq=False)
class Entity:
    """A person, a town or a thing: its name and what is true of it.

    A fact's value is a word, a year, or another entity. No training question is about a
    `held_out` one: what is known of it, a model can only have read in plain text.
    """

    kind: str
    name: Word
    facts: dict[str, "Word | int | Entity"] = field(default_factory=dict)
    female: bool = False
    held_out: bool = False


@dataclass(frozen=True)
class World:
    """All entities of one seed."""

    people: list[Entity]
    towns: list[Entity]
    things: list[Entity]

    @property
    def entities(self) -> list[Entity]:
        """All of them."""
        return self.people + self.towns + self.things

    def values(self, kind: str, attribute: str) -> list["Word | int | Entity"]:
        """Every value that this attribute has for some entity of a kind."""
        facts = [e.facts[attribute] for e in self.entities if e.kind == kind]
        return list(dict.fromkeys(facts))


def is_reserved(*parts: object) -> bool:
    """Whether numbers or words are combined like this in the test alone, in whatever order."""
    key = " ".join(sorted(map(str, parts)))
    return zlib.crc32(key.encode("utf-8")) % 6 == 0


def read_sections(path: Path) -> dict[str, list[list[str]]]:
    """Read a file of `[heading]` lines, each followed by its lines.

    Lines that begin with `#` are comments; `\\n` within a line stands for a line break.

    Returns:
        By heading, the paragraphs that blank lines part, each a list of lines.
    """
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    _, *parts = re.split(r"^\[(.+)\]\n", text, flags=re.MULTILINE)
    return {
        heading: [
            [line.replace("\\n", "\n") for line in paragraph.splitlines()]
            for paragraph in re.split(r"\n{2,}", body.strip())
        ]
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def read_words(path: Path) -> dict[str, list[Word]]:
    """Read a file of tables of words, each under a heading `[name: column, …]`."""
    tables = {}
    for heading, (rows,) in read_sections(path).items():
        name, _, columns = heading.partition(": ")
        fields = columns.split(", ")
        tables[name] = [Word(**dict(zip(fields, row.split(" | "), strict=True))) for row in rows]
    return tables


# What training and tests ask about, and most of the text is about; the rest is there for stories.
ASKED = {
    "person": ("town", "job", "pet", "color", "friend"),
    "town": ("goods", "landmark"),
    "thing": ("material", "town"),
}
LARGER, SMALLER = range(10, 51), range(1, 10)  # what is added, or what remains and is taken away
LARGE = range(100, 10000)  # what a calculator adds and multiplies
NUMBERS = range(1, 10)  # what is sorted, compared and counted
ROW = 4  # numbers in a row to count in
LONG_ROWS = (5, 6, 7)  # numbers in a row to sort in steps

WORDS = read_words(TEMPLATES / "words.txt")
COUNTABLE = WORDS["countable"]  # small things to count, with their plurals


def _vocabulary() -> list[Word]:
    """The words of the dictionary: no word twice, in neither language."""
    english, chinese = set(), set()
    entries = []
    for entry in WORDS["everyday"] + COUNTABLE:
        if entry.en not in english and entry.zh not in chinese:
            english.add(entry.en)
            chinese.add(entry.zh)
            entries.append(entry)
    return entries


VOCABULARY = _vocabulary()


def build_world(seed: int) -> World:
    """Draw who lives where, does what and knows whom, and where every thing is and who made it."""
    dice = Dice(seed, "world")
    towns = [Entity("town", name) for name in WORDS["towns"]]
    people = [Entity("person", name, female=True) for name in WORDS["women"]]
    people += [Entity("person", name) for name in WORDS["men"]]
    things = [Entity("thing", name) for name in WORDS["things"]]

    def assign(entities: list[Entity], attribute: str, values: Sequence) -> None:
        """Give each entity a value of its own."""
        drawn = dice.shuffled(values)[: len(entities)]
        for entity, value in zip(entities, drawn, strict=True):
            entity.facts[attribute] = value

    assign(people, "town", towns)
    assign(people, "job", WORDS["jobs"])
    assign(people, "pet", WORDS["pets"])
    assign(people, "instrument", WORDS["instruments"])
    assign(people, "color", WORDS["colors"])
    assign(people, "dish", WORDS["dishes"])
    assign(people, "year", range(1903, 2003, 2))  # no two of one age, nor one year apart
    pairs = dice.shuffled(people)
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        one.facts["friend"], other.facts["friend"] = other, one
    # Everyone writes to the next in a circle in which no two best friends stand side by side.
    circle = pairs[::2] + pairs[1::2]
    for one, other in zip(circle, circle[1:] + circle[:1], strict=True):
        one.facts["penpal"] = other

    assign(towns, "river", WORDS["rivers"])
    assign(towns, "goods", WORDS["goods"])
    assign(towns, "landmark", WORDS["landmarks"])
    assign(towns, "year", range(1120, 1880, 7))

    assign(things, "kind", WORDS["kinds"])
    assign(things, "material", WORDS["materials"])
    assign(things, "maker", people)
    assign(things, "town", towns)
    # Best friends together: a question about one would tell of the other.
    for entity in [*pairs[:6], *dice.shuffled(towns)[:5], *dice.shuffled(things)[:5]]:
        entity.held_out = True
    return World(people, towns, things)
