"""Score models on the held-out test of the sample world, by skill and language.

    python scripts/score_world.py pretrain=out/pretrain_256.pth full_sft=out/full_sft_256.pth
    python scripts/score_world.py adapted=out/full_sft_256.pth+out/lora/identity_256.pth

The answers are greedy. The scorecard also has the chance level and an untrained model.
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
    SAMPLE,
    ensure_sample,
    format_examples,
    format_scorecard,
    read_test,
    score_answers,
)

UNTRAINED = "untrained"
LONGEST_ANSWER = 48  # tokens
ROWS = 64  # answers at a time


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
) -> list[str]:
    """The model's greedy answers to the questions of a test; for `engine` see ChatModel."""
    chat_model = ChatModel("", model, tokenizer, chats=True, engine=engine, rows=ROWS)
    prompts = [chat_model.chat_ids(record["conversations"][:1]) for record in records]
    return generate_answers(chat_model, prompts, max_new_tokens=LONGEST_ANSWER)


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
    answers = {
        name: answer(model.to(device).eval(), records, tokenizer, args.engine)
        for name, model in models.items()
    }
    scores = {name: score_answers(records, given) for name, given in answers.items()}
    table = format_scorecard(scores)
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
