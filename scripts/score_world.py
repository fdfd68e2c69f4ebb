"""Score models on the held-out test of the sample world, by skill and language.

    python scripts/score_world.py pretrain=out/pretrain_256.pth full_sft=out/full_sft_256.pth
    python scripts/score_world.py adapted=out/full_sft_256.pth+out/lora/identity_256.pth
    python scripts/score_world.py out/full_sft_256.pth --history 0 1 2 4 7 9

Each score has its 95 % interval, and the scorecard also has the chance level
and an untrained model.

With --history N, a question comes after N exchanges of the same conversation. Their questions are
of training's kinds and wordings, in both languages, drawn for this purpose; none is in a test.
Their answers are the model's own, right or wrong. There are 32 such beginnings, which the questions
of the test share in turn: so they are generated and read once. All models are asked after the first
number of exchanges, the last one named after the others too.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import (
    UserError,
    add_tokenizer_path,
    make_parser,
    named_path,
    non_negative_float,
    non_negative_int,
    report_os_errors,
    report_user_errors,
    user_path,
)
from inference import ChatModel, add_engine
from inference.answers import generate_answers
from model import (
    LMConfig,
    MiniMindLM,
    Tokenizer,
    choose_device,
    load_lora,
    load_model,
    load_tokenizer,
    tokenizer_folder,
    tokenizer_hash,
)
from sample_world import (
    EXCHANGES,
    SAMPLE,
    SEED,
    build_world,
    ensure_sample,
    format_examples,
    format_scorecard,
    history_questions,
    read_test,
    score_answers,
)

UNTRAINED = "untrained"
LONGEST_ANSWER = 48  # tokens
TOP_P = 0.9  # as in a chat
ROWS = 64  # answers at a time
HISTORIES = 32  # different beginnings of conversations

Messages = list[dict[str, str]]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "weights",
        nargs="+",
        type=named_path,
        metavar="[NAME=]PATH[+ADAPTER]",
        help=".pth files to score, as they are or with an adapter's .pth file",
    )
    add("--data_path", type=user_path, default=SAMPLE / "test.jsonl")
    add(
        "--history",
        nargs="+",
        type=non_negative_int,
        default=[0, 5],
        metavar="N",
        help="exchanges before each question",
    )
    add("--temperature", type=non_negative_float, default=0.0, help="0: greedy; 0.8: as in a chat")
    add("--out", type=user_path, help="write the scorecard here too, as Markdown")
    add("--json", type=user_path, help="write each model's share per skill here too")
    add_engine(parser)
    add("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    add_tokenizer_path(parser, default=None)
    args = parser.parse_args()
    names = [UNTRAINED, *(name for name, _ in args.weights)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are named {name}; name them: name=path")
    if max(args.history) >= EXCHANGES:
        raise UserError(f"--history {max(args.history)}: at most {EXCHANGES - 1} exchanges")
    for flag, path in {"--out": args.out, "--json": args.json}.items():
        if path and not path.parent.is_dir():
            raise UserError(f"{flag} {path}: there is no such folder")
    return args


def load(path: Path, shape: LMConfig, tokenizer_hash: str) -> MiniMindLM:
    """Load a .pth file, or `base.pth+adapter.pth`; the other arguments are `load_model`'s."""
    base = base_path(path)
    model = load_model(base, shape, tokenizer_hash)
    if base != path:
        load_lora(model, user_path(str(path).removeprefix(f"{base}+")))
    return model


def base_path(path: Path) -> Path:
    """The file of the weights of `base.pth+adapter.pth`, or of weights alone."""
    base, plus, _ = str(path).partition(".pth+")
    return Path(f"{base}.pth") if plus and not path.is_file() else path


def answer(
    model: MiniMindLM,
    records: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    engine: str | None = None,
    exchanges: Sequence[int] = (0,),
    temperature: float = 0.0,
) -> list[list[str]]:
    """The model's answers to the questions of a test, after each number of `exchanges`.

    For `engine` see ChatModel. A temperature of 0 is greedy; others sample with TOP_P.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "seed": 0}
    options = {"max_new_tokens": LONGEST_ANSWER, **(sampling if temperature else {})}
    chat_model = ChatModel("", model, tokenizer, chats=True, engine=engine, rows=ROWS)

    def ask(conversations: Sequence[Messages]) -> list[str]:
        prompts = [chat_model.chat_ids(messages) for messages in conversations]
        answers = generate_answers(chat_model, prompts, **options)
        return [message["content"] for message in answers]

    asked = history_questions(build_world(SEED), SEED, HISTORIES) if max(exchanges) else [[]]
    histories: list[Messages] = [[] for _ in asked]
    for questions in list(zip(*asked, strict=True))[: max(exchanges)]:
        for history, question in zip(histories, questions, strict=True):
            history.append({"role": "user", "content": question})
        for history, text in zip(histories, ask(histories), strict=True):
            history.append({"role": "assistant", "content": text})
    return [
        ask(
            [
                [*histories[i % len(histories)][: 2 * number], *record["conversations"][:1]]
                for i, record in enumerate(records)
            ]
        )
        for number in exchanges
    ]


def main() -> None:
    """Score the weights, and print and write what was asked for."""
    args = parse_args()
    records = read_test(ensure_sample(args.data_path))
    device = choose_device(args.device)
    _, first = args.weights[0]
    tokenizer = load_tokenizer(tokenizer_folder(args.tokenizer_path, base_path(first)))
    shape, digest = LMConfig(vocab_size=len(tokenizer)), tokenizer_hash(tokenizer)
    models = {name: load(path, shape, digest) for name, path in args.weights}
    *_, last = models
    torch.manual_seed(0)
    models = {UNTRAINED: MiniMindLM(models[last].config), **models}
    answers = {}
    for name, model in models.items():
        exchanges = args.history if name == last else args.history[:1]
        model = model.to(device).eval()
        given = answer(model, records, tokenizer, args.engine, exchanges, args.temperature)
        columns = [name, *(f"{name}, after {number}" for number in exchanges[1:])]
        answers |= zip(columns, given, strict=True)
    scores = {name: score_answers(records, given) for name, given in answers.items()}
    table = format_scorecard(scores)
    if args.history[0]:
        table = f"After {args.history[0]} exchanges:\n\n{table}"
    examples = format_examples(records, answers[last])
    print(f"{table}\nAnswers of {last} (+ right, - wrong):\n{examples}")
    skills = {
        name: {skill: score.share for (skill, language), score in given.items() if not language}
        for name, given in scores.items()
    }
    shares = ", ".join(f"{skill} {share:.1%}" for skill, share in skills[last].items())
    print(f"\n{last}: {shares}")
    for path, text in ((args.json, json.dumps(skills, indent=2)), (args.out, table)):
        if path:
            with report_os_errors(path):
                path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with report_user_errors():
        main()
