"""Which device to compute on."""

import torch

from common import UserError

from .threads import make_room_for_others


def choose_device(
    name: str | None, local_rank: int | None = None, local_world_size: int = 1
) -> torch.device:
    """Choose the device that a flag names, or the first of cuda, mps and cpu that is there.

    Under torchrun, each of `local_world_size` processes needs a GPU, that of its `local_rank`. On a
    CPU, threads leave room for other programs from then on (see threads.py).
    Raises UserError if there is no such device.
    """
    if name is None:
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or (index and not index.isdecimal()):
        raise UserError(f"--device {name}: use cuda, cuda:N, mps or cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch sees no MPS device here")
    if kind == "cpu":
        make_room_for_others()
    if kind != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no CUDA device here")
    number = int(index or 0) if local_rank is None else local_rank
    needed = number + 1 if local_rank is None else local_world_size
    there = torch.cuda.device_count()
    if needed > there:
        raise UserError(f"--device {name}: {needed} CUDA devices needed, {there} there")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
