"""The computation that training takes, and what a GPU can do."""

import re
from typing import NamedTuple

import torch
from torch import nn

from model import MiniMindLM
from model.model import MOEFeedForward

# Dense peaks in 10¹² FLOP/s from NVIDIA's data sheets and architecture white papers, GPU by name:
# fp16 and bf16 (tensor cores, sums in fp32), and fp32 as PyTorch computes it by default, without
# TF32. Names that stand for several GPUs are left out.
PEAKS = {
    "A10": (125, 31.2),
    "A30": (165, 10.3),
    "A40": (149.7, 37.4),
    "A100": (312, 19.5),
    "A100 PCIE": (312, 19.5),
    "A100 SXM4": (312, 19.5),
    "H100": (989.4, 66.9),  # SXM
    "H100 PCIE": (756, 51),
    "H200": (989.4, 66.9),
    "L4": (121, 30.3),
    "L40": (181, 90.5),
    "L40S": (362, 91.6),
    "RTX 3070": (40.6, 20.3),
    "RTX 3090": (71, 35.6),
    "RTX 3090 TI": (80, 40),
    "RTX 4080": (97.5, 48.7),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
    "RTX A6000": (154.8, 38.7),
    "T4": (65, 8.1),
    "V100 PCIE": (112, 14),
    "V100 SXM2": (125, 15.7),
}
WITHOUT_BFLOAT16 = ("T4", "V100 PCIE", "V100 SXM2")


class ParameterCounts(NamedTuple):
    """Parameters of a model, and the active ones, of experts that a token visits."""

    total: int
    active: int
    trained: int
    active_trained: int

    @property
    def flops(self) -> int:
        """Of a token's matrix products: 6 for each active parameter, 4 where it is frozen."""
        return 4 * self.active + 2 * self.active_trained


def count_parameters(model: MiniMindLM) -> ParameterCounts:
    """Count the parameters of a bare model."""

    def count(module: nn.Module) -> tuple[int, int]:
        sizes = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
        return sum(size for size, _ in sizes), sum(trained for _, trained in sizes)

    total, trained = count(model)
    active, active_trained = total, trained
    for module in model.modules():
        if isinstance(module, MOEFeedForward):
            idle = len(module.experts) - module.gate.top_k
            size, trained_size = count(module.experts[0])
            active -= idle * size
            active_trained -= idle * trained_size
    return ParameterCounts(total, active, trained, active_trained)


def flops_per_token(model: MiniMindLM, row_length: int) -> int:
    """Floating-point operations of training, forward and backward, by PaLM's count.

    Besides `ParameterCounts.flops`, 12 · layers · dim · row_length for attention
    (https://arxiv.org/abs/2204.02311, appendix B): every query with every key of its row, causal or
    not. What gradient checkpointing computes twice counts once.
    """
    attention = 12 * model.config.n_layers * model.config.dim * row_length
    return count_parameters(model).flops + attention


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most FLOP/s that a GPU reaches in dense matrix products; None where it is not known."""
    if device.type != "cuda":
        return None
    # "NVIDIA A100-SXM4-80GB" → "A100 SXM4". A part of a GPU keeps its "MIG", and is not found.
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device).upper())
    left_out = r"NVIDIA|TESLA|GEFORCE|\d+GB|HBM3"
    name = " ".join(word for word in words if not re.fullmatch(left_out, word))
    if name not in PEAKS or (dtype == torch.bfloat16 and name in WITHOUT_BFLOAT16):
        return None
    half, single = PEAKS[name]
    return 1e12 * (single if dtype == torch.float32 else half)
