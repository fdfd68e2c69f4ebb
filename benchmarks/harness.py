"""What the benchmarks share: flags, models, timing in turns, a table of speeds."""

import argparse
import multiprocessing
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from common import positive_int
from dataset import collate
from dataset.packing import make_row
from export.transformers_format import transformers_config
from model import LMConfig, MiniMindLM, token_losses
from training import Distributed, autocast_dtype, find_processes

WARM_UP = 2  # rounds that do not count
Contenders = Mapping[str, Callable[[int], object]]  # by name; functions of the round's number


def parse_flags(parser: argparse.ArgumentParser, **defaults: int) -> argparse.Namespace:
    """Add `--device` and a flag for each positive number, with its default, and read all flags."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=positive_int, default=default)
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    return parser.parse_args()


def find_device(args: argparse.Namespace) -> tuple[Distributed, torch.autocast]:
    """The one process with its device, and the autocast that training uses there."""
    world = find_processes(args.device, ddp=False)
    dtype = autocast_dtype("bfloat16", world)
    return world, torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)


def describe(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> str:
    """The flags and the machine, in one line."""
    flags = ", ".join(f"{name} {value}" for name, value in vars(args).items() if value is not None)
    threads, version = torch.get_num_threads(), torch.__version__
    return f"{flags}; {device}, {dtype}, {threads} threads, torch {version}"


def make_model(args: argparse.Namespace, world: Distributed) -> MiniMindLM:
    """An untrained model of `--dim` and `--n_layers`, the same one each time."""
    torch.manual_seed(0)
    return MiniMindLM(LMConfig(dim=args.dim, n_layers=args.n_layers)).to(world.device).train()


def make_batch(args: argparse.Namespace, world: Distributed) -> dict[str, Tensor]:
    """Full rows of random ids, every one of them a target."""
    ids = torch.randint(16, 6400, (args.batch_size, args.max_seq_len + 1))
    ones = torch.ones(args.max_seq_len)
    return world.to_device(collate([make_row([(row[:-1], row[1:], ones)], 0) for row in ids]))


def make_peer(config: LMConfig) -> nn.Module:
    """Transformers' untrained model of the same shape."""
    import transformers as hf  # slow to import

    settings = transformers_config(config, torch.float32)
    if config.use_moe:
        settings["output_router_logits"] = True
    return hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**settings))


def mean_loss(autocast: torch.autocast) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss of the stages: mean cross-entropy of the target tokens."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with autocast:
            losses, *_ = token_losses(model, batch)
        return losses.sum() / batch["loss_mask"].sum()

    return loss


def make_step(model: nn.Module, loss_of: Callable[..., Tensor]) -> Callable[..., None]:
    """A function that takes one optimizer step: forward, backward, clipping, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = trained[0].device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(trained, lr=5e-4, betas=(0.9, 0.95), fused=fused)

    def step(batch: object) -> None:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def in_own_process(measure: Callable[..., Any], *arguments: object) -> Any:
    """Call `measure` in a new interpreter, so that no measurement feels the one before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def time_in_turns(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """The seconds of each round, in which all are called in turn: a slow machine slows all."""

    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(WARM_UP + rounds):
        for name, call in contenders.items():
            started = clock()
            call(round_)
            if round_ >= WARM_UP:
                seconds[name].append(clock() - started)
    return seconds


def compare_speeds(
    contenders: Contenders, amounts: Mapping[str, Sequence[float]], unit: str, baseline: str
) -> dict[str, float]:
    """Time contenders in turns; print their speeds and ratios to the baseline's, as medians.

    `amounts` is what each contender does in each round, the WARM_UP rounds included. Returns the
    speeds.
    """
    rounds = len(amounts[baseline]) - WARM_UP
    speeds = {
        name: list(map(operator.truediv, amounts[name][WARM_UP:], seconds))
        for name, seconds in time_in_turns(contenders, rounds).items()
    }
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    print(f"\n{f'median of rounds: {rounds}':36}{unit:>12}{'ratio':>8}")
    for name, found in speeds.items():
        ratio = statistics.median(map(operator.truediv, found, speeds[baseline]))
        print(f"{name:36}{medians[name]:12,.2f}{ratio:8.2f}")
    return medians
