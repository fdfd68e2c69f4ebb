"""Processes and devices."""

import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common import Text, UserError, translate
from model import choose_device

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """This process among all those of torchrun, on all hosts."""

    rank: int
    world_size: int  # 1 without torchrun
    device: torch.device
    language: str = "en"  # of what the main process prints: en or zh

    @property
    def is_main(self) -> bool:
        """Whether this process prints and saves."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1

    @property
    def device_ids(self) -> list[int] | None:
        """What DistributedDataParallel asks for: the number of the GPU, None on a CPU."""
        return [self.device.index] if self.device.type == "cuda" else None

    @property
    def sum_dtype(self) -> torch.dtype:
        """What long sums are kept in: float64, which mps does not have."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on the device; to a GPU, from pinned memory, it is copied while that works."""
        background = self.device.type == "cuda"
        return {name: x.to(self.device, non_blocking=background) for name, x in batch.items()}

    def log(self, message: str) -> None:
        """Print on the main process, in its language.

        A pipe that was closed, or a full disk, ends no run.
        """
        if self.is_main:
            try:
                print(translate(message, self.language), flush=True)
            except OSError:
                sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers. Waits for the others, but for no GPU."""
        if not self.is_distributed:
            return number
        largest = torch.tensor(number)  # on the CPU, which open_process_group gives gloo
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if not self.is_distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if not self.is_distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def share_early(self, find: Callable[[], T]) -> T:
        """What `find` gives on the main process, on every process, before they join a group.

        The launcher's store carries it.
        """
        if not self.is_distributed:
            return find()
        store, *_ = next(dist.rendezvous("env://", self.rank, self.world_size))
        others = [f"minimind/{rank}" for rank in range(1, self.world_size)]
        if not self.is_main:
            value = pickle.loads(store.get("minimind/0"))
            store.set(others[self.rank - 1], "")
            return value
        value = find()
        store.set("minimind/0", pickle.dumps(value))
        store.wait(others)  # where no launcher has the store, it ends with this function
        return value


def find_processes(device: str | None, ddp: bool, language: str = "en") -> Distributed:
    """Read torchrun's environment and choose the device, as `choose_device`. Opens nothing.

    UserError for `ddp`, the flag, without torchrun, or a device that is not there.
    """
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if ddp:
            script = Path(sys.argv[0]).name
            raise UserError(
                f"--ddp: start with torchrun, e.g. torchrun --nproc_per_node 2 {script}"
            )
        return Distributed(0, 1, choose_device(device), language)
    local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank, local_world_size)
    if chosen.type == "mps" and world_size > 1:
        raise UserError("--device mps: several processes need --device cpu")
    return Distributed(int(os.environ.get("RANK", 0)), world_size, chosen, language)


@contextmanager
def open_process_group(world: Distributed) -> Iterator[None]:
    """Join the processes of torchrun (nccl for GPUs, gloo for CPUs) for as long as the block runs.

    Slow preparations of one process belong before it: the others would time out in their first
    collective. Models that DDP wraps belong to functions called inside it, so that they are gone
    when it ends.
    """
    if not world.is_distributed:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo")
    yield
    # A DDP wrapper that outlives the group would destroy it under the interpreter lock, for which
    # gloo's threads wait: the process would never end. After an error nothing is destroyed: the
    # others may be in a collective, and torchrun ends them.
    gc.collect()
    dist.destroy_process_group()


def autocast_dtype(dtype: str, world: Distributed) -> torch.dtype:
    """The dtype of matrix products; float32 for bfloat16 where hardware would have to emulate it.

    UserError for float16 on a CPU, where it is emulated too and no scaler helps.
    """
    if dtype == "float16" and world.device.type == "cpu":
        raise UserError("--dtype float16: not on a CPU; use bfloat16 or float32")
    if dtype == "bfloat16" and not _has_bfloat16(world.device):
        text = Text(
            "bfloat16 is not in this {device}'s hardware: using float32 instead",
            device=world.device.type,
        )
        world.log(text)
        return torch.float32
    return getattr(torch, dtype)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    # PyTorch has no public query for a CPU's instructions.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
