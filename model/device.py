"""Which device to compute on."""

import torch

from common import UserError


def choose_device(
    name: str | None, local_rank: int | None = None, local_world_size: int = 1
) -> torch.device:
    """Choose the device that a flag names, or the first of cuda, mps and cpu that is there.

    Args:
        name: "cuda", "cuda:1", "mps" or "cpu", or None.
        local_rank: number of the process on this machine, which is that of its GPU; None for a
            process that torchrun did not start.
        local_world_size: processes on this machine, of which each needs a GPU.

    Raises:
        UserError: if there is no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use cuda, cuda:N, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: use cuda, cuda:N, mps or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch sees no MPS device here")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: PyTorch sees no CUDA device here")
        index = (device.index or 0) if local_rank is None else local_rank
        needed = index + 1 if local_rank is None else local_world_size
        if needed > torch.cuda.device_count():
            raise UserError(
                f"--device {name}: {needed} CUDA devices needed, {torch.cuda.device_count()} there"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
