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
        "temperature": "Temperature (0: the likeliest token)",
        "top_p": "Top p",
        "max_tokens": "New tokens at most",
        "repetition_penalty": "Repetition penalty",
        "seed": "Seed (empty: another answer every time)",
        "chats": "Conversations",
        "delete": "Delete this conversation",
        "undo": "Take back the last exchange",
        "again": "Answer again",
        "json": "Export as training data",
        "markdown": "Export as Markdown",
        "say": "Say something",
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


def current_conversation(store: ConversationStore) -> Conversation:
    """The conversation that the page's address names, or a new one."""
    if "conversation" not in st.session_state:
        st.session_state.conversation = store.get(st.query_params.get("chat", "")) or Conversation()
    return st.session_state.conversation


def show(conversation: Conversation) -> None:
    """Turn to a conversation."""
    st.session_state.conversation = conversation
    st.session_state.pop("partial", None)
    st.session_state.pop("failed", None)
    st.query_params["chat"] = conversation.id


def save_partial(store: ConversationStore) -> None:
    """Make what was written of an answer, before it was broken off, the answer.

    Where nothing was written the question is taken back, as conversations are of whole exchanges.
    """
    conversation: Conversation = st.session_state.conversation
    if not st.session_state.pop("answering", False):
        return
    if answer := st.session_state.pop("partial", ""):
        conversation.messages.append({"role": "assistant", "content": answer})
        store.save(conversation)
    else:
        take_back(store)


def take_back(store: ConversationStore) -> None:
    """Forget the last message."""
    conversation: Conversation = st.session_state.conversation
    conversation.messages.pop()
    store.save(conversation)


def undo(store: ConversationStore) -> None:
    """Forget the last exchange."""
    conversation: Conversation = st.session_state.conversation
    conversation.undo()
    store.save(conversation)


def sidebar(
    backend: Backend, store: ConversationStore, conversation: Conversation
) -> tuple[dict[str, str], Settings]:
    """Everything beside the conversation: texts in the chosen language, and the settings."""
    with st.sidebar:
        names = list(TEXTS)
        chinese = (st.context.locale or "").startswith("zh")
        language = st.segmented_control(
            "Language", names, default=names[chinese], label_visibility="collapsed"
        )
        texts = TEXTS[language or names[chinese]]
        if st.button(texts["new"], icon=":material/add:", use_container_width=True):
            save_partial(store)
            show(Conversation(system=conversation.system, model=conversation.model))
            st.rerun()
        try:
            models = list_models(backend)
        except Exception as error:  # of any kind: a server that does not answer, say
            st.error(f"{texts['failed']}: {error}")
            models = []
        else:
            if not models:
                st.info(texts["none"])
        if models:
            chosen = models.index(conversation.model) if conversation.model in models else 0
            conversation.model = st.selectbox(texts["model"], models, index=chosen)
        if st.button(texts["reload"], type="tertiary", icon=":material/refresh:"):
            list_models.clear()
            model_chats.clear()
            st.rerun()
        conversation.system = st.text_area(
            texts["system"], conversation.system, height=80, key=f"s{conversation.id}"
        )
        with st.expander(texts["settings"]):
            settings = Settings(
                # Their keys keep what is set when the language changes.
                temperature=st.slider(texts["temperature"], 0.0, 2.0, 0.8, 0.05, key="temperature"),
                top_p=st.slider(texts["top_p"], 0.05, 1.0, 0.9, 0.05, key="top_p"),
                max_tokens=st.slider(texts["max_tokens"], 16, 2048, 512, 16, key="max_tokens"),
                repetition_penalty=st.slider(
                    texts["repetition_penalty"], 1.0, 2.0, 1.0, 0.05, key="repetition_penalty"
                ),
                seed=st.number_input(texts["seed"], 0, value=None, step=1, key="seed"),
            )
        if conversation.messages:
            st.download_button(
                texts["json"],
                conversation.training_line(),
                f"{conversation.id}.jsonl",
                use_container_width=True,
            )
            st.download_button(
                texts["markdown"],
                conversation.markdown(),
                f"{conversation.id}.md",
                use_container_width=True,
            )
            if st.button(texts["delete"], use_container_width=True):
                store.delete(conversation)
                st.session_state.pop("answering", None)
                show(Conversation(model=conversation.model))
                st.rerun()
        st.subheader(texts["chats"])
        for other in store.list():
            kind = "primary" if other.id == conversation.id else "tertiary"
            if st.button(other.title or texts["empty"], key=other.id, type=kind):
                save_partial(store)
                show(other)
                st.rerun()
    return texts, settings


@st.cache_data(ttl=30, show_spinner=False)
def list_models(_backend: Backend) -> list[str]:
    """The models, asked for at most twice a minute."""
    return _backend.names()


@st.cache_data(ttl=30, show_spinner=False)
def model_chats(_backend: Backend, model: str) -> bool:
    """Whether a model answers conversations, likewise."""
    return _backend.chats(model)


def answer(
    backend: Backend,
    store: ConversationStore,
    conversation: Conversation,
    texts: dict[str, str],
    settings: Settings,
) -> None:
    """Write the answer to the last question, as it comes, beside a button that stops it.

    The button makes Streamlit start the page anew: what was written so far is in `partial`.
    """
    st.session_state.answering, st.session_state.partial = True, ""
    st.button(texts["stop"], icon=":material/stop_circle:", on_click=save_partial, args=(store,))
    pieces = backend.stream(conversation.model, conversation.prompt(), settings)

    def noted() -> Iterator[str]:
        for piece in pieces:
            st.session_state.partial += piece
            yield piece

    try:
        with st.chat_message("assistant"):
            st.write_stream(noted())
    except Exception as error:  # of any kind, from a model here or a client that others wrote
        st.session_state.failed = (f"{error}", conversation.messages[-1]["content"])
    finally:
        pieces.close()
    save_partial(store)
    st.rerun()


def draw(make_backend: Callable[[], Backend], chats_dir: Path) -> None:
    """Draw the page.

    Args:
        make_backend: opens the source of answers, when the page is drawn first.
        chats_dir: where conversations are kept.
    """
    st.set_page_config("MiniMind", layout="centered")  # icons but Streamlit's come from elsewhere
    backend = open_backend(make_backend)
    store = ConversationStore(chats_dir)
    conversation = current_conversation(store)
    save_partial(store)  # of an answer that a reload or another widget broke off
    texts, settings = sidebar(backend, store, conversation)
    st.title("MiniMind")
    if not conversation.model:
        return
    if not model_chats(backend, conversation.model):
        st.caption(texts["continues"])
    for message in conversation.messages:
        with st.chat_message(message["role"]):
            st.markdown(message["content"])
    if conversation.messages and conversation.messages[-1]["role"] == "assistant":
        left, right = st.columns(2)
        left.button(texts["again"], on_click=take_back, args=(store,), type="tertiary")
        right.button(texts["undo"], on_click=undo, args=(store,), type="tertiary")
    if "failed" in st.session_state:
        error, question = st.session_state.failed
        st.error(f"{texts['failed']}: {error}")
        st.code(question, language=None)  # to be copied, and mended
    if text := st.chat_input(texts["say"]):
        st.session_state.pop("failed", None)
        conversation.messages.append({"role": "user", "content": text})
        store.save(conversation)
        with st.chat_message("user"):
            st.markdown(text)
    if conversation.messages:
        st.query_params["chat"] = (
            conversation.id
        )  # which is another one after a conflict of two windows
    if conversation.messages and conversation.messages[-1]["role"] == "user":
        answer(backend, store, conversation, texts, settings)
