"""The texts of web_page.py in two languages, and texts of others as Streamlit's Markdown."""

import re

import streamlit as st

NO_MODELS = "There are no models yet: train one, or start with --out_dir or --endpoint."
SEED = "Seed (empty: a new one each time)"
HISTORY = "Earlier exchanges the model sees"
CONTINUES = "This model is not trained on conversations: it continues what you type."
WELCOME = "A small language model to talk to. It knows what it was trained on, and makes mistakes."
FORGOTTEN = "The model no longer sees what is above this line."
BRANCHED = "This goes on in a copy. The conversation as it was is in the list."
EMPTY = "the model ended its answer before the first word"
STOPPED = "stopped before the first word"
CHINESE = {
    "New conversation": "新对话",
    "(empty)": "（空）",
    "Model": "模型",
    "Look for models again": "重新查找模型",
    NO_MODELS: "还没有模型：先训练一个，或用 --out_dir、--endpoint 启动。",
    WELCOME: "可以与之对话的小型语言模型。它只了解训练数据中的内容，也会出错。",
    "Answers come from": "回答来自",
    "For example:": "例如：",
    "Settings": "设置",
    "Tools": "工具",
    "Thinking": "思考",
    "Thought": "思考过程",
    "on": "开",
    "off": "关",
    "auto": "自动",
    "System prompt": "系统提示词",
    "Temperature (0: greedy)": "温度（0：贪心）",
    "Top p": "Top p",
    "New tokens at most": "最多生成的 token 数",
    "Repetition penalty": "重复惩罚",
    SEED: "随机种子（留空：每次不同）",
    HISTORY: "模型能看到的此前对话轮数",
    "as many as fit": "上下文能容纳的全部",
    "as trained": "与训练时相同",
    FORGOTTEN: "模型已看不到这条线以上的内容。",
    BRANCHED: "接下来的对话在副本中进行，原来的对话仍在列表中。",
    "Conversations": "对话",
    "Delete this conversation": "删除此对话",
    "Delete this conversation?": "删除此对话？",
    "Delete": "删除",
    "Cancel": "取消",
    "Copy": "复制",
    "Answer again": "重新回答",
    "Edit": "编辑",
    "Send": "发送",
    "Retry": "重试",
    "tokens/s": "token/s",
    "Export as training data": "导出为训练数据",
    "Export as Markdown": "导出为 Markdown",
    "Type a message": "说点什么",
    "Stop": "停止",
    "Loading the model": "正在加载模型",
    "Answering": "正在回答",
    "No answer": "没有回答",
    EMPTY: "模型还没写出一个字就结束了回答",
    STOPPED: "还没写出一个字就被停止",
    CONTINUES: "该模型未经对话训练：它会续写你输入的文字。",
}
CODE = re.compile(r"(^```.*?(?:^```[^\n]*$|\Z)|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
# What a backslash escapes, formulas, then any other dollar (as in "from $5 to $10") and line break.
MARKS = re.compile(r"\\.|\$\$.+?\$\$|\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)|\$|(?<=\S)\n(?=\S)", re.DOTALL)
OUTSIDE_FORMULAS = {"$": r"\$", "\n": "  \n"}


def tr(english: str) -> str:
    """A text of the page in the chosen language."""
    return CHINESE[english] if st.session_state.language == "中文" else english


def plain(text: str) -> str:
    """Text that Markdown shows as it is, for labels and errors."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def answer_markdown(text: str) -> str:
    r"""An answer as Streamlit's Markdown.

    Lines end where they end in the answer, formulas in `\(…\)` and `\[…\]` are LaTeX as well as
    those in dollars, and a dollar that begins no formula is a dollar. Code stays as it is.
    """
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        part = re.sub(r"\\\((.+?)\\\)", r"$\1$", parts[i])
        part = re.sub(r"\\\[(.+?)\\\]", r"$$\1$$", part, flags=re.DOTALL)
        parts[i] = MARKS.sub(lambda mark: OUTSIDE_FORMULAS.get(mark[0], mark[0]), part)
    return "".join(parts)
