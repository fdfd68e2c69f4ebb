"""An adapter beside full instruction tuning at the same batch, in one run: what each step costs.

    python benchmarks/lora.py [--dim 512 --n_layers 8 --lora_rank 8]

Time is measured in turns in one process. Memory is measured in a process for each kind: on a GPU,
the peak of PyTorch's allocator; else the most that the process ever had, less what it had before
its first step.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import harness

from common import make_parser
from diagnosis.memory import peak_memory
from model import MiniMindLM, apply_lora, save_lora, save_weights
from training import Distributed

KINDS = ("full", "lora")


def build(args: argparse.Namespace, kind: str, world: Distributed) -> MiniMindLM:
    """The model, with an adapter if that is the kind."""
    model = harness.make_model(args, world)
    if kind == "lora":
        apply_lora(model, args.lora_rank)
    return model


def measure_memory(args: argparse.Namespace, kind: str) -> dict[str, float]:
    """What steps of a kind hold at most, in this process."""
    world, autocast = harness.find_device(args)
    model, batch = build(args, kind, world), harness.make_batch(args, world)
    step = harness.make_step(model, harness.mean_loss(autocast))
    before = peak_memory(world.device)
    for _ in range(3):
        step(batch)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trained parameters": trained,
        "gradients": 4 * trained,
        "optimizer state": 8 * trained,  # two moments
        "peak of a step": peak_memory(world.device) - before,
    }


def main() -> None:
    """Measure and print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    args = harness.parse_flags(
        parser, dim=512, n_layers=8, batch_size=8, max_seq_len=512, lora_rank=8, rounds=7
    )
    found = {kind: harness.in_own_process(measure_memory, args, kind) for kind in KINDS}
    world, autocast = harness.find_device(args)
    models = {kind: build(args, kind, world) for kind in KINDS}
    batch, contenders = harness.make_batch(args, world), {}
    for kind, model in models.items():
        step = harness.make_step(model, harness.mean_loss(autocast))
        contenders[kind] = lambda _, step=step: step(batch)
    seconds = harness.time_in_turns(contenders, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.pth" for kind in KINDS}
        save_weights(paths["full"], models["full"], models["full"].config, "full_sft", "")
        save_lora(models["lora"], paths["lora"])
        for kind in KINDS:
            found[kind]["file"] = paths[kind].stat().st_size
            found[kind]["seconds per step"] = median(seconds[kind])

    print(harness.describe(args, world.device, autocast.fast_dtype))
    print(f"\n{'':20}{'full':>12}{'adapter':>12}{'share':>9}")
    for name, whole in found["full"].items():
        adapter = found["lora"][name]
        unit = {"trained parameters": "M", "seconds per step": "s"}.get(name, "MB")
        scale = 1 if unit == "s" else 1e6
        cells = (f"{f'{value / scale:.2f} {unit}':>12}" for value in (whole, adapter))
        print(f"{name:20}{''.join(cells)}{adapter / whole:9.1%}")


if __name__ == "__main__":
    main()
