"""An adapter beside full instruction tuning at the same batch, in one run: what each step costs.

    python benchmarks/lora.py [--dim 512 --n_layers 8 --lora_rank 8]

Time is measured in turns in one process. Memory is what each kind holds at most in a process of its
own: the peak that PyTorch's allocator tells on a GPU, else the most that the process ever had, less
what it had before its first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from train_throughput import make_step

from model import LMConfig, MiniMindLM, apply_lora, save_lora, save_weights, token_losses
from training import autocast_dtype, find_processes, make_optimizer
from training.run import peak_memory

KINDS = ("full", "lora")
WARM_UP = 2  # rounds


def build(args: argparse.Namespace, kind: str, device: torch.device) -> MiniMindLM:
    """The model, with an adapter if that is the kind."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=args.dim, n_layers=args.n_layers))
    if kind == "lora":
        apply_lora(model, args.lora_rank)
    return model.to(device).train()


def random_batch(args: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Full rows in which every token is a target."""
    ids = torch.randint(16, 6400, (args.batch_size, args.max_seq_len + 1), device=device)
    ones = torch.ones_like(ids[:, 1:])
    return {
        "input_ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": ones.float(),
        "position_ids": ones.cumsum(1) - 1,
        "attention_mask": ones,
    }


def loss_of(device: torch.device) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss of train_lora.py, in the precision that it takes by default."""
    world = find_processes(str(device), ddp=False)
    dtype = autocast_dtype("bfloat16", world)

    def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses, _, _ = token_losses(model, batch)
        return losses.sum() / batch["loss_mask"].sum()

    return mean_loss


def measure_memory(args: argparse.Namespace, kind: str, device: torch.device) -> dict[str, float]:
    """What steps of one kind hold at most, in this process."""
    model, mean_loss = build(args, kind, device), loss_of(device)
    optimizer = make_optimizer(model, optimizer_flags(1e-4, 0.0))
    batch = random_batch(args, device)
    before = peak_memory(device)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        mean_loss(model, batch).backward()
        optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    return {
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer state": sum(moment.nbytes for moment in moments),
        "peak of a step": peak_memory(device) - before,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8, help="rows")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    parser.add_argument("--memory_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = find_processes(args.device, ddp=False).device
    if args.memory_of:
        print(json.dumps(measure_memory(args, args.memory_of, device)))
        return

    found = {}
    for kind in KINDS:
        words = [*sys.argv[1:], "--memory_of", kind]
        done = subprocess.run(
            [sys.executable, __file__, *words], check=True, capture_output=True, text=True
        )
        found[kind] = json.loads(done.stdout.splitlines()[-1])

    models = [build(args, kind, device) for kind in KINDS]
    steps = [make_step(model, loss_of(device), compiled=False) for model in models]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(WARM_UP + args.rounds):
        batch = random_batch(args, device)
        for kind, step in zip(KINDS, steps, strict=True):
            started = time.perf_counter()
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= WARM_UP:
                seconds[kind].append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        whole, adapter = Path(folder) / "whole.pth", Path(folder) / "adapter.pth"
        save_weights(whole, models[0], models[0].config, "full_sft", "")
        save_lora(models[1], adapter)
        for kind, path in zip(KINDS, (whole, adapter), strict=True):
            found[kind]["file"] = path.stat().st_size
            found[kind]["seconds per step"] = statistics.median(seconds[kind])

    print(
        f"{args.dim} × {args.n_layers}, rank {args.lora_rank}, {args.batch_size} rows of "
        f"{args.max_seq_len}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; medians of {args.rounds} steps\n"
    )
    print(f"{'':20}{'full':>12}{'adapter':>12}{'share':>9}")
    for name, whole in found["full"].items():
        adapter = found["lora"][name]
        if name == "seconds per step":
            texts = f"{whole:12.2f}{adapter:12.2f}"
        elif name == "trained parameters":
            texts = f"{whole / 1e6:10.2f} M{adapter / 1e6:10.2f} M"
        else:
            texts = f"{whole / 1e6:9.1f} MB{adapter / 1e6:9.1f} MB"
        print(f"{name:20}{texts}{adapter / whole:9.1%}")


if __name__ == "__main__":
    main()
