"""Where a model is wrong: its loss per token on a data set, by role, position and language.

    python scripts/analyze_loss.py out/full_sft_512.pth my_val.jsonl --out_dir loss

Prints mean, percentiles, a table for each grouping and the ten worst samples, in 80 columns, and
writes `loss.json` and `loss.png` into `--out_dir`. Tokens that training does not learn are scored
too, in lines of their own.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import importlib.util
import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from show_batch import add_data_flags, open_dataset

from common import (
    UserError,
    make_parser,
    positive_int,
    report_os_errors,
    report_user_errors,
    user_path,
)
from dataset import PaddedRows, PretrainDataset, SFTDataset, collate, language
from model import (
    LMConfig,
    MiniMindLM,
    Tokenizer,
    choose_device,
    load_model,
    load_tokenizer,
    token_losses,
    tokenizer_folder,
    tokenizer_hash,
)
from training import check_context

PERCENTILES = (5, 25, 50, 75, 95, 99)
NAMES = tuple(f"p{p}" for p in PERCENTILES)
WORST = 10
COLUMNS = 80
EXPLANATION = """\
Losses are in nats per token; ppl is e^mean; p95: 95 % of the tokens are below.
learnt: the targets of training. only read: the rest, such as questions.
by role: tokens of the messages of a role, all of them and the learnt ones.
by position: learnt tokens by their place in the sample, from 0 on.
by language: learnt tokens by the language of the sample."""

Losses = dict[str, dict[str, np.ndarray]]  # by grouping and group


class Sample(NamedTuple):
    """The losses of one sample, an entry for each id after the first."""

    index: int
    text: str  # control tokens included
    losses: np.ndarray  # (T,) float32, in nats
    learnt: np.ndarray  # (T,) bool, whether training learns the token
    roles: np.ndarray  # (T,) str, role of the message that the token belongs to, or "text"


@torch.no_grad()
def score_samples(
    model: MiniMindLM,
    dataset: PretrainDataset | SFTDataset,
    tokenizer: Tokenizer,
    batch_size: int,
    max_samples: int | None,
) -> Iterator[Sample]:
    """Score the first samples of a data set, or all, those of similar length together."""
    order = np.argsort(dataset.lengths(0, max_samples), kind="stable").tolist()
    rows, is_chat = PaddedRows(dataset), isinstance(dataset, SFTDataset)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen])
        everything = {**batch, "loss_mask": torch.ones_like(batch["loss_mask"])}
        losses, *_ = token_losses(model, {key: v.to(model.device) for key, v in everything.items()})
        for index, row in zip(chosen, losses.cpu().numpy(), strict=True):
            inputs, targets, mask = dataset[index]
            yield Sample(
                index,
                tokenizer.decode(torch.cat((inputs[:1], targets)), skip_special_tokens=False),
                row[: len(mask)],
                (mask > 0).numpy(),
                np.array(dataset.roles(index)[1:] if is_chat else ["text"] * len(mask)),
            )


def group_losses(samples: Sequence[Sample]) -> Losses:
    """The losses of all tokens by grouping and group: all, role, position, language.

    Position and language count learnt tokens alone; the ranges of positions double.
    """
    _, texts, *columns = zip(*samples, strict=True)
    losses, learnt, roles = map(np.concatenate, columns)
    lengths = list(map(len, columns[0]))
    languages = np.repeat(list(map(language, texts)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])

    by_role = {}
    for role in dict.fromkeys(roles):
        by_role[role] = roles == role
        if not learnt[by_role[role]].all():
            by_role[f"{role}, learnt"] = by_role[role] & learnt
    ranges = [(0, 16), *((1 << bits, 2 << bits) for bits in range(4, max(lengths).bit_length()))]
    groups = {
        "all": {"learnt": learnt, "only read": ~learnt},
        "role": by_role,
        "position": {
            f"{low} to {high - 1}": learnt & (positions >= low) & (positions < high)
            for low, high in ranges
        },
        "language": {name: learnt & (languages == name) for name in dict.fromkeys(languages)},
    }
    return {
        grouping: {name: losses[mask] for name, mask in masks.items() if mask.any()}
        for grouping, masks in groups.items()
    }


def figures(losses: np.ndarray) -> dict[str, float]:
    """Number, mean, perplexity and percentiles of some tokens' losses, in nats."""
    values = np.percentile(losses, PERCENTILES)
    mean = float(losses.mean(dtype=np.float64))
    named = dict(zip(NAMES, values.tolist(), strict=True))
    return {"tokens": len(losses), "mean": mean, "perplexity": np.exp(min(mean, 700)), **named}


def table_text(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """The figures of every group as a plain table of at most 80 columns, usual names assumed."""
    lines = [f"{'':19}{'tokens':>10}{'mean':>7}{'ppl':>8}" + "".join(f"{p:>6}" for p in NAMES)]
    for grouping, table in tables.items():
        lines.append(f"by {grouping}" if grouping != "all" else grouping)
        for group, row in table.items():
            perplexity = row["perplexity"]
            ppl = f"{perplexity:,.1f}" if perplexity < 1e4 else f"{perplexity:.0e}"
            cells = f"{row['tokens']:>10,}{row['mean']:>7.3f}{ppl:>8}"
            lines.append(f" {group:18}{cells}" + "".join(f"{row[p]:>6.2f}" for p in NAMES))
    return "\n".join(lines)


def cut(text: str, columns: int) -> str:
    """The beginning of a text that fits into so many columns of a terminal."""
    for end, char in enumerate(text):
        columns -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if columns < 0:
            return text[:end]
    return text


def draw(tables: Losses, path: Path) -> None:
    """Draw the distribution of the losses and their mean by position, role and language, as PNG."""
    from matplotlib.figure import Figure  # which printing alone does not need

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    axes[0, 0].hist(tables["all"]["learnt"], bins=60, color="tab:green")
    axes[0, 0].set(title="learnt tokens", xlabel="loss (nats)", ylabel="tokens", yscale="log")
    for ax, grouping in zip(axes.flat[1:], ("position", "role", "language"), strict=True):
        means = {group: losses.mean() for group, losses in tables[grouping].items()}
        ax.bar(list(means), list(means.values()), color="tab:blue")
        ax.set(title=f"by {grouping}", ylabel="mean loss (nats)")
        ax.tick_params(axis="x", labelrotation=30)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Score, print, write."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("weights", type=user_path, help=".pth file")
    parser.add_argument("data_path", type=user_path, help="JSONL file of texts or conversations")
    parser.add_argument("--out_dir", type=user_path, help="where loss.json and loss.png go")
    parser.add_argument("--max_samples", type=positive_int, help="score the first ones only")
    parser.add_argument("--batch_size", type=positive_int, default=8)
    add_data_flags(parser, tokenizer=None)
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    args = parser.parse_args()
    if args.out_dir:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--out_dir needs matplotlib: pip install -r scripts/requirements.txt")
        with report_os_errors(f"--out_dir {args.out_dir}"):
            args.out_dir.mkdir(parents=True, exist_ok=True)
    device = choose_device(args.device)
    tokenizer = load_tokenizer(tokenizer_folder(args.tokenizer_path, args.weights))
    shape = LMConfig(vocab_size=len(tokenizer))
    model = load_model(args.weights, shape, tokenizer_hash(tokenizer)).to(device).eval()
    check_context(args.max_seq_len, model.config)
    dataset = open_dataset(args, tokenizer)
    samples = list(score_samples(model, dataset, tokenizer, args.batch_size, args.max_samples))
    losses = group_losses(samples)
    shown = {
        grouping: {group: figures(found) for group, found in table.items()}
        for grouping, table in losses.items()
    }
    print(table_text(shown))
    print(EXPLANATION)
    means = [s.losses[s.learnt].mean(dtype=np.float64) for s in samples]
    worst = [
        f"{mean:.4f}  {dataset.place(s.index)}  {' '.join(s.text.split())[:100]}"
        for mean, s in sorted(zip(means, samples, strict=True), key=lambda pair: -pair[0])[:WORST]
    ]
    print("the worst samples, by mean loss of learnt tokens")
    print("\n".join(cut(line, COLUMNS) for line in worst))
    if args.out_dir:
        with report_os_errors(f"--out_dir {args.out_dir}"):
            text = json.dumps({**shown, "worst": worst}, ensure_ascii=False, indent=2)
            (args.out_dir / "loss.json").write_text(text, encoding="utf-8")
            draw(losses, args.out_dir / "loss.png")
        print(args.out_dir / "loss.png")


if __name__ == "__main__":
    with report_user_errors():
        main()
