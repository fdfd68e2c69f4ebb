"""The page of web_demo.py: Streamlit runs it from top to bottom at every click."""

from collections.abc import Callable, Iterator
from pathlib import Path

import streamlit as st

from inference.backends import Backend, Settings
from inference.conversations import Conversation, ConversationStore

NO_MODELS = "There are no models yet: train one, or start with --out_dir or --endpoint."
SEED = "Seed (empty: a new one each time)"
CONTINUES = "This model is not trained on conversations: it continues what you type."
CHINESE = {
    "New conversation": "新对话",
    "(empty)": "(空)",
    "Model": "模型",
    "Look for models again": "重新查找模型",
    NO_MODELS: "还没有模型:先训练一个,或用 --out_dir、--endpoint 启动。",
    "System prompt": "系统提示词",
    "Sampling": "采样",
    "Temperature (0: greedy)": "温度(0:取最可能的词元)",
    "Top p": "Top p",
    "New tokens at most": "最多生成的词元数",
    "Repetition penalty": "重复惩罚",
    SEED: "随机种子(留空:每次不同)",
    "Conversations": "对话",
    "Delete this conversation": "删除此对话",
    "Undo the last exchange": "撤回上一轮",
    "Answer again": "重新回答",
    "Export as training data": "导出为训练数据",
    "Export as Markdown": "导出为 Markdown",
    "Type a message": "说点什么",
    "Stop": "停止",
    "No answer": "没有回答",
    CONTINUES: "该模型未经对话训练:它会续写你输入的文字。",
}


def tr(english: str) -> str:
    """A text of the page in the chosen language."""
    return CHINESE[english] if st.session_state.language == "中文" else english


@st.cache_resource
def open_backend(_make: Callable[[], Backend]) -> Backend:
    """The source of answers, one for all sessions of the page."""
    return _make()


@st.cache_data(ttl=30, show_spinner=False)
def list_models(_backend: Backend) -> dict[str, bool]:
    """The models, each with whether it answers conversations; asked for at most twice a minute."""
    return _backend.models()


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
    partial = st.session_state.pop("partial", None)
    if partial:
        chat.messages.append({"role": "assistant", "content": partial})
        store.save(chat)
    elif partial is not None:
        shorten(store, chat.messages.pop)


def shorten(store: ConversationStore, remove: Callable[[], object]) -> None:
    """Call what removes the end of the conversation, and save what is left."""
    remove()
    store.save(st.session_state.chat)


def choose_language() -> None:
    """Choose the page's language, at first the browser's."""
    if not st.session_state.get("language"):
        is_chinese = (st.context.locale or "").startswith("zh")
        st.session_state.language = "中文" if is_chinese else "English"
    names = ["English", "中文"]
    st.segmented_control("Language", names, key="language", label_visibility="collapsed")


def choose_model(backend: Backend, chat: Conversation) -> bool:
    """Choose the model of a conversation; returns whether it answers conversations."""
    models: dict[str, bool] = {}
    try:
        models = list_models(backend)
        if not models:
            st.info(tr(NO_MODELS))
    except Exception as error:  # of any kind, such as a server that does not answer
        st.error(f"{tr('No answer')}: {error}")
    if models:
        index = list(models).index(chat.model) if chat.model in models else 0
        chat.model = st.selectbox(tr("Model"), models, index=index)
    if st.button(tr("Look for models again"), type="tertiary", icon=":material/refresh:"):
        list_models.clear()
        st.rerun()
    return models.get(chat.model, True)


def slider(key: str, label: str, *numbers: float) -> float:
    """A slider from the first number to the second, at the third, in steps of the fourth."""
    return st.slider(tr(label), *numbers, key=key)


def choose_settings() -> Settings:
    """Choose how answers are generated; the widgets' keys keep this when the language changes."""
    with st.expander(tr("Sampling")):
        return Settings(
            temperature=slider("temperature", "Temperature (0: greedy)", 0.0, 2.0, 0.8, 0.05),
            top_p=slider("top_p", "Top p", 0.05, 1.0, 0.9, 0.05),
            max_tokens=slider("max_tokens", "New tokens at most", 16, 2048, 512, 16),
            repetition_penalty=slider("penalty", "Repetition penalty", 1.0, 2.0, 1.0, 0.05),
            seed=st.number_input(tr(SEED), 0, value=None, step=1, key="seed"),
        )


def sidebar(
    backend: Backend, store: ConversationStore, chat: Conversation
) -> tuple[bool, Settings]:
    """Draw all that is beside the conversation; returns whether the model chats, and how."""
    with st.sidebar:
        choose_language()
        if st.button(tr("New conversation"), icon=":material/add:", use_container_width=True):
            save_partial(store)
            show(Conversation(system=chat.system, model=chat.model))
            st.rerun()
        chats = choose_model(backend, chat)
        chat.system = st.text_area(tr("System prompt"), chat.system, height=80, key=f"s{chat.id}")
        settings = choose_settings()
        if chat.messages:
            for name, text, kind in (
                ("Export as training data", chat.training_line(), "jsonl"),
                ("Export as Markdown", chat.markdown(), "md"),
            ):
                st.download_button(tr(name), text, f"{chat.id}.{kind}", use_container_width=True)
            if st.button(tr("Delete this conversation"), use_container_width=True):
                store.delete(chat)
                show(Conversation(model=chat.model))
                st.rerun()
        st.subheader(tr("Conversations"))
        for other in store.list():
            kind = "primary" if other.id == chat.id else "tertiary"
            if st.button(other.title or tr("(empty)"), key=other.id, type=kind):
                save_partial(store)
                show(other)
                st.rerun()
    return chats, settings


def answer(
    backend: Backend, store: ConversationStore, chat: Conversation, settings: Settings
) -> None:
    """Show the answer to the last question as it is generated, beside a button that stops it.

    The button makes Streamlit run the page anew: the answer so far is in `partial`.
    """
    st.session_state.partial = ""
    st.button(tr("Stop"), icon=":material/stop_circle:", on_click=save_partial, args=(store,))
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
    """Draw the page; `make_backend` opens the source of answers when it is first drawn."""
    st.set_page_config("MiniMind", layout="centered")  # other icons would be fetched from elsewhere
    backend = open_backend(make_backend)
    store = ConversationStore(chats_dir)
    if "chat" not in st.session_state:
        st.session_state.chat = store.get(st.query_params.get("chat", "")) or Conversation()
    chat: Conversation = st.session_state.chat
    save_partial(store)  # of an answer that a reload or another widget stopped
    chats, settings = sidebar(backend, store, chat)
    st.title("MiniMind")
    if not chat.model:
        return
    if not chats:
        st.caption(tr(CONTINUES))
    for message in chat.messages:
        with st.chat_message(message["role"]):
            st.markdown(message["content"])
    if chat.messages and chat.messages[-1]["role"] == "assistant":
        left, right = st.columns(2)
        for column, name, remove in (
            (left, "Answer again", chat.messages.pop),
            (right, "Undo the last exchange", chat.undo),
        ):
            column.button(tr(name), on_click=shorten, args=(store, remove), type="tertiary")
    if "failed" in st.session_state:
        error, question = st.session_state.failed
        st.error(f"{tr('No answer')}: {error}")
        st.code(question, language=None)  # to copy and correct
    if text := st.chat_input(tr("Type a message")):
        st.session_state.pop("failed", None)
        chat.messages.append({"role": "user", "content": text})
        store.save(chat)
        with st.chat_message("user"):
            st.markdown(text)
    if chat.messages:
        st.query_params["chat"] = chat.id  # another one after a conflict of two windows
    if chat.messages and chat.messages[-1]["role"] == "user":
        answer(backend, store, chat, settings)
