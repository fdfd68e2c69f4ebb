"""Useful tokens per second of instruction tuning: packed rows beside padded ones, in one run.

    python benchmarks/packing.py --data_path my_chats.jsonl

All contenders take whole optimizer steps with the loss of train_full_sft.py on the same data, as
many rows each, in turns, so that a machine that slows down slows all. Useful are the tokens of
conversations; padding is not.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from train_throughput import make_step

from common import ROOT, user_path
from dataset import PackedRows, PaddedRows, SFTDataset, collate
from dataset.packing import pad_row
from model import LMConfig, MiniMindLM, load_tokenizer, token_losses
from sample_world import SAMPLE, ensure_sample
from training import autocast_dtype, find_processes

WARM_UP = 2  # rounds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=user_path, default=SAMPLE / "sft.jsonl")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8, help="rows")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    args = parser.parse_args()

    world = find_processes(args.device, ddp=False)
    dtype = autocast_dtype("bfloat16", world)
    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    dataset = SFTDataset(ensure_sample(args.data_path), tokenizer, args.max_seq_len + 1)
    packed, padded = PackedRows(dataset, args.max_seq_len), PaddedRows(dataset)
    print(
        f"{len(dataset):,} conversations; real tokens among the positions: "
        f"packed {packed.fill:.1%}, padded to {args.max_seq_len} {padded.fill:.1%}"
    )

    def batch(rows: PackedRows | PaddedRows, whole: bool) -> dict[str, Tensor]:
        """The next rows, drawn at random; padded to the longest, or whole: to max_seq_len."""
        drawn = [rows[i] for i in torch.randint(len(rows), (args.batch_size,)).tolist()]
        return collate([pad_row(row, args.max_seq_len) for row in drawn] if whole else drawn)

    peer = f"padded to {args.max_seq_len}"
    contenders: dict[str, Callable[[], dict[str, Tensor]]] = {
        "packed": lambda: batch(packed, whole=False),
        "padded to the longest of a batch": lambda: batch(padded, whole=False),
        peer: lambda: batch(padded, whole=True),
    }

    def mean_loss(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            losses, _, _ = token_losses(model, rows)
        return losses.sum() / rows["loss_mask"].sum()

    torch.manual_seed(0)
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer))
    model = MiniMindLM(config).to(world.device).train()
    step = make_step(model, mean_loss, compiled=False)
    tokens, seconds = dict.fromkeys(contenders, 0), dict.fromkeys(contenders, 0.0)
    for round_ in range(WARM_UP + args.rounds):
        for name, draw in contenders.items():
            rows = {key: values.to(world.device) for key, values in draw().items()}
            useful = int(rows["attention_mask"].sum())  # also waits for the device
            started = time.perf_counter()
            step(rows)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= WARM_UP:
                tokens[name] += useful
                seconds[name] += time.perf_counter() - started

    print(
        f"{args.dim} × {args.n_layers}, {args.batch_size} rows, {dtype}, {world.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    base = tokens[peer] / seconds[peer]
    print(f"{'all of ' + str(args.rounds) + ' steps':34}{'s/step':>8}{'tokens/s':>10}{'ratio':>8}")
    for name, total in tokens.items():
        speed = total / seconds[name]
        print(f"{name:34}{seconds[name] / args.rounds:8.2f}{speed:10,.0f}{speed / base:8.2f}")


if __name__ == "__main__":
    main()
