"""What the chat in a terminal tells its user, in English, and all of it in Chinese."""

HELP = '''\
/help, /?                this text
/reset                   begin a new conversation
/system TEXT             set the system message; without TEXT there is none
/again                   answer the last question again
/undo                    remove the last question and its answer
/save FILE, /load FILE   the conversation, as one line of training data
/thinking on|off|auto    whether answers begin with a thought; auto leaves it to the model
/tools                   show the tools that the model may call
/tools FILE              offer the tools, too, whose JSON schemas a file holds; "/tools off": none
/set                     show the settings
/set temperature 0.7     change one
exit, quit               leave; so do /exit, /quit and Ctrl-D
"""                      begins a text of several lines, and ends it; a paste needs none
Ctrl-C                   stops an answer'''
HELP_ZH = '''\
/help、/?                显示本帮助
/reset                   开始新的对话
/system 文本             设置系统提示词；不带文本则取消
/again                   重新回答上一个问题
/undo                    删除上一个问题及其回答
/save 文件、/load 文件   保存或载入对话，格式为一行训练数据
/thinking on|off|auto    回答前是否先思考；auto 由模型决定
/tools                   显示模型可以调用的工具
/tools 文件              再提供文件中 JSON schema 描述的工具；/tools off 则不提供任何工具
/set                     显示各项设置
/set temperature 0.7     修改一项设置
exit、quit               退出；/exit、/quit 和 Ctrl-D 也可以
"""                      多行文本的开头和结尾；直接粘贴时不需要
Ctrl-C                   停止正在生成的回答'''

CHATS = "{name}: type a message and press Enter; /help lists commands."
CONTINUES = "{name}: type a beginning and press Enter; Ctrl-D leaves."
EXAMPLES = "for example:"
WEIGHTS = "weights, newest first:"
MORE_WEIGHTS = "and {count} more"
HOW_TO_LEAVE = "(Ctrl-D or /quit leaves)"
RESET = "a new conversation"
SYSTEM = "system message: {text}"
NO_SYSTEM = "system message: none"
REMOVED = "removed: {text}"
SAVED = "saved {path}"
LOADED = "{count} messages"
CUT = "(cut after {count} tokens; /set max_new_tokens {more} allows more, then /again)"
CONTEXT_FULL = "(cut: the model's context of {context} tokens is full; /reset begins anew)"
LEFT_OUT = (
    "older exchanges are left out: of those before a question the last {count} stay (--history_cnt)"
)
SPEED = "({count} tokens in {seconds:.1f} s: {rate:.1f} tokens/s, the first after {first:.2f} s)"
NO_COMMAND = "/{name}: no such command; /help lists them"
EMPTY = "/{name}: the conversation is empty"
NO_FILE_NAME = "/{name}: needs the name of a file"
TOOLS = "tools: {names}"
NO_TOOLS = "tools: none"
THINKING = "thinking: {name}"
NO_SUCH_THINKING = "/thinking takes one of {names}"
BROKEN_CALL = "(a call of a tool that is not valid counts as text)"
NOT_RUN = "(the answer ends with a call that nothing here runs)"
NO_SUCH_SETTING = "/set takes a value for one of {names}"
BAD_SETTING = "/set {name}: {reason}"
BAD_TEXT = "the text is not usable: {reason}"
TOO_LONG = "the text is too long: {count} tokens fill the model's max_seq_len {context}"
BAD_CONVERSATION = "the conversation is not usable: {reason}"
NO_ANSWER_AT_END = "it does not end with an answer"

CHINESE = {
    HELP: HELP_ZH,
    CHATS: "{name}：输入消息并按回车；/help 列出命令。",
    CONTINUES: "{name}：输入开头并按回车，模型会接着写；Ctrl-D 退出。",
    EXAMPLES: "例如：",
    WEIGHTS: "权重，从新到旧：",
    MORE_WEIGHTS: "还有 {count} 份",
    HOW_TO_LEAVE: "（按 Ctrl-D 或输入 /quit 退出）",
    RESET: "新的对话",
    SYSTEM: "系统提示词：{text}",
    NO_SYSTEM: "系统提示词：无",
    REMOVED: "已删除：{text}",
    SAVED: "已保存到 {path}",
    LOADED: "{count} 条消息",
    CUT: "（回答在 {count} 个 token 处截断；用 /set max_new_tokens {more} 放宽，再输入 /again）",
    CONTEXT_FULL: "（回答被截断：模型的上下文（{context} 个 token）已满；/reset 开始新的对话）",
    LEFT_OUT: "更早的对话不再发给模型：只保留当前问题之前的 {count} 轮（--history_cnt）",
    SPEED: "（{count} 个 token，{seconds:.1f} 秒：每秒 {rate:.1f} 个，首个用时 {first:.2f} 秒）",
    NO_COMMAND: "/{name}：没有这个命令；/help 列出所有命令",
    EMPTY: "/{name}：对话是空的",
    NO_FILE_NAME: "/{name}：需要文件名",
    TOOLS: "工具：{names}",
    NO_TOOLS: "工具：无",
    THINKING: "思考：{name}",
    NO_SUCH_THINKING: "/thinking 的取值为 {names}",
    BROKEN_CALL: "（无效的工具调用按文本处理）",
    NOT_RUN: "（回答以工具调用结尾，这里没有可以运行它的工具）",
    NO_SUCH_SETTING: "/set 可以修改：{names}",
    BAD_SETTING: "/set {name}：取值无效（{reason}）",
    BAD_TEXT: "无法使用这段文本：{reason}",
    TOO_LONG: "文本太长：{count} 个 token 占满了模型的 max_seq_len {context}",
    BAD_CONVERSATION: "无法使用这段对话：{reason}",
    NO_ANSWER_AT_END: "对话没有以回答结尾",
}
