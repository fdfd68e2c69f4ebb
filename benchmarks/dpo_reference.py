"""Preference training with the reference's log-probabilities kept beside the data, in one run with
training that asks the reference at every step.

    python benchmarks/dpo_reference.py --data_path my_pairs.jsonl

Both take whole optimizer steps with the loss of train_dpo.py on the same batches, in turns, so that
a machine that slows down slows both. The one pass that fills the store is timed apart.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn
from train_throughput import make_step

from common import ROOT, user_path
from dataset import DPODataset, PairRows, RowBatches, collate_pairs
from model import LMConfig, MiniMindLM, load_tokenizer
from sample_world import SAMPLE, ensure_sample
from train_dpo import preference_losses, reply_logps
from training import autocast_dtype, find_processes

WARM_UP = 2  # rounds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=user_path, default=SAMPLE / "dpo.jsonl")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs")
    parser.add_argument("--max_seq_len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    args = parser.parse_args()

    world = find_processes(args.device, ddp=False)
    dtype = autocast_dtype("bfloat16", world)
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    half = args.max_seq_len // 2
    rows = PairRows(DPODataset(ensure_sample(args.data_path), tokenizer, half, half))
    order = list(RowBatches(len(rows), args.batch_size, seed=0, epoch=0, lengths=rows.lengths))
    batches = [
        world.to_device(collate_pairs([rows[i] for i in order[round_ % len(order)]]))
        for round_ in range(WARM_UP + args.rounds)
    ]
    torch.manual_seed(0)
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer))
    model = MiniMindLM(config).to(world.device).train()
    frozen = copy.deepcopy(model).eval()

    def finish() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def ask(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), autocast:
            return reply_logps(frozen, batch)[0]

    started, pairs = finish(), 0
    for batch in batches:
        batch["kept"] = ask(batch)
        pairs += len(batch["sample"])
    passed = pairs / (finish() - started)

    def loss(model: nn.Module, batch: dict[str, Tensor], reference: Tensor) -> Tensor:
        with autocast:
            logps, *_ = reply_logps(model, batch)
        lengths = batch["loss_mask"].sum(1)
        return preference_losses(logps, reference, lengths, "sigmoid_norm", 0.5)[0].mean()

    contenders = {
        "reference kept beside the data": make_step(
            model, lambda model, batch: loss(model, batch, batch["kept"]), compiled=False
        ),
        "reference asked at every step": make_step(
            copy.deepcopy(model),
            lambda model, batch: loss(model, batch, ask(batch)),
            compiled=False,
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_, batch in enumerate(batches):
        for name, step in contenders.items():
            started = finish()
            step(batch)
            if round_ >= WARM_UP:
                speeds[name].append(len(batch["sample"]) / (finish() - started))

    print(
        f"{args.dim} × {args.n_layers}, {args.batch_size} pairs of up to {int(rows.lengths.max())} "
        f"positions a side, {dtype}, {world.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}\n"
    )
    kept, asked = (statistics.median(found) for found in speeds.values())
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    print(f"{'median of ' + str(args.rounds) + ' steps':34}{'pairs/s':>9}")
    for name, median in zip(speeds, (kept, asked), strict=True):
        print(f"{name:34}{median:9.2f}")
    print(
        f"\nkept : asked = {statistics.median(ratios):.2f} (median of the pairs of steps, "
        f"{min(ratios):.2f} to {max(ratios):.2f})\n"
        f"the one pass of the reference: {passed:.1f} pairs/s"
    )


if __name__ == "__main__":
    main()
