"""The memory that a training step takes, estimated before and measured after, and what there is."""

import os
import platform
from pathlib import Path

import torch

from model import LMConfig, MiniMindLM

from .compute import count_parameters


def estimate_memory(
    model: MiniMindLM,
    *,
    rows: int,
    row_length: int,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    device: torch.device,
    optimizer: str = "adamw",
) -> dict[str, float]:
    """Bytes that training takes in one process, by what they are for.

    The sum is needed from the second micro-batch of an accumulation on, when gradients and
    activations are there together; without accumulation, up to the gradients less. These are live
    tensors: an allocator may hold more (on a CPU, up to twice as much), as do the device's own
    context and DDP. What `--compile` saves is not counted either. `rows` are the sequences of a
    micro-batch of the bare model, in fp32 or with autocast to `dtype`; `optimizer` is --optimizer.

    Returns "weights", "gradients", "optimizer", "activations" and "logits".
    """
    config, counts = model.config, count_parameters(model)
    muon = sum(p.numel() for p in model.hidden_matrices()) if optimizer == "muon" else 0
    autocast = dtype != torch.float32
    tokens = rows * row_length
    # Three fp32 matrices (tokens, vocab) as backward begins: the log-probabilities, their gradient,
    # and the gradient of the logits.
    logits = 3 * 4 * config.vocab_size
    layer = _layer_bytes(config, row_length, autocast, device)
    if gradient_checkpointing:
        # The layer that is being computed again takes the place of the logits, gone by then.
        layers = config.n_layers * 4 * config.dim + max(0, layer - logits)
    else:
        layers = config.n_layers * layer
    # After the layers, the norm and the output layer's input. The mask is made once for all layers,
    # fused attention's for each key-value head.
    width = 2 if autocast else 4
    masks = config.n_kv_heads if config.flash_attn else 1
    ends = _norm_bytes(config, device) + width * config.dim + masks * width * row_length
    return {
        # The copy that autocast makes of each matrix lasts until it has been used in backward.
        "weights": counts.total * (4 + (2 if autocast else 0)),
        "gradients": counts.trained * 4,
        "optimizer": (2 * counts.trained - muon) * 4,  # two moments with AdamW, one with Muon
        "activations": tokens * (layers + ends),
        "logits": tokens * logits,
    }


def _norm_bytes(config: LMConfig, device: torch.device) -> int:
    """What a norm saves of a token: its fp32 input and, where it is not fused, its output."""
    return (2 if device.type == "cpu" else 1) * 4 * config.dim


def _layer_bytes(config: LMConfig, row_length: int, autocast: bool, device: torch.device) -> int:
    """What autograd saves of a token for one layer's backward pass.

    Each term is a tensor that some operation saves; tensors that several operations share count
    once. Left out are those of a few numbers a token: rotary angles, norms' scales, routing.
    """
    dim, width = config.dim, 2 if autocast else 4  # width: bytes of a number in a matrix product
    noise = (width if device.type == "cpu" else 1) if config.dropout else 0  # of dropout, a number

    # Linear layers save their input: wq, wk and wv one tensor, of which autocast makes three.
    saved = 2 * _norm_bytes(config, device) + (3 * width if autocast else 4) * dim
    # Two dropouts on the residual branches.
    saved += 2 * noise * dim
    # Rotated q, and the attention's output in the layout that wo reads.
    saved += 2 * width * dim
    if config.flash_attn and not (noise and device.type == "cpu"):
        # k and v; the output in the kernel's layout.
        saved += width * (2 * config.n_kv_heads * config.head_dim + dim)
    else:
        # k and v repeated for each query head; of each query and key the softmax in fp32, and the
        # weights that multiply v if they are another tensor. PyTorch's fallback, where no fused
        # kernel has dropout, computes all of them in fp32.
        product = 4 if config.flash_attn else width
        weights = product if autocast or noise else 0
        noise = product if noise and device.type == "cpu" else noise
        saved += 2 * width * dim + config.n_heads * row_length * (4 + weights + noise)

    # w1's output, its silu, w3's output and the product of the two, which is w2's input.
    hidden = 4 * width * config.hidden_dim
    inputs = (2 * width if autocast else 4) * dim  # of w1 and w3
    if not config.use_moe:
        return saved + inputs + hidden
    # A token's vector is gathered for each of its experts, and each one's output kept to be
    # weighted. The gate reads the norm's output in fp32; so does the shared expert, or casts it.
    saved += config.num_experts_per_tok * (inputs + hidden + width * dim)
    saved += 4 * dim + config.n_shared_experts * hidden
    return saved + (inputs if autocast and config.n_shared_experts else 0)


def device_memory(device: torch.device) -> float | None:
    """Bytes that a device can give to the processes of this host; None where it is not known.

    For a GPU all its memory; for a CPU the RAM that is available now, or the limit that a container
    or a batch system sets, if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min([*_available_ram(), *_cgroup_limits()], default=None)


def _available_ram() -> list[int]:
    """The bytes of RAM that are available, in a list; empty where that is not known."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return [1024 * int(line.split()[1])]
    except OSError:
        pass  # not Linux
    names = getattr(os, "sysconf_names", {})  # not on Windows
    if "SC_PHYS_PAGES" not in names:
        return []
    return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]


def _cgroup_limits(root: Path = Path("/")) -> list[int]:
    """The limits of this process's control group and of those above it (cgroup v2), in bytes."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # not Linux
    limits, top = [], root / "sys/fs/cgroup"
    for group in (top / line.removeprefix("0::/") for line in lines if line.startswith("0::")):
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / "memory.max").is_file():
                limit = (folder / "memory.max").read_text(encoding="ascii").strip()
                limits += [int(limit)] if limit.isdecimal() else []  # "max" is none
    return limits


def peak_memory(device: torch.device) -> float | None:
    """The most bytes that this process has held: on a GPU, of its memory; else in RAM, if known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
