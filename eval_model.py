"""Chat with a trained model, continue texts with a pretrained one, or score either.

python eval_model.py                          (chat with the newest weights in out/)
python eval_model.py --lora_name identity --quantize int8     (on what it was trained on)
python eval_model.py --prompt "你是谁？" --temperature 0
python eval_model.py --input_file questions.jsonl --output_file answers.jsonl
python eval_model.py --score held_out.jsonl
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import (
    Translate,
    UserError,
    add_lang,
    add_skip_bad_lines,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    positive_unit_interval,
    report_os_errors,
    report_user_errors,
    seed,
    translator,
    unit_interval,
    user_path,
)
from dataset import Place, RecordError, locate, parse_chat, read_records
from dataset.messages import parse_tools
from inference import (
    THINKING,
    ChatModel,
    add_answer_arguments,
    add_compute_arguments,
    add_history_cnt,
    add_weight_arguments,
    chosen_engine,
    describe_weights,
    load_chat_model,
    named_weights,
)
from inference import chat_texts as texts
from inference.answers import answer_file, read_questions
from inference.conversations import Conversation
from inference.parts import Delta
from inference.scoring import score
from inference.terminal import AnswerPrinter
from inference.tools import Tool, answer_in_rounds, find_tools, tool_name
from model import choose_device

# Flags that /set changes too: type, default, help.
SETTINGS: dict[str, tuple[Callable[[str], Any], float, str]] = {
    "max_new_tokens": (positive_int, 512, "most new tokens of an answer"),
    "temperature": (non_negative_float, 0.8, "0: greedy"),
    "top_k": (non_negative_int, 0, "sample from this many most probable tokens; 0: all"),
    "top_p": (
        positive_unit_interval,
        0.9,
        "sample from the fewest tokens whose probabilities sum to this",
    ),
    "min_p": (unit_interval, 0.0, "drop tokens below this share of the highest probability"),
    "repetition_penalty": (positive_float, 1.0, "above 1: lowers tokens that occurred before"),
}
LEAVING = ("exit", "quit", "/exit", "/quit")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Chat with a trained MiniMind, or score it.")
    models = parser.add_argument_group("model")
    add_weight_arguments(models)
    add_compute_arguments(models)
    writing = parser.add_argument_group("writing")
    add = writing.add_argument
    for name, (kind, default, help_) in SETTINGS.items():
        add(f"--{name}", type=kind, default=default, help=help_)
    add("--seed", type=seed, help="default: a new one each time")
    add("--system", type=without_stray_bytes, help="system message")
    add_answer_arguments(writing)
    add_history_cnt(writing)
    add("--verbose", action="store_true", help="show tokens per second after each answer")
    add_lang(writing)
    instead = parser.add_argument_group("instead of a conversation")
    add = instead.add_mutually_exclusive_group().add_argument
    add("--prompt", type=without_stray_bytes, help="answer or continue this text and end")
    add(
        "--input_file",
        type=user_path,
        help='answer every line: {"prompt"}, conversations, {"text"}',
    )
    add("--score", type=user_path, metavar="DATA", help="score the model on texts or conversations")
    instead.add_argument("--output_file", type=user_path, help="where the answers, or scores, go")
    instead.add_argument("--batch_size", type=positive_int, default=16, help="lines at a time")
    add_skip_bad_lines(instead)
    args = parser.parse_args()
    if args.input_file is not None and args.output_file is None:
        raise UserError("--input_file needs --output_file")
    if args.output_file is not None and args.input_file is None and args.score is None:
        raise UserError("--output_file needs --input_file or --score")
    reads_file = args.input_file is not None or args.score is not None
    if reads_file and (args.tools or args.tool_file is not None):
        raise UserError("--tools, --tool_file: the lines of a file have tools of their own")
    return args


def without_stray_bytes(text: str) -> str:
    """Replace what a command line holds beside UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def generation_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as options of `MiniMindLM.generate`: temperature 0 is greedy."""
    options = {name: settings[name] for name in SETTINGS}
    return {**options, "do_sample": options["temperature"] > 0}


@dataclass
class Chat:
    """A conversation in a terminal."""

    chat_model: ChatModel
    settings: dict[str, Any]  # those of SETTINGS and others
    generator: torch.Generator
    conversation: Conversation
    say: Translate
    verbose: bool = False
    tools: dict[str, Tool] = field(default_factory=dict)  # those that can be run

    @property
    def enable_thinking(self) -> bool | None:
        """Whether answers begin with a thought; None leaves it to the model."""
        return THINKING[self.settings["thinking"]]

    def respond(self, text: str) -> None:
        """Print the model's answer to a text as it is generated; Ctrl-C ends it.

        Thoughts, calls of tools and what is to say about the answer go to stderr. Raises UserError
        if the text is too long, or the tokenizer lacks a control token it needs.
        """
        question = {"role": "user", "content": text}
        before = [*self.conversation.prompt(), question]
        made = self.write("" if self.chat_model.chats else text, before)
        if self.chat_model.chats:
            self.conversation.messages += [question, *made]

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of the newest messages, as many as fit; errors as of `respond`."""
        recent = self.chat_model.recent(
            messages, lambda kept: self.note(texts.LEFT_OUT, count=kept)
        )
        try:
            room = self.settings["max_new_tokens"]
            offered, thinks = self.conversation.tools, self.enable_thinking
            ids = self.chat_model.chat_ids(recent, offered, room, thinks)
        except RecordError as error:  # of a conversation that was loaded
            raise UserError(self.say(texts.BAD_CONVERSATION, reason=error)) from None
        if len(ids) >= self.chat_model.context:
            values = {"count": len(ids), "context": self.chat_model.context}
            raise UserError(self.say(texts.TOO_LONG, **values))
        return ids

    def write(self, beginning: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Print `beginning` and the answer to messages; returns the messages that it consists of.

        These are the assistant's and those of the tools that it calls.
        """
        made, tokens, stopped = [], [], False
        n_prompt = n_before = 0  # tokens of the last prompt, and new ones before it
        start, first = time.perf_counter(), None
        options = {**generation_options(self.settings), "enable_thinking": self.enable_thinking}
        printer = AnswerPrinter()

        def stream(messages: list[dict[str, Any]]) -> Iterator[Delta]:
            nonlocal n_prompt, n_before
            ids = self.prompt_ids(messages)
            if not tokens:
                print(beginning, end="", flush=True)
            n_prompt, n_before = len(ids), len(tokens)
            return self.chat_model.stream(ids, self.generator, tokens, **options)

        rounds = answer_in_rounds(
            stream, messages, made, self.conversation.tools, self.tools, self.enable_thinking
        )
        try:
            for delta in rounds:
                first = first or time.perf_counter()
                printer.show(delta)
        except ValueError as error:
            raise UserError(self.say(texts.BAD_TEXT, reason=error)) from None
        except KeyboardInterrupt:
            print(" …", end="")
            stopped = True
        printer.end_part()
        end = time.perf_counter()
        is_cut = not stopped and tokens[-1] != self.chat_model.tokenizer.eos_token_id
        if is_cut and self.chat_model.chats:
            self.note_cut(n_prompt, len(tokens) - n_before)
        elif made[-1].get("tool_calls"):
            self.note(texts.NOT_RUN)
        if any("broken_calls" in message for message in made):
            self.note(texts.BROKEN_CALL)
        if self.verbose and tokens:
            seconds, first = end - start, (first or end) - start
            values = {"count": len(tokens), "rate": len(tokens) / seconds}
            self.note(texts.SPEED, seconds=seconds, first=first, **values)
        return made

    def note_cut(self, prompt: int, new: int) -> None:
        """Tell why an answer of `new` tokens was cut, after a prompt of so many."""
        if prompt + new >= self.chat_model.context:
            self.note(texts.CONTEXT_FULL, context=self.chat_model.context)
        else:
            self.note(texts.CUT, count=new, more=2 * new)

    def note(self, text: str, /, **values: object) -> None:
        """Print a notice, which is no part of the conversation, to stderr."""
        print(self.say(text, **values), file=sys.stderr, flush=True)

    def run_command(self, line: str) -> None:
        """Run a line that begins with a slash. Raises UserError if that is not possible."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("help", "?"):
            print(self.say(texts.HELP))
        elif name == "reset":
            old = self.conversation
            self.conversation = Conversation(old.system, tools=old.tools)
            print(self.say(texts.RESET))
        elif name == "system":
            self.conversation.system = rest
            print(self.say(texts.SYSTEM, text=rest) if rest else self.say(texts.NO_SYSTEM))
        elif name in ("again", "undo"):
            if not self.conversation.messages:
                raise UserError(self.say(texts.EMPTY, name=name))
            if name == "again":
                self.respond_again()
            else:
                print(self.say(texts.REMOVED, text=self.conversation.undo()))
        elif name in ("save", "load"):
            if not rest:
                raise UserError(self.say(texts.NO_FILE_NAME, name=name))
            (self.save if name == "save" else self.load)(user_path(rest))
        elif name == "thinking":
            if rest and rest not in THINKING:
                raise UserError(self.say(texts.NO_SUCH_THINKING, names=", ".join(THINKING)))
            self.settings["thinking"] = rest or self.settings["thinking"]
            print(self.say(texts.THINKING, name=self.settings["thinking"]))
        elif name == "tools":
            self.offer(rest)
        elif name == "set":
            self.set(*rest.split(maxsplit=1))
        else:
            raise UserError(self.say(texts.NO_COMMAND, name=name))

    def respond_again(self) -> None:
        """Replace the last answer by another one. If that is a UserError, the old one stays."""
        before = list(self.conversation.messages)
        try:
            self.respond(self.conversation.undo())
        except UserError:
            self.conversation.messages = before
            raise

    def set(self, name: str = "", value: str = "") -> None:
        """Change a setting, or show all."""
        if not name:
            print("\n".join(f"{name} {self.settings[name]}" for name in SETTINGS))
            return
        if name not in SETTINGS:
            raise UserError(self.say(texts.NO_SUCH_SETTING, names=", ".join(SETTINGS)))
        try:
            self.settings[name] = SETTINGS[name][0](value)
        except argparse.ArgumentTypeError as error:
            raise UserError(self.say(texts.BAD_SETTING, name=name, reason=error)) from None

    def offer(self, file: str) -> None:
        """Offer the tools of a file of schemas too, or none if it is "off"; then show them."""
        tools = self.conversation.tools
        if file == "off":
            tools = []
        elif file:
            try:
                with report_os_errors(f"/tools {file}"):
                    found = parse_tools(user_path(file).read_text(encoding="utf-8").strip())
            except (RecordError, UnicodeError) as error:
                raise UserError(f"/tools {file}: {error}") from None
            names = [tool_name(schema) for schema in found]
            tools = [schema for schema in tools if tool_name(schema) not in names] + found
        self.conversation.tools = tools
        names = ", ".join(map(tool_name, tools))
        print(self.say(texts.TOOLS, names=names) if names else self.say(texts.NO_TOOLS))

    def save(self, path: Path) -> None:
        """Write the conversation as a line of training data; an older file is kept."""
        with report_os_errors(f"/save {path}"), path.open("x", encoding="utf-8") as file:
            file.write(self.conversation.training_line())
        print(self.say(texts.SAVED, path=path))

    def load(self, path: Path) -> None:
        """Continue the first conversation in a file."""
        try:
            place, record = next(read_records(path), (Place("", 1), b""))
            messages, tools = parse_chat(record)
            if messages[-1]["role"] != "assistant":
                raise RecordError(self.say(texts.NO_ANSWER_AT_END))
        except UserError as error:
            raise UserError(f"/load {error}") from None
        except RecordError as error:
            raise UserError(f"/load {locate(path, place)}: {error}") from None
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        self.conversation = Conversation(system, messages=messages, tools=tools)
        print(self.say(texts.LOADED, count=len(messages)))


def typed_texts(say: Translate) -> Iterator[str]:
    """The texts that the user types or pastes, until the input ends; empty ones left out."""
    while True:
        try:
            text = input("> ").rstrip("\n")  # of a paste, all lines
            if text.startswith('"""'):
                text = text[3:]
                while not text.endswith('"""'):
                    text += "\n" + input("… ")
                text = text[:-3].strip("\n")
        except KeyboardInterrupt:
            print("\n" + say(texts.HOW_TO_LEAVE))
            continue
        except EOFError:
            print()
            return
        if text.strip().lower() in LEAVING:
            return
        if text.strip():
            yield text


def converse(chat: Chat) -> None:
    """Answer what is typed until the user leaves."""
    sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end
    with contextlib.suppress(ImportError):  # Windows' own terminal edits lines by itself
        import readline  # it gives `input` its editing and history

        # The terminal marks where a paste begins and ends, so that its line ends send nothing off.
        # Python turns this off; libedit, in readline's place on a Mac, ignores the line.
        readline.parse_and_bind("set enable-bracketed-paste on")
    chats = chat.chat_model.chats
    print(chat.say(texts.CHATS if chats else texts.CONTINUES, name=chat.chat_model.name))
    if chats and chat.chat_model.examples:
        print(chat.say(texts.EXAMPLES), *chat.chat_model.examples, sep="\n  ")
    for text in typed_texts(chat.say):
        try:
            if chats and text.startswith("/") and "\n" not in text:
                chat.run_command(text)
            else:
                chat.respond(text)
        except UserError as error:
            print(error)


def main() -> None:
    """Answer one text, a file of them, or what is typed; or score the model."""
    args = parse_args()
    device = choose_device(args.device)
    reads_file = args.input_file is not None or args.score is not None
    rows = args.batch_size if reads_file else 1
    say = translator(args.lang, texts.CHINESE)
    if args.weight is None and args.lora_name is None:
        for line in describe_weights(args.out_dir, say):
            print(line, file=sys.stderr)  # where it is no part of an answer
    chat_model = load_chat_model(named_weights(args), device, chosen_engine(args), rows)
    if not chat_model.chats and (args.thinking != "auto" or args.tools or args.tool_file):
        raise UserError(f"--thinking, --tools, --tool_file: {chat_model.name} continues texts")
    random_seed = secrets.randbits(63) if args.seed is None else args.seed
    generator = torch.Generator(device).manual_seed(random_seed)
    if args.score is not None:
        new, bad = args.max_new_tokens, args.skip_bad_lines
        score(chat_model, args.score, args.output_file, new, bad, THINKING[args.thinking])
        return
    if args.input_file is not None:
        system, thinks = args.system, THINKING[args.thinking]
        questions = read_questions(chat_model, args.input_file, args.skip_bad_lines, system, thinks)
        options = {**generation_options(vars(args)), "generator": generator}
        answer_file(chat_model, questions, args.output_file, options)
        return
    tools = find_tools(args.tools, args.tool_file)
    schemas = [tool.schema for tool in tools.values()]
    conversation = Conversation(system=args.system or "", tools=schemas)
    if args.history_cnt is not None:
        chat_model.history_cnt = args.history_cnt
    chat = Chat(chat_model, vars(args), generator, conversation, say, args.verbose, tools)
    if args.prompt is not None:
        chat.respond(args.prompt)
    else:
        converse(chat)


if __name__ == "__main__":
    with report_user_errors():
        main()
