"""The page of web_demo.py: Streamlit runs it from top to bottom at every click."""

from collections.abc import Callable, Iterator
from pathlib import Path

import streamlit as st

from inference.backends import Backend, Settings
from inference.conversations import Conversation, ConversationStore

TEXTS = {
    "English": {
        "new": "New conversation",
        "empty": "(empty)",
        "model": "Model",
        "reload": "Look for models again",
        "none": "There are no models yet: train one, or start with --out_dir or --endpoint.",
        "system": "System prompt",
        "settings": "Sampling",
        "temperature": "Temperature (0: greedy)",
        "top_p": "Top p",
        "max_tokens": "New tokens at most",
        "repetition_penalty": "Repetition penalty",
        "seed": "Seed (empty: a new one each time)",
        "chats": "Conversations",
        "delete": "Delete this conversation",
        "undo": "Undo the last exchange",
        "again": "Answer again",
        "json": "Export as training data",
        "markdown": "Export as Markdown",
        "say": "Type a message",
        "stop": "Stop",
        "failed": "No answer",
        "continues": "This model is not trained on conversations: it continues what you type.",
    },
    "中文": {
        "new": "新对话",
        "empty": "(空)",
        "model": "模型",
        "reload": "重新查找模型",
        "none": "还没有模型:先训练一个,或用 --out_dir、--endpoint 启动。",
        "system": "系统提示词",
        "settings": "采样",
        "temperature": "温度(0:取最可能的词元)",
        "top_p": "Top p",
        "max_tokens": "最多生成的词元数",
        "repetition_penalty": "重复惩罚",
        "seed": "随机种子(留空:每次不同)",
        "chats": "对话",
        "delete": "删除此对话",
        "undo": "撤回上一轮",
        "again": "重新回答",
        "json": "导出为训练数据",
        "markdown": "导出为 Markdown",
        "say": "说点什么",
        "stop": "停止",
        "failed": "没有回答",
        "continues": "该模型未经对话训练:它会续写你输入的文字。",
    },
}


@st.cache_resource
def open_backend(_make: Callable[[], Backend]) -> Backend:
    """The source of answers, one for all sessions of the page."""
    return _make()


@st.cache_data(ttl=30, show_spinner=False)
def list_models(_backend: Backend) -> list[str]:
    """The models, asked for at most twice a minute."""
    return _backend.names()


@st.cache_data(ttl=30, show_spinner=False)
def model_chats(_backend: Backend, model: str) -> bool:
    """Whether a model answers conversations, asked for at most twice a minute."""
    return _backend.chats(model)


def current_chat(store: ConversationStore) -> Conversation:
    """The conversation that the page's address names, or a new one."""
    if "chat" not in st.session_state:
        st.session_state.chat = store.get(st.query_params.get("chat", "")) or Conversation()
    return st.session_state.chat


def show(chat: Conversation) -> None:
    """Turn to a conversation."""
    st.session_state.chat = chat
    st.session_state.pop("partial", None)
    st.session_state.pop("failed", None)
    st.query_params["chat"] = chat.id


def save_partial(store: ConversationStore) -> None:
    """Save what was generated of an answer before it was stopped.

    If there is nothing, the question is removed: a conversation consists of whole exchanges.
    """
    chat: Conversation = st.session_state.chat
    if not st.session_state.pop("answering", False):
        return
    if answer := st.session_state.pop("partial", ""):
        chat.messages.append({"role": "assistant", "content": answer})
        store.save(chat)
    else:
        remove_last(store)


def remove_last(store: ConversationStore) -> None:
    """Remove the last message."""
    chat: Conversation = st.session_state.chat
    chat.messages.pop()
    store.save(chat)


def undo(store: ConversationStore) -> None:
    """Remove the last exchange."""
    chat: Conversation = st.session_state.chat
    chat.undo()
    store.save(chat)


def choose_language() -> dict[str, str]:
    """The page's texts in the chosen language, by default the browser's."""
    names = list(TEXTS)
    default = names[(st.context.locale or "").startswith("zh")]
    chosen = st.segmented_control("Language", names, default=default, label_visibility="collapsed")
    return TEXTS[chosen or default]


def choose_model(backend: Backend, chat: Conversation, texts: dict[str, str]) -> None:
    """Choose the model of a conversation."""
    try:
        models = list_models(backend)
    except Exception as error:  # of any kind, such as a server that does not answer
        st.error(f"{texts['failed']}: {error}")
        models = []
    else:
        if not models:
            st.info(texts["none"])
    if models:
        index = models.index(chat.model) if chat.model in models else 0
        chat.model = st.selectbox(texts["model"], models, index=index)
    if st.button(texts["reload"], type="tertiary", icon=":material/refresh:"):
        list_models.clear()
        model_chats.clear()
        st.rerun()


def choose_settings(texts: dict[str, str]) -> Settings:
    """Choose how answers are generated; the widgets' keys keep this when the language changes."""
    with st.expander(texts["settings"]):
        return Settings(
            temperature=st.slider(texts["temperature"], 0.0, 2.0, 0.8, 0.05, key="temperature"),
            top_p=st.slider(texts["top_p"], 0.05, 1.0, 0.9, 0.05, key="top_p"),
            max_tokens=st.slider(texts["max_tokens"], 16, 2048, 512, 16, key="max_tokens"),
            repetition_penalty=st.slider(
                texts["repetition_penalty"], 1.0, 2.0, 1.0, 0.05, key="repetition_penalty"
            ),
            seed=st.number_input(texts["seed"], 0, value=None, step=1, key="seed"),
        )


def offer_exports(store: ConversationStore, chat: Conversation, texts: dict[str, str]) -> None:
    """Buttons that export a conversation or delete it."""
    st.download_button(
        texts["json"], chat.training_line(), f"{chat.id}.jsonl", use_container_width=True
    )
    st.download_button(
        texts["markdown"], chat.markdown(), f"{chat.id}.md", use_container_width=True
    )
    if st.button(texts["delete"], use_container_width=True):
        store.delete(chat)
        st.session_state.pop("answering", None)
        show(Conversation(model=chat.model))
        st.rerun()


def list_chats(store: ConversationStore, chat: Conversation, texts: dict[str, str]) -> None:
    """Buttons that turn to other conversations."""
    st.subheader(texts["chats"])
    for other in store.list():
        kind = "primary" if other.id == chat.id else "tertiary"
        if st.button(other.title or texts["empty"], key=other.id, type=kind):
            save_partial(store)
            show(other)
            st.rerun()


def sidebar(
    backend: Backend, store: ConversationStore, chat: Conversation
) -> tuple[dict[str, str], Settings]:
    """Draw all that is beside the conversation; returns the page's texts and the settings."""
    with st.sidebar:
        texts = choose_language()
        if st.button(texts["new"], icon=":material/add:", use_container_width=True):
            save_partial(store)
            show(Conversation(system=chat.system, model=chat.model))
            st.rerun()
        choose_model(backend, chat, texts)
        chat.system = st.text_area(texts["system"], chat.system, height=80, key=f"s{chat.id}")
        settings = choose_settings(texts)
        if chat.messages:
            offer_exports(store, chat, texts)
        list_chats(store, chat, texts)
    return texts, settings


def answer(
    backend: Backend,
    store: ConversationStore,
    chat: Conversation,
    texts: dict[str, str],
    settings: Settings,
) -> None:
    """Show the answer to the last question as it is generated, beside a button that stops it.

    The button makes Streamlit run the page anew: the answer so far is in `partial`.
    """
    st.session_state.answering, st.session_state.partial = True, ""
    st.button(texts["stop"], icon=":material/stop_circle:", on_click=save_partial, args=(store,))
    pieces = backend.stream(chat.model, chat.prompt(), settings)

    def noted() -> Iterator[str]:
        for piece in pieces:
            st.session_state.partial += piece
            yield piece

    try:
        with st.chat_message("assistant"):
            st.write_stream(noted())
    except Exception as error:  # of any kind, from a model here or from a client library
        st.session_state.failed = (f"{error}", chat.messages[-1]["content"])
    finally:
        pieces.close()
    save_partial(store)
    st.rerun()


def draw(make_backend: Callable[[], Backend], chats_dir: Path) -> None:
    """Draw the page.

    Args:
        make_backend: opens the source of answers, when the page is first drawn.
        chats_dir: folder of the conversations.
    """
    st.set_page_config("MiniMind", layout="centered")  # other icons would be fetched from elsewhere
    backend = open_backend(make_backend)
    store = ConversationStore(chats_dir)
    chat = current_chat(store)
    save_partial(store)  # of an answer that a reload or another widget stopped
    texts, settings = sidebar(backend, store, chat)
    st.title("MiniMind")
    if not chat.model:
        return
    if not model_chats(backend, chat.model):
        st.caption(texts["continues"])
    for message in chat.messages:
        with st.chat_message(message["role"]):
            st.markdown(message["content"])
    if chat.messages and chat.messages[-1]["role"] == "assistant":
        left, right = st.columns(2)
        left.button(texts["again"], on_click=remove_last, args=(store,), type="tertiary")
        right.button(texts["undo"], on_click=undo, args=(store,), type="tertiary")
    if "failed" in st.session_state:
        error, question = st.session_state.failed
        st.error(f"{texts['failed']}: {error}")
        st.code(question, language=None)  # to copy and correct
    if text := st.chat_input(texts["say"]):
        st.session_state.pop("failed", None)
        chat.messages.append({"role": "user", "content": text})
        store.save(chat)
        with st.chat_message("user"):
            st.markdown(text)
    if chat.messages:
        st.query_params["chat"] = chat.id  # another one after a conflict of two windows
    if chat.messages and chat.messages[-1]["role"] == "user":
        answer(backend, store, chat, texts, settings)
