"""The page of web_demo.py: Streamlit runs it from top to bottom at every click."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from web_parts import COPY, DRAWER, STYLE
from web_state import Asked, ask, keep_answer, recall, remember, settle, show
from web_texts import (
    CONTINUES,
    EMPTY,
    FORGOTTEN,
    HISTORY,
    NO_MODELS,
    SEED,
    STOPPED,
    WELCOME,
    answer_markdown,
    plain,
    tr,
)

from inference import THINKING
from inference.backends import NOTHING, Backend, ModelInfo, Settings
from inference.conversations import Conversation, ConversationStore
from inference.parts import Delta
from inference.tools import BUILT_IN, Tool, answer_in_rounds, tool_name

LANGUAGES = ["English", "中文"]
EXAMPLES = 6
LISTED = 10  # conversations, before their list scrolls


@st.cache_resource
def open_backend(_make: Callable[[], Backend]) -> Backend:
    """The source of answers, one for all sessions of the page."""
    return _make()


@st.cache_data(ttl=30, show_spinner=False)
def list_models(_backend: Backend) -> dict[str, ModelInfo]:
    """The models; asked for at most twice a minute."""
    return _backend.models()


def choose_language() -> None:
    """Choose the page's language, by default the browser's."""
    is_chinese = (st.context.locale or "").startswith("zh")
    st.segmented_control(
        "Language",
        LANGUAGES,
        default=LANGUAGES[is_chinese],
        required=True,
        key="language",
        bind="query-params",
        label_visibility="collapsed",
    )


def choose_model(backend: Backend, chat: Conversation) -> dict[str, ModelInfo]:
    """Choose the model of a conversation; returns all models."""
    models: dict[str, ModelInfo] = {}
    error = ""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        try:
            models = list_models(backend)
        except Exception as failure:  # of any kind, such as a server that does not answer
            error = f"{tr('No answer')}: {backend.address}: {failure}"
        if models:
            index = list(models).index(chat.model) if chat.model in models else 0
            chat.model = st.selectbox(
                tr("Model"), models, index, key=f"model{chat.id}", label_visibility="collapsed"
            )
        elif error:
            st.error(plain(error))
        else:
            st.info(plain(tr(NO_MODELS)))
        name, icon = (tr("Retry") if error else ""), ":material/refresh:"
        if st.button(name, icon=icon, help=tr("Look for models again"), key="models"):
            list_models.clear()
            st.rerun()
    return models


def slider(key: str, label: str, *numbers: float) -> float:
    """A slider from the first number to the second, at the third, in steps of the fourth."""
    return st.slider(tr(label), *numbers, key=key, bind="query-params")


def number(key: str, label: str, default: str | None = None) -> int | None:
    """A field for a whole number, which may be empty; it shows then what the default is."""
    return st.number_input(
        tr(label), 0, value=None, step=1, placeholder=default, key=key, bind="query-params"
    )


def choose_tools(chat: Conversation, tools: Mapping[str, Tool]) -> None:
    """Choose which tools a conversation offers; one that nothing here runs stays."""
    names = [tool_name(schema) for schema in chat.tools]
    on = [name for name in tools if name in names]
    with st.container(key="tools"):
        chosen = st.pills(
            tr("Tools"), tools, selection_mode="multi", default=on, key=f"tools{chat.id}"
        )
    others = [schema for schema in chat.tools if tool_name(schema) not in tools]
    chat.tools = [*others, *(tools[name].schema for name in tools if name in chosen)]


def choose_settings(
    chat: Conversation, info: ModelInfo, tools: Mapping[str, Tool]
) -> tuple[Settings, int | None]:
    """Choose how answers are generated, and how many earlier exchanges the model sees."""
    with st.expander(tr("Settings"), icon=":material/tune:"):
        chat.system = st.text_area(tr("System prompt"), chat.system, height=80, key=f"s{chat.id}")
        fits = info.history is None
        default = tr("as many as fit") if fits else f"{info.history} ({tr('as trained')})"
        history = number("history", HISTORY, default)
        thinks = None
        if info.chats:
            choose_tools(chat, tools)
            options = {"default": "auto", "required": True, "format_func": tr}
            thinks = THINKING[
                st.segmented_control(
                    tr("Thinking"), THINKING, key="thinking", bind="query-params", **options
                )
            ]
        settings = Settings(
            enable_thinking=thinks,
            temperature=slider("temperature", "Temperature (0: greedy)", 0.0, 2.0, 0.8, 0.05),
            top_p=slider("top_p", "Top p", 0.05, 1.0, 0.9, 0.05),
            max_tokens=slider("max_tokens", "New tokens at most", 16, 2048, 512, 16),
            repetition_penalty=slider("penalty", "Repetition penalty", 1.0, 2.0, 1.0, 0.05),
            seed=number("seed", SEED),
        )
    return settings, info.history if history is None else history


def confirm_deletion(store: ConversationStore) -> None:
    """Ask whether the conversation is to be deleted."""
    chat: Conversation = st.session_state.chat

    def delete() -> None:
        store.delete(chat)
        show(Conversation(chat.system, chat.model, tools=chat.tools))

    @st.dialog(tr("Delete this conversation?"))
    def dialog() -> None:
        st.text(chat.title)
        if st.button(tr("Delete"), type="primary", key="really", on_click=delete):
            st.rerun()
        if st.button(tr("Cancel")):
            st.rerun()

    dialog()


def list_conversations(store: ConversationStore, chat: Conversation) -> None:
    """Draw the conversations, the button for a new one, and what can be done with this one."""
    new = Conversation(chat.system, chat.model, tools=chat.tools)
    icon = ":material/add:"
    st.button(tr("New conversation"), icon=icon, width="stretch", on_click=show, args=(new,))
    others = store.list()
    if others:
        st.subheader(tr("Conversations"))
    with st.container(height=400 if len(others) > LISTED else "content", gap="xsmall"):
        for other in others:
            kind = "primary" if other.id == chat.id else "tertiary"
            title = plain(other.title or tr("(empty)"))
            st.button(title, key=other.id, type=kind, on_click=show, args=(other,))
    if chat.messages:
        for name, text, kind in (
            ("Export as training data", chat.training_line(), "jsonl"),
            ("Export as Markdown", chat.markdown(), "md"),
        ):
            st.download_button(
                tr(name), text, f"{chat.id}.{kind}", on_click="ignore", width="stretch"
            )
        if st.button(tr("Delete this conversation"), width="stretch", key="delete"):
            confirm_deletion(store)


def draw_question(text: str, index: int) -> None:
    """Draw a message of the user as it was typed, or a field to change it."""
    with st.chat_message("user"):
        if st.session_state.editing != index:
            st.text(text)
            return
        st.text_area(tr("Edit"), text, key=f"edited{index}", label_visibility="collapsed")
        with st.container(horizontal=True):
            send = {"on_click": ask_edited, "args": (index,)}
            st.button(tr("Send"), key="send", type="primary", **send)
            st.button(tr("Cancel"), key="cancel", on_click=edit, args=(None,))


def ask_typed() -> None:
    """Ask what was typed below the conversation."""
    ask(st.session_state.typed)


def ask_edited(index: int) -> None:
    """Ask the changed question, unless it is blank, in place of message `index`."""
    if st.session_state[f"edited{index}"].strip():
        ask(st.session_state[f"edited{index}"], index)


def edit(index: int | None) -> None:
    """Open the field to change the question that is message `index`, or close it."""
    st.session_state.editing = index


def draw_parts(messages: Sequence[Mapping[str, Any]], chats: bool) -> None:
    """Draw an answer: Markdown from a model that chats, the text as it is from others.

    Thoughts are folded; calls of tools and what these returned stand between the texts.
    """
    for message in messages:
        if message["role"] == "tool":
            st.caption(plain(f"← {message['content']}"))
            continue
        if thought := message.get("reasoning_content"):
            with st.expander(tr("Thought"), icon=":material/psychology:"):
                st.text(thought)
        if message["content"] and chats:
            st.markdown(answer_markdown(message["content"]))
        elif message["content"]:
            st.text(message["content"])
        for call in message.get("tool_calls", ()):
            arguments = call["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            st.caption(plain(f"→ {call['name']} {arguments}"))


def describe(made: dict[str, Any]) -> str:
    """By which model an answer was made, how fast and in what time."""
    facts = [plain(f"{made['model']}")] if "model" in made else []
    if "tokens_per_second" in made:
        facts.append(f"{made['tokens_per_second']} {tr('tokens/s')}")
    if "seconds" in made:
        facts.append(f"{made['seconds']} s")
    return " · ".join(facts)


def draw_answer(chat: Conversation, start: int, end: int, models: dict[str, ModelInfo]) -> None:
    """Draw the answer to question `start`, up to message `end`, and what can be done with it."""
    question, *messages = chat.messages[start:end]
    made = next((m["made"] for m in reversed(messages) if "made" in m), {})
    info = models.get(made.get("model", chat.model), ModelInfo(chats=True))
    question, index = question["content"], start + 1
    with st.chat_message("assistant"):
        with st.empty().container():
            draw_parts(messages, info.chats)
        with under(index):
            label = {"text": messages[-1]["content"], "label": tr("Copy")}
            COPY(data=label, key=f"copy{index}", width="content")
            for name, icon, call, arguments in (
                ("Answer again", ":material/refresh:", ask, (question, start)),
                ("Edit", ":material/edit:", edit, (start,)),
            ):
                key = f"{name}{index}"
                options = {"icon": icon, "type": "tertiary", "key": key}
                st.button(tr(name), on_click=call, args=arguments, **options)
            st.caption(describe(made), width="content")


def draw_messages(chat: Conversation, models: dict[str, ModelInfo], history: int | None) -> None:
    """Draw the conversation, and where the part begins that the model sees of it."""
    seen = 0 if history is None else chat.last_exchanges(history)
    starts = [i for i, message in enumerate(chat.messages) if message["role"] == "user"]
    for start, end in pairwise([*starts, len(chat.messages)]):
        draw_question(chat.messages[start]["content"], start)
        if end > start + 1:
            draw_answer(chat, start, end, models)
        if end == seen:
            st.caption(tr(FORGOTTEN))


def under(index: int) -> DeltaGenerator:
    """The row under the answer that is message `index`, of one height before and after its end."""
    return st.container(horizontal=True, vertical_alignment="center", key=f"under{index}")


def draw_failure(asked: Asked, is_last: bool) -> None:
    """Draw a question that got no answer, unless it is in the conversation, and the reason."""
    if is_last:
        draw_question(asked.question, asked.start)
    st.error(plain(f"{tr('No answer')}: {asked.error}"))
    with st.container(horizontal=True):
        again = {"on_click": ask, "args": (asked.question, asked.start)}
        st.button(tr("Retry"), icon=":material/refresh:", key="retry", **again)
        if is_last:
            icon = ":material/edit:"
            st.button(tr("Edit"), icon=icon, key="edit", on_click=edit, args=(asked.start,))


def answer(
    backend: Backend,
    store: ConversationStore,
    settings: Settings,
    history: int | None,
    chats: bool,
    tools: Mapping[str, Tool],
) -> None:
    """Generate the answer to the question that was asked, and show it on the way.

    A click makes Streamlit end this here and run the page anew: what there is then is saved.
    """
    chat: Conversation = st.session_state.chat
    asked: Asked = st.session_state.asked
    past = chat.messages if history is None else chat.messages[chat.last_exchanges(history) :]
    question = {"role": "user", "content": asked.question}
    prompt = replace(chat, messages=[*past, question]).prompt()
    begun, if_empty, asked.is_begun = time.perf_counter(), tr(STOPPED), True

    def stream(messages: list[dict[str, Any]]) -> Iterator[Delta]:
        before = asked.tokens or 0  # of earlier rounds
        pieces = backend.stream(chat.model, messages, settings, chat.tools)
        for piece in chain([NOTHING], pieces):
            asked.seconds = time.perf_counter() - begun
            if piece.tokens is not None:
                asked.tokens = before + piece.tokens
            if piece.delta.text and not asked.first_tokens:
                asked.first, asked.first_tokens = asked.seconds, piece.tokens or 1
            yield piece.delta

    rounds = answer_in_rounds(
        stream, prompt, asked.messages, chat.tools, tools, settings.enable_thinking
    )
    try:
        with st.chat_message("user"):
            st.text(asked.question)
        with st.chat_message("assistant"):
            place, status = st.empty(), under(asked.start + 1).empty()
        for delta in rounds:
            if delta.text:
                with place.container():
                    draw_parts(asked.messages, chats)
            elif not asked.has_answer:
                state = "Answering" if backend.is_loaded(chat.model) else "Loading the model"
                status.caption(plain(f"{chat.model} · {tr(state)} …"))
        if_empty = tr(EMPTY)
    except Exception as error:  # of any kind, from a model here or from a client library
        asked.error = f"{backend.address}: {error}"
    finally:
        rounds.close()
        keep_answer(store, chat, asked, if_empty)
    st.rerun()


def welcome(backend: Backend, model: str, info: ModelInfo) -> None:
    """Draw what a page without messages has: what this is, which model answers, what to ask."""
    st.title("MiniMind")
    st.markdown(tr(WELCOME))
    st.caption(plain(f"{tr('Answers come from')} {model} ({backend.address})"))
    if info.examples:
        st.caption(tr("For example:"))
    for i, example in enumerate(info.examples[:EXAMPLES]):
        st.button(plain(example), key=f"example{i}", on_click=ask, args=(example,))


def draw(
    make_backend: Callable[[], Backend], chats_dir: Path, tools: Mapping[str, Tool] = BUILT_IN
) -> None:
    """Draw the page; `make_backend` opens the source of answers when it is first drawn."""
    st.set_page_config("MiniMind", layout="centered")  # other icons would be fetched from elsewhere
    st.html(STYLE)
    backend, state = open_backend(make_backend), st.session_state
    store = ConversationStore(chats_dir)
    if "chat" not in state:
        state.store, state.asked, state.chosen = store, None, -1
        show(recall(store))
    settle()
    chat: Conversation = state.chat
    conversations = st.sidebar.container()
    with st.sidebar:
        choose_language()
    models = choose_model(backend, chat)
    info = models.get(chat.model, ModelInfo(chats=True))
    with conversations:
        list_conversations(store, chat)
    with st.sidebar:
        settings, history = choose_settings(chat, info, tools)
        DRAWER(data={"chosen": state.chosen}, key="drawer")
    if not chat.model:
        return
    asked: Asked | None = state.asked
    if not chat.messages and asked is None:
        welcome(backend, chat.model, info)
    if not info.chats:
        st.caption(tr(CONTINUES))
    thread = st.container()
    with thread:
        draw_messages(chat, models, history if info.chats else None)
        if asked is not None and asked.error:
            draw_failure(asked, asked.start == len(chat.messages))
    st.chat_input(tr("Type a message"), key="typed", on_submit=ask_typed)
    remember(chat)
    if asked is not None and asked.is_running:
        st.bottom.button(tr("Stop"), icon=":material/stop_circle:", key="stop")
        with thread:
            answer(backend, store, settings, history, info.chats, tools)
