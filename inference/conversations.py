"""Conversations that outlive a page: a file of JSON each, in one folder."""

import json
import re
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

TITLE = 28  # characters

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Talk:
    """A conversation; messages as in training data, without the system message."""

    system: str = ""
    model: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    changed: float = 0.0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def title(self) -> str:
        """How it begins."""
        text = " ".join(self.messages[0]["content"].split()) if self.messages else ""
        return text[:TITLE] + "…" * (len(text) > TITLE)

    def prompt(self) -> list[dict[str, str]]:
        """All messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def training_line(self) -> str:
        """A line of training data."""
        return json.dumps({"conversations": self.prompt()}, ensure_ascii=False) + "\n"

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

    def list(self) -> list[Talk]:
        """All of them, the one that changed last first; files that are none are left out."""
        talks = [talk for path in self.folder.glob("*.json") if (talk := self._read(path))]
        return sorted(talks, key=lambda talk: -talk.changed)

    def get(self, name: str) -> Talk | None:
        """The conversation of an id, which may come from anywhere."""
        return self._read(self.folder / f"{name}.json") if _ID.fullmatch(name) else None

    def keep(self, talk: Talk) -> None:
        """Write a conversation; one that has begun nothing is not written."""
        if talk.messages:
            talk.changed = time.time()
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{talk.id}.tmp"
            temporary.write_text(json.dumps(asdict(talk), ensure_ascii=False), encoding="utf-8")
            temporary.replace(self.folder / f"{talk.id}.json")

    def delete(self, talk: Talk) -> None:
        """Forget a conversation."""
        (self.folder / f"{talk.id}.json").unlink(missing_ok=True)

    def _read(self, path: Path) -> Talk | None:
        try:
            return Talk(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
