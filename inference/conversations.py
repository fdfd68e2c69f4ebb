"""Conversations that outlive a page: a file of JSON each, in one folder."""

import json
import re
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import write_atomically

TITLE = 28  # characters

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Conversation:
    """A conversation; messages as in training data, without the system message.

    Attributes:
        system: that message, or "".
        model: that answers.
        messages: the others.
        tools: JSON schemas, where there are any.
        changed: when, in seconds since 1970.
        id: the name of its file.
    """

    system: str = ""
    model: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    changed: float = 0.0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def title(self) -> str:
        """How it begins."""
        text = " ".join(self.messages[0]["content"].split()) if self.messages else ""
        return text[:TITLE] + "…" * (len(text) > TITLE)

    def undo(self) -> None:
        """Forget the last message of the user and what followed it."""
        del self.messages[self.last_exchanges(1) :]

    def last_exchanges(self, number: int) -> int:
        """Where the last so many begin, each with a message of the user; 0 if all are of them."""
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if number == 0:
            return len(self.messages)
        return starts[-number] if number <= len(starts) else 0

    def prompt(self) -> list[dict[str, Any]]:
        """All messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def training_line(self) -> str:
        """A line of training data."""
        tools = {"tools": self.tools} if self.tools else {}
        return json.dumps({"conversations": self.prompt(), **tools}, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """A text to read."""
        return "".join(f"**{m['role']}**\n\n{m['content']}\n\n" for m in self.prompt())


class TalkStore:
    """The conversations in a folder.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def list(self) -> list[Conversation]:
        """All of them, the one that changed last first; files that are none are left out."""
        talks = [talk for path in self.folder.glob("*.json") if (talk := self.get(path.stem))]
        return sorted(talks, key=lambda talk: -talk.changed)

    def get(self, name: str) -> Conversation | None:
        """The conversation of an id, which may come from anywhere."""
        return self._read(self.folder / f"{name}.json") if _ID.fullmatch(name) else None

    def keep(self, talk: Conversation) -> None:
        """Write a conversation; one without messages has no file.

        Where another window went on with it meanwhile, this one becomes a conversation of its own.
        """
        stored = self.get(talk.id)
        if stored is not None and stored.changed != talk.changed:
            talk.id = uuid.uuid4().hex
        if not talk.messages:
            self.delete(talk)
            return
        changed = time.time()
        text = json.dumps({**asdict(talk), "changed": changed}, ensure_ascii=False)
        data = text.encode("utf-8", "replace")
        write_atomically(self.folder / f"{talk.id}.json", lambda file: file.write(data))
        talk.changed = changed

    def delete(self, talk: Conversation) -> None:
        """Forget a conversation."""
        (self.folder / f"{talk.id}.json").unlink(missing_ok=True)

    def _read(self, path: Path) -> Conversation | None:
        try:
            talk = Conversation(**{**json.loads(path.read_text(encoding="utf-8")), "id": path.stem})
            said = [part for m in talk.messages for part in (m["role"], m["content"])]
            talk.changed = float(talk.changed)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        texts = (talk.system, talk.model, *said)
        fits = all(isinstance(text, str) for text in texts) and isinstance(talk.tools, list)
        return talk if fits else None
