"""Minutes of training until a model is as good as the original recipe's after its 20 minutes.

    python benchmarks/time_to_quality.py --data_path texts.jsonl --val_data_path held_out.jsonl

Four recipes train a model of one shape on the same texts, one after the other:

    original      the beginning of one document a row, padded to 512; AdamW with all parameters in
                  one group; lr/10 + lr/2 · (1 + cos), no warm-up; float32, on a GPU bfloat16
    transformers  its Llama on rows packed by best fit, as TRL's; AdamW, cosine with warm-up
    adamw         train_pretrain.py with AdamW at 5e-4, its defaults until Muon came
    now           train_pretrain.py

A schedule ends with the minutes of its recipe. Steps count, evaluations do not. --tokenizers gives
recipes tokenizers of their own; bits per byte can be compared between them.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from common import ROOT, make_parser, named_path, positive_float, positive_int, user_path
from dataset import PackedRows, PaddedRows, PretrainDataset, collate
from dataset.packing import make_loader, pad_row
from model import SIZES, LMConfig, MiniMindLM, load_tokenizer
from training.schedule import get_lr

MINUTES = {"original": 20.0, "transformers": 10.0, "adamw": 10.0, "now": 2.4}
FLAGS = {"adamw": ["--optimizer", "adamw", "--learning_rate", "5e-4"], "now": []}
EVALUATIONS = 8  # of each recipe
LENGTH, RATE = 512, 5e-4  # of rows, and of the two recipes that are not train_pretrain.py
Points = list[tuple[float, float]]  # seconds of steps so far, bits per byte


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of each target, 0 elsewhere; positions tell documents apart."""
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits.flatten(0, 1)
    losses = F.cross_entropy(logits.float(), batch["targets"].flatten(), reduction="none")
    return losses * batch["loss_mask"].flatten()


def train_peer(name: str, args: argparse.Namespace, seconds: float) -> Points:
    """Train as the original or with transformers; the points of its curve."""
    world, autocast = harness.find_device(args)
    tokenizer = load_tokenizer(args.tokenizers[name])
    texts = PretrainDataset(args.data_path, tokenizer, LENGTH + 1)
    held_out = PretrainDataset(args.val_data_path, tokenizer, LENGTH + 1)
    torch.manual_seed(args.seed)
    config = LMConfig.from_size(args.size, vocab_size=len(tokenizer))
    rows: Dataset
    if name == "original":
        model: nn.Module = MiniMindLM(config)
        padded = PaddedRows(texts)
        begins = [i for i in range(len(padded)) if texts[i][0][0] == tokenizer.bos_token_id]
        rows = Subset(padded, begins)
        autocast = torch.autocast(world.device.type, enabled=world.device.type == "cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

        def lr_at(progress: float) -> float:
            return RATE / 10 + 0.5 * RATE * (1 + math.cos(math.pi * progress))

    else:
        model, rows = harness.make_peer(config), PackedRows(texts, LENGTH)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1
        )

        def lr_at(progress: float) -> float:
            return get_lr(progress, 1.0, RATE, 0.03, RATE / 10)

    model = model.to(world.device).train()
    tests = make_loader(PackedRows(held_out, LENGTH), args.batch_size, seed=0)

    @torch.no_grad()
    def bits_per_byte() -> float:
        model.eval()
        with autocast:
            nats = sum(losses_of(model, world.to_device(b)).double().sum().item() for b in tests)
        model.train()
        return nats / math.log(2) / held_out.text_bytes

    points, taken, epoch = [], 0.0, 0
    while taken < seconds:
        loader = make_loader(
            rows, args.batch_size, collate_fn=full_rows, shuffle=True, seed=args.seed, epoch=epoch
        )
        started = time.perf_counter()
        for batch in map(world.to_device, loader):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(taken / seconds)
            with autocast:
                losses = losses_of(model, batch)
            (losses.sum() / batch["loss_mask"].sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken += time.perf_counter() - started
            if taken >= seconds * min(1, (len(points) + 1) / EVALUATIONS):
                points.append((taken, bits_per_byte()))
            if taken >= seconds:
                break
            started = time.perf_counter()
        epoch += 1
    return points


def full_rows(rows: list[dict[str, Tensor | int]]) -> dict[str, Tensor]:
    """A batch of rows that are padded to LENGTH, if they are shorter."""
    return collate([pad_row(row, LENGTH) for row in rows])


def train_ours(name: str, args: argparse.Namespace, seconds: float) -> Points:
    """Train with train_pretrain.py; the points of its curve."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "data_path": args.data_path,
            "val_data_path": args.val_data_path,
            "tokenizer_path": args.tokenizers[name],
            "size": args.size,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "max_minutes": seconds / 60,
            "eval_interval": args.eval_interval,
            "out_dir": folder,
        }
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        command = [sys.executable, "train_pretrain.py", *words, *FLAGS[name]]
        if args.device:
            command += ["--device", args.device]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        (log,) = Path(folder).glob("logs/*/metrics.jsonl")
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        return [
            (line["seconds"], line["val_bits_per_byte"]) for line in lines if "val_loss" in line
        ]


def time_to(target: float, points: Points) -> float:
    """Seconds until a curve is down at `target`, by a straight line between its points."""
    for (before, high), (after, low) in pairwise([(0.0, math.inf), *points]):
        if low <= target:
            share = 1.0 if math.isinf(high) else (high - target) / (high - low)
            return before + share * (after - before)
    return math.inf


def main() -> None:
    """Train with all recipes and print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", type=user_path, required=True)
    add("--val_data_path", type=user_path, required=True)
    add("--size", choices=SIZES, default="5m")
    add("--eval_interval", type=positive_int, default=50, help="steps, of train_pretrain.py")
    add("--seed", type=positive_int, default=42)
    for flag, default in MINUTES.items():
        add(f"--{flag}", type=positive_float, default=default, metavar="MINUTES")
    add("--tokenizers", type=named_path, nargs="*", default=[], metavar="RECIPE=FOLDER")
    args = harness.parse_flags(parser, batch_size=8)
    default = ROOT / "model" / "minimind_tokenizer"
    own = dict(args.tokenizers)
    args.tokenizers = {name: own.get(name, default) for name in MINUTES}

    curves: dict[str, Points] = {}
    for name in MINUTES:
        train: Callable[..., Points] = train_ours if name in FLAGS else train_peer
        curves[name] = harness.in_own_process(train, name, args, 60 * getattr(args, name))
    target = curves["original"][-1][1]
    reached = {name: time_to(target, points) for name, points in curves.items()}
    print(f"target: {target:.4f} bits per byte; {args.size}, rows {args.batch_size} x {LENGTH}")
    print(f"{'':14}{'run, min':>10}{'its end':>10}{'target, min':>13}{'share':>8}")
    for name, points in curves.items():
        minutes, share = reached[name] / 60, reached[name] / reached["original"]
        print(
            f"{name:14}{points[-1][0] / 60:10.1f}{points[-1][1]:10.4f}{minutes:13.2f}{share:8.3f}"
        )


if __name__ == "__main__":
    main()
