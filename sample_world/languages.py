"""English and Chinese: templates for texts and questions, and the grammar that fills them.

The templates are in templates/*.txt, under the same headings for both languages. What is amiss in
questions as people type them is here too.
"""

from .world import TEMPLATES, WORDS, Entity, Word, read_sections


class Language:
    """One language: its templates, and what `str.format` puts into them.

    Attributes:
        code: "en" or "zh".
        name: what the names of its files in templates/ begin with.
        space: stands between two sentences.
        mark: stands between the entries of a list.
        conjunction: stands between two entries, as "and".
        slips: what people do to a question as they type it; see `slip`.
        widths: marks, each with the one of the other language's width that may take its place.
    """

    code: str
    name: str
    space: str
    mark: str
    conjunction: str
    slips: tuple[str, ...]
    widths: dict[str, str]

    def __init__(self) -> None:
        self._sections = read_sections(TEMPLATES / f"{self.name}.txt")
        self._sections |= read_sections(TEMPLATES / f"{self.name}_questions.txt")

    @property
    def headings(self) -> list[str]:
        """The headings of all sections, in the order of the files."""
        return list(self._sections)

    def paragraphs(self, heading: str) -> list[list[str]]:
        """The lines of a section, grouped into paragraphs."""
        return self._sections[heading]

    def lines(self, heading: str) -> list[str]:
        """The lines of a section."""
        return [line for paragraph in self._sections[heading] for line in paragraph]

    def line(self, heading: str) -> str:
        """The only line of a section."""
        (line,) = self.lines(heading)
        return line

    def names(self, group: str) -> list[str]:
        """The names of all sections whose heading is `group name`, in the file's order."""
        prefix = f"{group} "
        return [text.removeprefix(prefix) for text in self.headings if text.startswith(prefix)]

    def word(self, value: Word | int | Entity) -> str:
        """Name a fact's value."""
        if isinstance(value, Entity):
            value = value.name
        return getattr(value, self.code) if isinstance(value, Word) else str(value)

    def number(self, value: int) -> str:
        """Spell a number from 0 to 99."""
        raise NotImplementedError

    def several(self, value: int) -> str:
        """Spell a number of things, as it stands before their name."""
        return self.number(value)

    def counted(self, value: int, noun: Word) -> str:
        """Spell a number of things, two or more, with their name."""
        raise NotImplementedError

    def quoted(self, entry: Word, code: str) -> str:
        """Quote a word of the language `code` within a sentence of this one."""
        raise NotImplementedError

    def slip(self, text: str, kind: str) -> str:
        """A question as people type it.

        Args:
            text: the question.
            kind: "lower" for lower case, "bare" without the last mark, "width" with marks of the
                other language's width; any other leaves the text as it is.
        """
        if kind == "lower":
            return text.lower()
        if kind == "bare":
            return text.rstrip(".?!。？！")
        return text.translate(str.maketrans(self.widths)) if kind == "width" else text

    def misspellings(self, name: str) -> list[str]:
        """Ways to write a name with one mistake, none of them a name or another word."""
        raise NotImplementedError

    def slots(self, entity: Entity, pronoun: bool = False) -> dict[str, str]:
        """What a template may say about an entity.

        Args:
            entity: person, town or thing.
            pronoun: put a pronoun where the template allows one, instead of the name.
        """
        raise NotImplementedError


class English(Language):
    """English."""

    code, name = "en", "english"
    space, mark, conjunction = " ", ", ", " and "
    slips = ("lower", "bare", "width")
    widths = dict(zip("?!.,:", "？！。，：", strict=True))

    ONES = (
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
        *("eighteen", "nineteen"),
    )
    TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

    def number(self, value: int) -> str:
        """Spell a number from 0 to 99."""
        if value < 20:
            return self.ONES[value]
        tens, ones = divmod(value, 10)
        return self.TENS[tens - 2] + (f"-{self.ONES[ones]}" if ones else "")

    def counted(self, value: int, noun: Word) -> str:
        """Spell a number of things, two or more, with their name."""
        return f"{self.number(value)} {noun.plural}"

    def quoted(self, entry: Word, code: str) -> str:
        """Quote a word of the language `code`: English leaves it as it is."""
        return getattr(entry, code)

    def misspellings(self, name: str) -> list[str]:
        """A letter is missing, doubled, or has changed places with the next; the first stays."""
        forms = {swapped(name, i) for i in range(1, len(name) - 1)}
        for i in range(1, len(name)):
            forms |= {name[:i] + name[i + 1 :], name[: i + 1] + name[i:]}
        return sorted(forms - {name})

    def slots(self, entity: Entity, pronoun: bool = False) -> dict[str, str]:
        """What a template may say about an entity; see templates/english.txt."""
        if entity.kind == "person":
            he, his, him = ("she", "her", "her") if entity.female else ("he", "his", "him")
        else:
            he, his, him = "it", "its", "it"
        name = entity.name.en
        who, whose, whom = (he, his, him) if pronoun else (name, f"{name}'s", name)
        filled = {"he": he, "his": his, "who": who, "whose": whose}
        filled |= {key.capitalize(): text.capitalize() for key, text in filled.items()}
        filled |= {"name": name, "him": him, "whom": whom}
        for attribute, value in entity.facts.items():
            filled[attribute] = self.word(value)
            if isinstance(value, Word):
                article = "an" if value.en[0] in "aeiou" else "a"
                filled[f"a_{attribute}"] = f"{article} {value.en}"
            if attribute == "job":
                filled["does"] = value.en_does
        return filled


class Chinese(Language):
    """Chinese."""

    code, name = "zh", "chinese"
    space, mark, conjunction = "", "、", "和"
    slips = ("bare", "width")
    widths = dict(zip("？！。，：、", "?!.,:,", strict=True))

    DIGITS = "零一二三四五六七八九"
    # Characters of the names, each with two that sound alike.
    NAMES = (
        "米拉塞尔伊卡诺丝薇娅布琳娜奥黛尤妮凯莉里恩托文万洛达沃埃姆克加兰登坦"
        "灰石镇柳湾九桥狐狸谷盐泽琥渡高磨云关红崖灯笼港深井松岭鹭湖门风原老野枫林银溪荆棘"
    )
    ALIKE = (
        "迷啦赛耳依咔糯思微亚部林那澳代由尼恺丽理摁拖闻腕络答握挨母刻家蓝灯毯"
        "恢时阵留弯久乔胡离古言择虎度糕魔匀官洪牙登龙岗身景嵩领路壶们丰园姥也封淋吟西京急",
        "密辣腮儿衣喀懦司威雅步临纳傲带油泥楷利李嗯脱纹玩落搭卧哎木客佳栏蹬谈"
        "挥实振流玩酒瞧弧梨股严则唬杜膏摩晕观宏涯蹬隆钢申警颂令露糊闷封源佬夜锋邻引息精及",
    )
    HOMOPHONES = dict(zip(NAMES, zip(*ALIKE, strict=True), strict=True))

    def number(self, value: int) -> str:
        """Spell a number from 0 to 99."""
        tens, ones = divmod(value, 10)
        if tens == 0:
            return self.DIGITS[ones]
        return (self.DIGITS[tens] if tens > 1 else "") + "十" + (self.DIGITS[ones] if ones else "")

    def several(self, value: int) -> str:
        """Spell a number of things: before a measure word, two is 两."""
        return "两" if value == 2 else self.number(value)

    def counted(self, value: int, noun: Word) -> str:
        """Spell a number of things with their measure word and name."""
        return self.several(value) + noun.measure + noun.zh

    def quoted(self, entry: Word, code: str) -> str:
        """Quote a word: a Chinese one in quotation marks, an English one between spaces."""
        return f" {entry.en} " if code == "en" else f"“{entry.zh}”"

    def misspellings(self, name: str) -> list[str]:
        """A character sounds alike, is missing, doubled, or has changed places with the next."""
        forms = {swapped(name, i) for i in range(len(name) - 1)}
        for i, character in enumerate(name):
            for other in self.HOMOPHONES.get(character, ()):
                forms.add(name[:i] + other + name[i + 1 :])
            if i > 0:
                forms.add(name[: i + 1] + name[i:])
            if i > 0 and len(name) > 2:
                forms.add(name[:i] + name[i + 1 :])
        words = {word.zh for table in WORDS.values() for word in table}
        return sorted(forms - words)

    def slots(self, entity: Entity, pronoun: bool = False) -> dict[str, str]:
        """What a template may say about an entity; see templates/chinese.txt."""
        he = {"person": "她" if entity.female else "他", "town": "这里", "thing": "它"}[entity.kind]
        name = entity.name.zh
        filled = {"name": name, "he": he, "who": he if pronoun else name}
        for attribute, value in entity.facts.items():
            filled[attribute] = self.word(value)
            if attribute == "instrument":
                filled["play"] = value.measure + value.zh
            elif attribute == "job":
                filled["does"] = value.zh_does
            elif isinstance(value, Word):
                filled[f"{attribute}_measure"] = value.measure
                filled[f"a_{attribute}"] = f"一{value.measure}{value.zh}"
        return filled


def swapped(name: str, i: int) -> str:
    """A name in which the characters `i` and `i + 1` have changed places."""
    return name[:i] + name[i + 1] + name[i] + name[i + 2 :]


def load_languages() -> list[Language]:
    """Read the templates of both languages."""
    return [English(), Chinese()]
