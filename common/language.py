"""The language in which a program talks to its user: English, or Chinese from a table of texts."""

import argparse
import json
import locale
import os
from collections.abc import Callable, Mapping
from pathlib import Path

CATALOGUE = Path(__file__).with_name("chinese.json")  # the Chinese of each template of a Text

Translate = Callable[..., str]  # an English text and the values of its {names} → the text to show


def add_lang(parser: argparse._ActionsContainer) -> None:
    """Add `--lang`: the language of notices, help and errors."""
    parser.add_argument("--lang", choices=("en", "zh"), help="of notices; default: the locale's")


def translator(lang: str | None, chinese: Mapping[str, str]) -> Translate:
    """Make the function that gives a text in `lang`, by default the locale's language.

    `chinese` holds the Chinese of every English text that the function is called with; a text that
    is missing there is a KeyError. `{names}` in a text are filled in as by `str.format`.
    """
    is_chinese = (lang or locale_language()) == "zh"

    def translate(text: str, /, **values: object) -> str:
        return (chinese[text] if is_chinese else text).format(**values)

    return translate


def locale_language() -> str:
    """The language of the user's locale, if it is one of ours: "zh" for Chinese, else "en"."""
    set_ = filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG")))
    name = next(set_, None) or locale.getlocale()[0] or ""  # Windows sets no variable
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"


class Text(str):
    """An English text, made as by `str.format`, that `translate` can show in Chinese as well.

    Lists among the values are shown as their items with commas between; a value may be a Text, too.
    """

    def __new__(cls, template: str, /, **values: object) -> "Text":
        """Fill in the values."""
        lists = {name: ", ".join(v) for name, v in values.items() if isinstance(v, list)}
        text = super().__new__(cls, template.format(**values | lists))
        text.template, text.values = template, values
        return text


def translate(text: str, language: str) -> str:
    """A text in a language, "en" or "zh"; one that is no Text, as a path or a figure, as it is."""
    if language == "en" or not isinstance(text, Text):
        return str(text)
    chinese = json.loads(CATALOGUE.read_text(encoding="utf-8"))

    def show(value: object) -> object:
        if isinstance(value, list):
            return "，".join(map(show, value))
        if not isinstance(value, Text):
            return value
        template = chinese.get(value.template, value.template)
        return template.format(**{name: show(v) for name, v in value.values.items()})

    return show(text)
