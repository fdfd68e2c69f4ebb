"""Answer a file of questions."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from common import UserError
from dataset import BadLines, RecordError, parse_question, parse_text, read_records

from .chat_model import ChatModel


class Question(NamedTuple):
    """A line to be answered: what it holds, its prompt as ids, and its last message.

    `reference` is the answer that the line gives itself, if it does.
    """

    record: dict[str, Any]
    ids: list[int]
    text: str
    reference: str | None


def read_questions(
    chat_model: ChatModel, path: Path, system: str | None = None, skip_bad_lines: float = 0.0
) -> list[Question]:
    """The lines of a file.

    Args:
        chat_model: who will answer: conversations, or beginnings of texts.
        path: JSONL file.
        system: a system message for conversations without one.
        skip_bad_lines: say how many lines cannot be answered, and go on without them, if they are
            at most this share.

    Raises:
        UserError: naming the lines that cannot be answered; also if all are left out.
    """
    questions, bad = [], BadLines()
    for number, line in read_records(path):
        bad.total += 1
        try:
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
        except RecordError as error:
            bad.add(number, str(error))
            continue
        questions.append(Question(json.loads(line), ids, text, reference))
    try:
        bad.check(path, skip_bad_lines if questions else 0.0)
    except UserError as error:
        kind = "" if chat_model.encoder else '; pretrained weights continue {"text"} lines'
        raise UserError(f"{error}{kind}") from None
    if bad.count:
        print(f"{bad.count:,} lines that cannot be answered left out")
    return questions


def write_answers(
    chat_model: ChatModel,
    questions: Sequence[Question],
    options: dict[str, Any],
) -> list[str]:
    """What the model answers to each, as many at a time as its decoder has rows.

    Args:
        chat_model: who answers.
        questions: in any order.
        options: of `MiniMindLM.generate`.
    """
    answers = chat_model.model.batch_generate(
        [torch.tensor(q.ids, device=chat_model.decoder.device) for q in questions],
        batch_size=len(chat_model.decoder.tokens),
        decoder=chat_model.decoder,
        eos_token_id=chat_model.tokenizer.eos_token_id,
        **options,
    )
    return [chat_model.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in answers]


def answer_file(
    chat_model: ChatModel,
    path: Path,
    out: Path,
    system: str | None,
    generator: torch.Generator,
    options: dict[str, Any],
    skip_bad_lines: float = 0.0,
) -> None:
    """Write every line of a file with an answer added to it.

    It is called "answer", or "response" where a line has an "answer" of its own; in a file that has
    both, "response_2" and so on: nothing in a line is replaced.

    Args:
        chat_model: who answers.
        path: JSONL file, see `read_questions`.
        out: where the lines go.
        system, skip_bad_lines: as for `read_questions`.
        generator: source of randomness.
        options: of `MiniMindLM.generate`.

    Raises:
        UserError: for lines that cannot be answered.
        UserError: if nothing can be written there.
    """
    questions = read_questions(chat_model, path, system, skip_bad_lines)
    names = chain(("answer", "response"), (f"response_{i}" for i in count(2)))
    name = next(name for name in names if not any(name in q.record for q in questions))
    with new_file(out, "utf-8") as file:
        answers = write_answers(chat_model, questions, {"generator": generator, **options})
        for question, answer in zip(questions, answers, strict=True):
            line = json.dumps({**question.record, name: answer}, ensure_ascii=False)
            file.write(f"{line}\n")
    print(f'{len(answers):,} answers in {out}, as "{name}"')


@contextmanager
def new_file(path: Path, encoding: str) -> Iterator[TextIO]:
    """What --output_file will hold; the file is there from the beginning, and gone if work fails.

    Half a surrogate pair, which a string of JSON may hold, is written as JSON escapes it.

    Raises:
        UserError: if the file is there already, or cannot be written.
    """
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        raise UserError(f"--output_file {path}: is there already") from None
    except OSError as error:
        raise UserError(f"--output_file {path}: {error.strerror}") from None
    try:
        text = io.StringIO(newline="")
        yield text
        try:
            path.write_bytes(text.getvalue().encode(encoding, "backslashreplace"))
        except OSError as error:
            raise UserError(f"--output_file {path}: {error.strerror}") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
