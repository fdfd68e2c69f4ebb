"""The language in which a program talks to its user: English, or Chinese from a table of texts."""

import argparse
import locale
import os
from collections.abc import Callable, Mapping

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
