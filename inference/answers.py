"""Answer a file of questions."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from common import UserError, report_os_errors
from dataset import BadLines, RecordError, parse_question, parse_text, read_records
from dataset.fields import parse_object
from dataset.reader import Record

from .chat_model import ChatModel


class Question(NamedTuple):
    """A line to answer."""

    record: dict[str, Any]  # all that the line holds
    ids: list[int]  # of the prompt
    text: str  # its last message
    reference: dict[str, Any] | None = None  # the assistant's message after it, if there is one
    thinking: bool | None = None  # `enable_thinking` of the prompt


def read_questions(
    chat_model: ChatModel,
    path: Path,
    skip_bad_lines: float,
    system: str | None = None,
    enable_thinking: bool | None = None,
    with_calls: bool = False,
) -> list[Question]:
    """Read the lines of a JSONL file: conversations, or texts for pretrained weights to continue.

    Conversations without a system message get `system`; their prompts turn thinking on or off by
    `enable_thinking`. `with_calls`: each message of the assistant that calls tools is asked for
    too, not only the last one. Raises UserError, which names the lines that cannot be answered, if
    they are more than the share `skip_bad_lines` or all.
    """
    questions, bad = [], BadLines()
    for place, record in read_records(path):
        bad.total += 1
        try:
            found = parse_line(chat_model, record, system, enable_thinking)
            questions += found if with_calls else found[-1:]
        except RecordError as error:
            bad.add(place, str(error))
    try:
        bad.check(path, skip_bad_lines if questions else 0.0)
    except UserError as error:
        kind = "" if chat_model.encoder else '; pretrained weights continue {"text"} lines'
        raise UserError(f"{error}{kind}") from None
    if bad.count:
        print(f"{bad.count:,} lines that cannot be answered left out")
    return questions


def parse_line(
    chat_model: ChatModel,
    line: Record,
    system: str | None = None,
    enable_thinking: bool | None = None,
) -> list[Question]:
    """The questions on a line, each before a call within it, and the last one.

    For arguments see `read_questions`. Where `enable_thinking` is None, a prompt turns thinking off
    if its reference begins with an empty thought. Raises RecordError.
    """
    record = parse_object(line)
    if chat_model.encoder is None:
        text = parse_text(line)
        questions = [Question(record, chat_model.text_ids(text), text)]
    else:
        (messages, tools), reference = parse_question(line)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        asked = [i for i, message in enumerate(messages) if message.get("tool_calls")]
        questions = []
        for end in [*asked, len(messages)]:
            wanted = messages[end] if end < len(messages) else reference
            thinking = enable_thinking
            if thinking is None and wanted and wanted.get("reasoning_content") == "":
                thinking = False
            ids = chat_model.chat_ids(messages[:end], tools, None, thinking)
            text = messages[end - 1]["content"]
            questions.append(Question(record, ids, text, wanted, thinking))
    longest = max(len(question.ids) for question in questions)
    if longest >= chat_model.context:
        raise RecordError(f"{longest} tokens leave no room in {chat_model.context}")
    return questions


def generate_answers(
    chat_model: ChatModel,
    prompts: Sequence[list[int]],
    thinking: Sequence[bool | None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answer prompts, as many at a time as the decoder has rows; options as of `generate`.

    Returns messages of the assistant. `thinking` is each prompt's `enable_thinking`, or None
    without any.
    """
    answers = chat_model.model.batch_generate(
        list(map(torch.tensor, prompts)),
        batch_size=len(chat_model.decoder.tokens),
        decoder=chat_model.decoder,
        eos_token_id=chat_model.tokenizer.eos_token_id,
        **options,
    )
    thinking = [None] * len(answers) if thinking is None else thinking
    pairs = zip(answers, thinking, strict=True)
    return [chat_model.message(ids.tolist(), thinks) for ids, thinks in pairs]


def answer_file(
    chat_model: ChatModel, questions: Sequence[Question], out: Path, options: dict[str, Any]
) -> None:
    """Write each question's record with the answer added; raises as `new_file`.

    The field is "answer", or "response" if a record has an "answer" of its own; if there are both,
    "response_2" and so on: no field of a record is replaced. Beside it stand the other fields of
    the message, such as "reasoning_content" and "tool_calls".
    """
    taken = {name for question in questions for name in question.record}

    def free(*names: str) -> str:
        numbered = (f"{names[-1]}_{i}" for i in count(2))
        return next(name for name in chain(names, numbered) if name not in taken)

    name = free("answer", "response")
    prompts, thinking = [q.ids for q in questions], [q.thinking for q in questions]
    with new_file(out, "utf-8") as file:
        answers = generate_answers(chat_model, prompts, thinking, **options)
        for question, answer in zip(questions, answers, strict=True):
            made = {name: answer.pop("content")}
            made |= {free(part): value for part, value in answer.items() if part != "role"}
            line = json.dumps({**question.record, **made}, ensure_ascii=False, default=str)
            file.write(f"{line}\n")
    print(f'{len(answers):,} answers in {out}, as "{name}"')


@contextmanager
def new_file(path: Path, encoding: str) -> Iterator[TextIO]:
    """Open --output_file at once; it is removed after an error.

    Half a surrogate pair, which a string of JSON may hold, is written as its JSON escape. Raises
    UserError if the file exists or cannot be written.
    """
    with report_os_errors(f"--output_file {path}"):
        file = path.open("x", encoding=encoding, errors="backslashreplace", newline="")
        try:
            with file:
                yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise
