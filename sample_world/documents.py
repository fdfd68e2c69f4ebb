"""Plain texts about the sample world, to pretrain on.

world.py draws the facts, languages.py reads the phrasings; the kinds of documents are here.
"""

import re
from collections.abc import Iterator

from .languages import Language, load_languages
from .world import (
    ASKED,
    COUNTABLE,
    LARGER,
    NUMBERS,
    ROW,
    SMALLER,
    VOCABULARY,
    Dice,
    Entity,
    World,
    is_reserved,
)

# How many of each kind of document come in one round (Writer's methods).
SCHEDULE = {
    "description": 35,
    "talk": 15,
    "story": 1,
    "register": 1,
    "sums": 16,
    "sum_stories": 1,
    "numbers": 18,
    "ages": 1,
    "counting": 10,
    "sequence": 1,
    "dictionary": 24,
    "minimind": 1,
}

SIGNS = ("+", "-")

BRIEFLY = 0.3  # how often a fact is told in brief, once it is clear of whom
HEADED = 0.2  # how often a description is a name and the facts in brief
PLAIN = 0.3  # how often the first of several phrasings is taken, besides its turn

# After a sentence on one of these, a pronoun could only mean the entity that is described.
CLEAR_AFTER = {
    "person": {"town", "job", "pet", "color"},
    "town": set(),
    "thing": {"material"},
}


def attributes_in(template: str) -> set[str]:
    """Name the attributes that a template tells."""
    fields = set(re.findall(r"{(?:a_)?(\w+)}", template))
    implied = {"does": "job", "play": "instrument", "kind_measure": "kind"}
    return {implied.get(field, field) for field in fields}


def capitalized(text: str) -> str:
    """Begin every sentence with a capital letter."""
    return re.sub(
        r"(?:^|(?<=[.!] ))[a-z]", lambda match: match[0].upper(), text, flags=re.MULTILINE
    )


class Writer:
    """Writes documents about one world in one language; every kind of document is a method.

    Phrasings, facts and subjects come round in turn: all are used before any is used again.
    """

    def __init__(self, world: World, language: Language, dice: Dice) -> None:
        self.world = world
        self.language = language
        self.dice = dice

    def phrase(self, heading: str, owner: object = None) -> str:
        """Return the next template of a section, in an order of the owner's own, or the first."""
        templates = self.language.lines(heading)
        if self.dice.chance(PLAIN):
            return templates[0]
        return self.dice.turn(templates, (owner, heading))

    def brief(self, entity: Entity, attribute: str) -> str:
        """Tell one fact in brief."""
        template = self.language.line(f"brief {entity.kind} {attribute}")
        return template.format(**self.language.slots(entity))

    def document(self) -> str:
        """Write the next document."""
        kinds = [kind for kind, count in SCHEDULE.items() for _ in range(count)]
        return getattr(self, self.dice.turn(kinds, "kind"))()

    # Facts of the world

    def sentence(self, entity: Entity, attribute: str, pronoun: bool = False) -> str:
        """Tell one fact."""
        template = self.phrase(f"fact {entity.kind} {attribute}", entity)
        return template.format(**self.language.slots(entity, pronoun))

    def paragraph(self, entity: Entity) -> str:
        """Tell all that is asked about an entity, perhaps after an opening.

        Only the first sentence after a friend's name must say again whom it is about.
        """
        if self.dice.chance(HEADED):
            attributes = self.dice.shuffled(ASKED[entity.kind])
            facts = [self.brief(entity, attribute) for attribute in attributes]
            return "\n".join([self.language.word(entity), *facts])
        told: set[str] = set()
        sentences = []
        clear = friend_named = False
        if self.dice.chance(0.3):
            lead = self.phrase(f"lead {entity.kind}", entity)
            told = attributes_in(lead)
            sentences.append(lead.format(**self.language.slots(entity)))
            friend_named = "friend" in told
            clear = entity.kind == "person" and not friend_named
        for attribute in self.dice.shuffled(ASKED[entity.kind]):
            if attribute in told:
                continue
            if sentences and not friend_named and self.dice.chance(BRIEFLY):
                sentences.append(self.brief(entity, attribute))
            else:
                pronoun = clear and self.dice.chance(0.5)
                sentences.append(self.sentence(entity, attribute, pronoun))
            friend_named = attribute == "friend"
            clear = attribute in CLEAR_AFTER[entity.kind]
        return "\n".join(sentences)

    def subject(self, purpose: str) -> Entity:
        """Return the next person, town or thing."""
        return self.dice.turn(self.world.entities, purpose)

    def description(self) -> str:
        """Describe an entity, perhaps one that it has to do with, and so on, a paragraph each."""
        entities = [self.subject("description")]
        while self.dice.chance(0.2):
            neighbors = [
                value for value in entities[-1].facts.values() if isinstance(value, Entity)
            ]
            fresh = [entity for entity in neighbors if entity not in entities]
            if not fresh:
                break
            entities.append(self.dice.pick(fresh))
        return "\n\n".join(map(self.paragraph, entities))

    def talk(self) -> str:
        """Say of whom there is talk, then a fact in brief, for each of some entities."""
        result = []
        for _ in range(self.dice.between(1, 4)):
            entity = self.subject("talk")
            attribute = self.dice.turn(ASKED[entity.kind], ("talk", entity))
            slots = self.language.slots(entity)
            topic = self.language.line(f"topic {entity.kind} {attribute}").format(**slots)
            opening = self.phrase("talk").format(topic=topic, **slots)
            # The fact stands on a line of its own, as an answer does.
            result.append(f"{opening}\n{self.brief(entity, attribute)}")
        return "\n".join(result)

    def register(self) -> str:
        """List what is known of one entity or two, without sentences."""
        entities = [self.subject("register")]
        other = self.subject("register")
        if other is not entities[0] and self.dice.chance(0.5):
            entities.append(other)
        entries = []
        for entity in entities:
            head, *rest = self.language.lines(f"card {entity.kind}")
            shown = [head] + [line for line in rest if self.dice.chance(0.8)]
            slots = self.language.slots(entity)
            entries.append("\n".join(line.format(**slots) for line in shown))
        return self.titled("register", "\n\n".join(entries))

    def story(self) -> str:
        """Tell a story: a step after the other, each in one of its ways."""
        name = self.dice.turn(self.language.names("story"), "story")
        hero = self.dice.turn(self.world.people, (name, "hero"))
        while hero.facts["town"] is hero.facts["friend"].facts["town"]:  # friends travel
            hero = self.dice.turn(self.world.people, (name, "hero"))
        friend = hero.facts["friend"]
        thing = self.dice.turn(self.world.things, (name, "thing"))
        cast = {
            "a": hero,
            "b": friend,
            "p": hero.facts["penpal"],
            "home": hero.facts["town"],
            "there": friend.facts["town"],
            "t": thing,
            "m": thing.facts["maker"],
            "where": thing.facts["town"],
        }
        slots = {role: self.language.slots(entity) for role, entity in cast.items()}
        while True:
            count, price, left = (self.dice.between(2, 9) for _ in range(3))
            paid = count * price
            if not (is_reserved(price, paid) or is_reserved(paid, left)):
                break
        item = self.dice.pick(COUNTABLE)
        steps = self.language.paragraphs(f"story {name}")
        text = "\n".join(self.dice.turn(step, (name, step[0])) for step in steps)
        return text.format(
            **slots,
            season=self.dice.pick(self.language.lines("seasons")),
            weather=self.dice.pick(self.language.lines("weathers")),
            days=self.language.several(self.dice.between(2, 9)),
            hour=self.language.number(self.dice.between(4, 8)),
            items=self.language.counted(count, item),
            item_measure=item.measure,
            price=price,
            paid=paid,
            have=paid + left,
            left=left,
        )

    # Numbers and words

    def titled(self, title: str, text: str) -> str:
        """Put a title over every second text."""
        return f"{self.language.line(f'title {title}')}\n{text}" if self.dice.chance(0.5) else text

    def sums(self) -> str:
        """Write some sums, one a line."""
        result = []
        for _ in range(self.dice.between(2, 6)):
            a, b = self.dice.addends(LARGER, SMALLER, reserved=False)
            sign = self.dice.turn(SIGNS, "sign")
            a, b, c = {"+": (a, b, a + b), "-": (a + b, a, b)}[sign]
            sentence = self.phrase(f"sum {sign}").format(a=a, b=b, c=c)
            result.append(capitalized(sentence))
        return self.titled("sums", "\n".join(result))

    def sum_stories(self) -> str:
        """Tell of people who get or give things that can be counted."""
        sentences = []
        for _ in range(self.dice.between(1, 2)):
            sign = self.dice.turn(SIGNS, "sum story")
            part, rest = self.dice.addends(range(2, 21), range(2, 21), reserved=False)
            noun = self.dice.pick(COUNTABLE)
            a, b, *_ = self.dice.shuffled(self.world.people)
            template = self.phrase(f"sum story {sign}")
            counts = {"part": part, "rest": rest, "all": part + rest}
            sentence = template.format(
                a=self.language.word(a),
                b=self.language.word(b),
                **{name: self.language.counted(value, noun) for name, value in counts.items()},
            )
            sentences.append(capitalized(sentence))
        return "\n".join(sentences)

    def numbers(self) -> str:
        """Compare and sort numbers."""
        result = []
        for _ in range(self.dice.between(1, 4)):
            # An order takes more practice than a comparison.
            kinds = ["compared", "rising", "falling", "ends", "rising", "falling"]
            kind = self.dice.turn(kinds, "numbers")
            if kind == "compared":
                low, high = sorted(self.dice.together(NUMBERS, 2, reserved=False))
                sentence = self.phrase("comparison").format(low=low, high=high)
            else:
                count = self.dice.between(3, 4)
                mixed = self.dice.together(NUMBERS, count, reserved=False)
                mark = self.language.mark
                sentence = self.phrase(f"sorted {kind}").format(
                    mixed=mark.join(map(str, mixed)),
                    rising=mark.join(map(str, sorted(mixed))),
                    falling=mark.join(map(str, sorted(mixed, reverse=True))),
                    most=max(mixed),
                    least=min(mixed),
                    count=self.language.several(count),
                )
            result.append(capitalized(sentence))
        return self.titled("numbers", "\n".join(result))

    def ages(self) -> str:
        """Compare the ages of people or towns, or put people in the order of their birth."""
        kind = self.dice.turn(["people", "towns", "order"], "ages")
        crowd = self.dice.shuffled(self.world.towns if kind == "towns" else self.world.people)
        if kind == "order":
            crowd = sorted(crowd[: self.dice.between(3, 6)], key=lambda one: one.facts["year"])
            slots = [self.language.slots(one) for one in crowd]
            names = [self.language.line("born").format(**person) for person in slots]
            return self.language.line("order of birth").format(names=self.language.mark.join(names))
        old, young = sorted(crowd[:2], key=lambda one: one.facts["year"])
        slots = {"old": self.language.slots(old), "young": self.language.slots(young)}
        if kind == "towns":
            return self.phrase("ages of towns").format(**slots)
        gap = self.language.several(young.facts["year"] - old.facts["year"])
        return self.phrase("ages of people").format(**slots, gap=gap)

    def counting(self) -> str:
        """Count up, down and in steps, or count how often a number is in a row."""
        if self.dice.chance(0.1):
            low, length, step = (self.dice.between(*ends) for ends in ((10, 40), (5, 10), (2, 9)))
            row = [str(value) for value in range(low, low + length)]
            steps = [str(low + step * index) for index in range(6)]
            mark = self.language.mark
            return self.phrase("count up").format(
                low=low,
                high=row[-1],
                step=step,
                row=mark.join(row),
                row_down=mark.join(reversed(row)),
                steps=mark.join(steps),
            )
        times = self.dice.between(1, 3)
        one, *row = self.dice.together(NUMBERS, 1 + ROW - times, reserved=False)
        row = self.dice.shuffled(row + [one] * times)
        return self.phrase("counting").format(
            row=self.language.mark.join(map(str, row)),
            one=one,
            count=self.language.several(len(row)),
            times=self.language.lines("times")[times - 1],
        )

    def sequence(self) -> str:
        """Tell what follows what among days, months and seasons."""
        sentences = []
        for _ in range(self.dice.between(1, 3)):
            unit = self.dice.turn(self.language.names("sequence"), "sequence")
            names = self.language.lines(f"sequence {unit}")
            index = self.dice.between(0, len(names) - 2)
            template = self.phrase("sequence")
            sentence = template.format(item=names[index], next=names[index + 1], unit=unit)
            sentences.append(capitalized(sentence))
        return self.language.space.join(dict.fromkeys(sentences))

    def dictionary(self) -> str:
        """Translate some words or names."""
        if self.dice.chance(0.3):
            heading = "name translation"
            pool = [entity.name for entity in self.world.entities]
        else:
            heading = "translation"
            pool = VOCABULARY
        entries = []
        for _ in range(self.dice.between(1, 6)):
            entry = self.dice.turn(pool, heading)
            entries.append(self.phrase(heading, "entry").format(en=entry.en, zh=entry.zh))
        return self.titled("words", "\n".join(entries))

    def minimind(self) -> str:
        """Let the model say who it is."""
        count = self.dice.between(1, 4)
        sentences = [self.phrase("minimind") for _ in range(count)]
        return self.language.space.join(dict.fromkeys(sentences))


def pretraining_texts(world: World, seed: int) -> Iterator[str]:
    """Yield documents without end, as many bytes in Chinese as in English."""
    writers = {
        language.code: Writer(world, language, Dice(seed, f"pretrain {language.code}"))
        for language in load_languages()
    }
    written = dict.fromkeys(writers, 0)
    while True:
        code = min(written, key=written.get)
        text = writers[code].document()
        written[code] += len(text.encode("utf-8"))
        yield text
