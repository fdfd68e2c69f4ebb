"""The state of a session of the page: its conversation, and the question that is being answered."""

import threading
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import streamlit as st
from web_texts import BRANCHED, STOPPED, tr

from dataset.messages import is_empty_answer
from inference.conversations import Conversation, ConversationStore


@dataclass
class Asked:
    """A question whose answer is being generated, or has been; it failed if there is an error."""

    question: str
    start: int  # index of its message
    replaced: list[dict[str, Any]] = field(default_factory=list)  # the messages it stands for
    messages: list[dict[str, Any]] = field(default_factory=list)  # of the answer so far
    tokens: int | None = None
    seconds: float = 0.0  # since it was asked
    first: float = 0.0  # seconds and tokens when the text began
    first_tokens: int = 0
    error: str = ""
    is_begun: bool = False
    is_running: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def has_answer(self) -> bool:
        """Whether there is any text, thought or call of an answer."""
        return not all(is_empty_answer(m) for m in self.messages if m["role"] == "assistant")

    def made(self, model: str) -> dict[str, Any]:
        """By which model the answer was made, in how many tokens and seconds."""
        about: dict[str, Any] = {"model": model, "seconds": round(self.seconds, 1)}
        if self.tokens is not None:
            about["tokens"] = self.tokens
            if self.tokens > self.first_tokens and self.seconds > self.first:
                rate = (self.tokens - self.first_tokens) / (self.seconds - self.first)
                about["tokens_per_second"] = round(rate)
        return about


def show(chat: Conversation) -> None:
    """Turn to a conversation."""
    settle()
    st.session_state.chat = chat
    st.session_state.asked = st.session_state.editing = None
    st.session_state.chosen += 1


def ask(question: str, start: int | None = None) -> None:
    """Ask a question: at the end, or in place of that of message `start` and its answer.

    If exchanges follow that one, this goes on in a copy, and the conversation stays as it was.
    """
    settle()
    chat: Conversation = st.session_state.chat
    start = len(chat.messages) if start is None else start
    if start < chat.last_exchanges(1):
        chat = Conversation(chat.system, chat.model, chat.messages[:start], chat.tools)
        show(chat)
        st.toast(tr(BRANCHED))
    st.session_state.asked = Asked(question, start, replaced=chat.messages[start:])
    st.session_state.editing = None
    del chat.messages[start:]


def keep_answer(store: ConversationStore, chat: Conversation, asked: Asked, if_empty: str) -> None:
    """Save what was generated of an answer; without any text the conversation stays as it was.

    `if_empty` is then the error, if there is no other. Only the first call does something. A run of
    the page that Streamlit has stopped may call this, since it does not touch Streamlit.
    """
    with asked.lock:
        if not asked.is_running:
            return
        asked.is_running = False
        if asked.has_answer:
            messages = deepcopy(asked.messages)  # a run that was told to end may add to them yet
            last = next(m for m in reversed(messages) if m["role"] == "assistant")
            last["made"] = asked.made(chat.model)
            chat.messages += [{"role": "user", "content": asked.question}, *messages]
            store.save(chat)
        else:
            chat.messages += asked.replaced
            asked.error = asked.error or if_empty


def settle() -> None:
    """Keep what an earlier run of the page had generated when it was interrupted by this one.

    Streamlit tells the earlier one to end, and does not wait for that.
    """
    asked: Asked | None = st.session_state.asked
    if asked is not None and asked.is_begun:
        keep_answer(st.session_state.store, st.session_state.chat, asked, tr(STOPPED))


def remember(chat: Conversation) -> None:
    """Keep in the page's address what a reload needs; widgets keep their own settings there."""
    new = {"model": chat.model, "system": chat.system}
    wanted = {"chat": chat.id} if chat.messages else new
    for name in ("chat", "model", "system"):
        if value := wanted.get(name):
            st.query_params[name] = value
        elif name in st.query_params:
            del st.query_params[name]


def recall(store: ConversationStore) -> Conversation:
    """The conversation that the page's address names, or a new one."""
    named = st.query_params
    stored = store.get(named.get("chat", ""))
    return stored or Conversation(named.get("system", ""), named.get("model", ""))
