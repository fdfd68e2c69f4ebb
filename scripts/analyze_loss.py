"""Where a model is wrong: its loss per token on a data set, by role, position and language.

    python scripts/analyze_loss.py out/full_sft_512.pth my_val.jsonl --out_dir loss

Prints mean, percentiles, a table for each grouping and the ten worst samples, and writes
`loss.json` and `loss.png` into `--out_dir`. All tokens are scored, those that training does not
learn too; they have lines of their own.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from train_tokenizer import language

from common import (
    ROOT,
    UserError,
    add_skip_bad_lines,
    make_parser,
    positive_int,
    report_user_errors,
    user_path,
)
from dataset import ChatEncoder, PaddedRows, PretrainDataset, SFTDataset, collate, open_dataset
from model import LMConfig, MiniMindLM, load_model, load_tokenizer, tokenizer_hash
from sample_world import ensure_sample
from training import Distributed, check_context, find_processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (5, 25, 50, 75, 95, 99)
WORST = 10
TEXT = "text"  # the role of plain text


class Sample(NamedTuple):
    """One sample's losses: all arrays (T,), one entry for each id after the first.

    `losses` float32 in nats, `roles` the role whose message each token belongs to, `learnt` whether
    training learns it.
    """

    index: int
    text: str
    losses: np.ndarray
    roles: np.ndarray
    learnt: np.ndarray


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("weights", type=user_path, help=".pth file")
    parser.add_argument("data_path", type=user_path, help="JSONL file of texts or conversations")
    parser.add_argument("--out_dir", type=user_path, help="where loss.json and loss.png go")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="positions of a row")
    parser.add_argument("--max_samples", type=positive_int, help="use the first so many")
    parser.add_argument("--batch_size", type=positive_int, default=8)
    add_skip_bad_lines(parser)
    parser.add_argument(
        "--cache_dir", type=user_path, help="where token stores go; default: by the data"
    )
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    parser.add_argument(
        "--tokenizer_path",
        type=user_path,
        default=ROOT / "model" / "minimind_tokenizer",
        help="folder",
    )
    return parser.parse_args()


def roles_of(ids: list[int], encoder: ChatEncoder | None) -> list[str]:
    """The role of each id: that of the message it is in, or `TEXT` in plain text."""
    if encoder is None:
        return [TEXT] * len(ids)
    roles, role = [], TEXT
    for i, id_ in enumerate(ids):
        if id_ == encoder.start:
            role = next(
                name
                for name, head in encoder.headers.items()
                if ids[i + 1 : i + 1 + len(head)] == list(head)
            )
        roles.append(role)
    return roles


@torch.no_grad()
def score_samples(
    model: MiniMindLM,
    world: Distributed,
    dataset: PretrainDataset | SFTDataset,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    max_samples: int | None,
) -> Iterator[Sample]:
    """The losses of each sample of a data set, in an order of like lengths.

    Args:
        model: in eval mode, on the device.
        world: this process and its device.
        dataset: what to score.
        tokenizer: of the data set.
        batch_size: samples at a time.
        max_samples: the first so many, or None for all.
    """
    encoder = ChatEncoder(tokenizer) if isinstance(dataset, SFTDataset) else None
    lengths = dataset.lengths(0, max_samples)
    order = np.argsort(lengths, kind="stable").tolist()
    rows = PaddedRows(dataset)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = world.to_device(collate([rows[i] for i in chosen]))
        logits = model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
        ).logits
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none"
        ).view_as(batch["targets"])
        for row, index in enumerate(chosen):
            length = int(lengths[index])
            ids = [batch["input_ids"][row, 0].item(), *batch["targets"][row, :length].tolist()]
            yield Sample(
                index,
                tokenizer.decode(ids, skip_special_tokens=False),
                losses[row, :length].cpu().numpy(),
                np.array(roles_of(ids, encoder)[1:]),
                (batch["loss_mask"][row, :length] > 0).cpu().numpy(),
            )


def groups(samples: list[Sample]) -> dict[str, dict[str, np.ndarray]]:
    """The losses of all tokens by grouping and group: all, role, position, language.

    Position and language are of learnt tokens alone; the ranges of positions double.
    """
    tables: dict[str, dict[str, list[np.ndarray]]] = {
        "all": {},
        "role": {},
        "position": {},
        "language": {},
    }

    def add(grouping: str, group: str, losses: np.ndarray) -> None:
        if len(losses):
            tables[grouping].setdefault(group, []).append(losses)

    for sample in samples:
        learnt = sample.losses[sample.learnt]
        add("all", "learnt", learnt)
        add("all", "only read", sample.losses[~sample.learnt])
        for role in dict.fromkeys(sample.roles.tolist()):
            here = sample.roles == role
            add("role", role, sample.losses[here])
            if sample.learnt.any() and not sample.learnt[here].all():
                add("role", f"{role}, learnt", sample.losses[here & sample.learnt])
        add("language", language(sample.text), learnt)
        for low in [0, *(1 << bits for bits in range(4, len(sample.losses).bit_length()))]:
            high = max(16, 2 * low)
            here = slice(low, high)
            name = f"{low} to {high - 1}"
            add("position", name, sample.losses[here][sample.learnt[here]])
    joined = {
        grouping: {group: np.concatenate(parts) for group, parts in table.items()}
        for grouping, table in tables.items()
    }
    joined["position"] = dict(
        sorted(joined["position"].items(), key=lambda entry: int(entry[0].split()[0]))
    )
    return joined


def figures(losses: np.ndarray) -> dict[str, float]:
    """Number, mean, perplexity and percentiles of some tokens' losses, in nats."""
    values = np.percentile(losses, PERCENTILES)
    mean = float(losses.mean(dtype=np.float64))
    return {
        "tokens": len(losses),
        "mean": mean,
        "perplexity": float(np.exp(min(mean, 700))),
        **{f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)},
    }


def table_text(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """The figures of every group as a plain table."""
    names = ["tokens", "mean", "perplexity", *(f"p{p}" for p in PERCENTILES)]
    lines = [f"{'':<24}" + "".join(f"{name:>12}" for name in names)]
    for grouping, table in tables.items():
        lines.append(f"by {grouping}" if grouping != "all" else grouping)
        for group, row in table.items():
            cells = [f"{row['tokens']:>12,}", *(f"{row[name]:>12.4f}" for name in names[1:])]
            lines.append(f"  {group:<22}" + "".join(cells))
    return "\n".join(lines)


def draw(tables: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draw the distribution of the losses and their mean by position, role and language, as PNG.

    Raises:
        OSError: if the file cannot be written.
    """
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


def worst_lines(samples: list[Sample], dataset: PretrainDataset | SFTDataset) -> list[str]:
    """The samples with the highest mean loss of learnt tokens: figures, place, beginning."""
    ordered = sorted(samples, key=lambda s: -s.losses[s.learnt].mean(dtype=np.float64))
    return [
        f"{s.losses[s.learnt].mean():.4f}  {dataset.store.path}:{dataset.line_number(s.index)}  "
        f"{' '.join(s.text.split())[:100]}"
        for s in ordered[:WORST]
    ]


def make_out_dir(folder: Path) -> None:
    """Make sure, before anything is computed, that the figures can be written and drawn.

    Raises:
        UserError: if not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--out_dir needs matplotlib: pip install -r scripts/requirements.txt")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out_dir {folder}: {error.strerror}") from None


def main() -> None:
    """Score, print, write."""
    args = parse_args()
    if args.out_dir:
        make_out_dir(args.out_dir)
    world = find_processes(args.device, ddp=False)
    tokenizer = load_tokenizer(args.tokenizer_path)
    shape = LMConfig(vocab_size=len(tokenizer))
    model = load_model(args.weights, shape, tokenizer_hash(tokenizer)).to(world.device).eval()
    check_context(args.max_seq_len, model.config)
    dataset = open_dataset(
        ensure_sample(args.data_path),
        tokenizer,
        args.max_seq_len + 1,
        cache_dir=args.cache_dir,
        skip_bad_lines=args.skip_bad_lines,
    )
    for note in dataset.notes:
        print(f"{args.data_path}: {note}")
    samples = list(
        score_samples(model, world, dataset, tokenizer, args.batch_size, args.max_samples)
    )
    tables = groups(samples)
    shown = {
        grouping: {group: figures(losses) for group, losses in table.items()}
        for grouping, table in tables.items()
    }
    print(table_text(shown))
    worst = worst_lines(samples, dataset)
    print("the worst samples, by mean loss of learnt tokens\n" + "\n".join(worst))
    if args.out_dir:
        try:
            text = json.dumps({**shown, "worst": worst}, ensure_ascii=False, indent=2)
            (args.out_dir / "loss.json").write_text(text, encoding="utf-8")
            draw(tables, args.out_dir / "loss.png")
        except OSError as error:
            raise UserError(f"--out_dir {args.out_dir}: {error.strerror}") from None
        print(f"{args.out_dir / 'loss.png'}")


if __name__ == "__main__":
    with report_user_errors(UserError):
        main()
