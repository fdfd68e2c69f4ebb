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


@dataclass
class Conversation:
    """A conversation; messages as in training data.

    An answer may have `made` besides: by which model, in how many tokens and seconds.
    """

    system: str = ""  # the system message, which `messages` leaves out
    model: str = ""  # name of the one that answers
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)  # JSON schemas
    changed: float = 0.0  # seconds since 1970
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # name of its file

    @property
    def title(self) -> str:
        """The beginning of its first message."""
        text = " ".join(self.messages[0]["content"].split()) if self.messages else ""
        return text[:TITLE] + "…" * (len(text) > TITLE)

    def undo(self) -> str:
        """Remove the last message of the user, which is returned, and what follows it."""
        start = self.last_exchanges(1)
        question = self.messages[start]["content"]
        del self.messages[start:]
        return question

    def last_exchanges(self, number: int) -> int:
        """Index where the last `number` exchanges begin, each with a message of the user."""
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        starts.append(len(self.messages))
        return starts[-1 - number] if number < len(starts) else 0

    def prompt(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        about = ("made", "broken_calls")
        kept = [{k: v for k, v in m.items() if k not in about} for m in self.messages]
        return [*system, *kept]

    def training_line(self) -> str:
        """The conversation as a line of training data."""
        tools = {"tools": self.tools} if self.tools else {}
        return json.dumps({"conversations": self.prompt(), **tools}, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """The conversation as a text to read: thoughts as quotations, calls as code."""
        blocks = []
        for message in self.prompt():
            thought, calls = message.get("reasoning_content"), message.get("tool_calls", ())
            blocks.append(f"**{message['role']}**")
            if thought:
                blocks.append("> " + thought.replace("\n", "\n> "))
            if message["content"]:
                blocks.append(message["content"])
            blocks += [f"`{call['name']} {call['arguments']}`" for call in calls]
        return "".join(f"{block}\n\n" for block in blocks)


class ConversationStore:
    """The conversations in a folder, which the first save makes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def list(self) -> list[Conversation]:
        """All conversations, the last changed first; other files are left out."""
        found = [c for path in self.folder.glob("*.json") if (c := self.get(path.stem))]
        return sorted(found, key=lambda conversation: -conversation.changed)

    def get(self, name: str) -> Conversation | None:
        """The conversation of an id, which may come from anywhere; None if there is none."""
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            return None
        try:
            text = (self.folder / f"{name}.json").read_text(encoding="utf-8")
            found = Conversation(**{**json.loads(text), "id": name})
            parts = [part for m in found.messages for part in (m["role"], m["content"])]
            found.changed = float(found.changed)
            made = [m.get("made", {}) for m in found.messages]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        are_texts = all(isinstance(text, str) for text in (found.system, found.model, *parts))
        are_facts = isinstance(found.tools, list) and all(isinstance(m, dict) for m in made)
        return found if are_texts and are_facts else None

    def save(self, conversation: Conversation) -> None:
        """Write a conversation; one without messages has no file.

        If another window has changed the file meanwhile, this one becomes a new conversation.
        """
        stored = self.get(conversation.id)
        if stored is not None and stored.changed != conversation.changed:
            conversation.id = uuid.uuid4().hex
        if not conversation.messages:
            self.delete(conversation)
            return
        changed = time.time()
        text = json.dumps({**asdict(conversation), "changed": changed}, ensure_ascii=False)
        data = text.encode("utf-8", "replace")
        write_atomically(self.folder / f"{conversation.id}.json", lambda file: file.write(data))
        conversation.changed = changed

    def delete(self, conversation: Conversation) -> None:
        """Delete the file of a conversation."""
        (self.folder / f"{conversation.id}.json").unlink(missing_ok=True)
