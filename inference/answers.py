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
    reference: str | None  # the answer in the line itself, if it has one


def read_questions(
    chat_model: ChatModel, path: Path, system: str | None, skip_bad_lines: float
) -> list[Question]:
    """Read the lines of a JSONL file: conversations, or texts for pretrained weights to continue.

    Conversations without a system message get `system`. Raises UserError, which names the lines
    that cannot be answered, if they are more than the share `skip_bad_lines` or all.
    """
    questions, bad = [], BadLines()
    for place, record in read_records(path):
        bad.total += 1
        try:
            questions.append(parse_line(chat_model, record, system))
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


def parse_line(chat_model: ChatModel, line: Record, system: str | None) -> Question:
    """The question on a line; for arguments see `read_questions`. Raises RecordError."""
    reference = None
    if chat_model.encoder is None:
        text = parse_text(line)
        ids = chat_model.text_ids(text)
    else:
        (messages, tools), reference = parse_question(line)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        ids, text = chat_model.chat_ids(messages, tools), messages[-1]["content"]
    if len(ids) >= chat_model.context:
        raise RecordError(f"{len(ids)} tokens leave no room in {chat_model.context}")
    return Question(parse_object(line), ids, text, reference)


def generate_answers(chat_model: ChatModel, prompts: list[list[int]], **options: Any) -> list[str]:
    """Answer prompts, as many at a time as the decoder has rows; options as of `generate`."""
    answers = chat_model.model.batch_generate(
        list(map(torch.tensor, prompts)),
        batch_size=len(chat_model.decoder.tokens),
        decoder=chat_model.decoder,
        eos_token_id=chat_model.tokenizer.eos_token_id,
        **options,
    )
    return [chat_model.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in answers]


def answer_file(
    chat_model: ChatModel, questions: Sequence[Question], out: Path, options: dict[str, Any]
) -> None:
    """Write each question's record with the answer added; raises as `new_file`.

    The field is "answer", or "response" if a record has an "answer" of its own; if there are both,
    "response_2" and so on: no field of a record is replaced.
    """
    names = chain(("answer", "response"), (f"response_{i}" for i in count(2)))
    name = next(name for name in names if not any(name in q.record for q in questions))
    with new_file(out, "utf-8") as file:
        answers = generate_answers(chat_model, [q.ids for q in questions], **options)
        for question, answer in zip(questions, answers, strict=True):
            line = json.dumps({**question.record, name: answer}, ensure_ascii=False, default=str)
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
