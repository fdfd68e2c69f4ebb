"""LoRA: small trained matrices beside frozen projections (https://arxiv.org/abs/2106.09685).

A model can have several adapters, by name. The active one adds its product to the output of its
projections, or is merged into their weights; without one the model computes exactly what its base
does.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import MiniMindLM

# Projections of attention, feed-forward and every expert. The output layer is not among them, since
# it shares its tensor with the embedding.
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class LoRA(nn.Module):
    """alpha / rank · B A dropout(x): what an adapter adds to one projection.

    A is initialised as normal(0, 0.02) and B as 0, so that a new adapter changes nothing. Raises
    ValueError for a setting outside its range.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if alpha <= 0:
            raise ValueError(f"alpha must be above 0, not {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.normal_(self.A, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        # Scaled while it is narrow: a pass over (…, rank) numbers, not over (…, out_features).
        return F.linear(F.linear(self.dropout(x), self.A) * self.scale, self.B)

    def delta(self) -> Tensor:
        """What merging adds to the projection's weight: (out_features, in_features) fp32."""
        return self.B.float() @ self.A.float() * self.scale


class AdaptedLinear(nn.Linear):
    """A projection with adapters, in the place of `linear`, whose weight it keeps."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.lora = nn.ModuleDict()  # by name of the adapter
        self.active: str | None = None
        self.merged = False  # whether the active one is merged into the weight
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        y = super().forward(x)
        if self.active is None or self.merged:
            return y
        return y + self.lora[self.active](x)

    @property
    def adapted_weight(self) -> Tensor:
        """The weight with the active adapter added, (out_features, in_features)."""
        if self.active is None or self.merged:
            return self.weight
        return self.weight + self.lora[self.active].delta().to(self.weight.dtype)


def apply_lora(
    model: MiniMindLM,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] = TARGETS,
    name: str = "default",
) -> None:
    """Add a new adapter to the model and activate it; from now on nothing else is trained.

    `alpha` scales the product in units of the rank; `target_modules` are the last names of the
    projections that get it, of TARGETS. The model may have other adapters. Raises ValueError for a
    bad setting, a name that is taken, or while an adapter is merged.
    """
    _check_unmerged(model)
    if not target_modules:
        raise ValueError("an adapter needs a target")
    for target in target_modules:
        if target not in TARGETS:
            raise ValueError(f"{target!r} gets no adapter, only {', '.join(TARGETS)}")
    if name in adapters(model):
        raise ValueError(f"the model has an adapter {name!r} already")
    for path, module in list(model.named_modules()):
        parent, _, last = path.rpartition(".")
        if last not in target_modules or not isinstance(module, nn.Linear):
            continue
        if not isinstance(module, AdaptedLinear):
            module = AdaptedLinear(module)
            setattr(model.get_submodule(parent), last, module)
        lora = LoRA(module.in_features, module.out_features, rank, alpha, dropout)
        module.lora[name] = lora.to(module.weight).train(module.training)
    use_lora(model, name)


def adapted_layers(model: MiniMindLM) -> Iterator[tuple[str, AdaptedLinear]]:
    """The projections that have adapters, with their names in the model."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, AdaptedLinear))


def adapters(model: MiniMindLM) -> list[str]:
    """Names of the model's adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.lora))


def active_lora(model: MiniMindLM) -> str | None:
    """Name of the active adapter, or None."""
    return next((layer.active for _, layer in adapted_layers(model) if layer.active), None)


def use_lora(model: MiniMindLM, name: str | None) -> None:
    """Activate another of the model's adapters, or with None only the base.

    Only the parameters of the active adapter require gradients. Raises ValueError if there is no
    such adapter, or while one is merged.
    """
    _check_unmerged(model)
    if name is not None and name not in adapters(model):
        raise ValueError(f"no adapter {name!r}; there is {', '.join(adapters(model)) or 'none'}")
    model.requires_grad_(False)
    for _, layer in adapted_layers(model):
        layer.active = name if name in layer.lora else None
        if layer.active:
            layer.lora[name].requires_grad_(True)


def lora_state(model: MiniMindLM) -> dict[str, Tensor]:
    """The active adapter's matrices by name, as `layers.0.attention.wq.A`; empty without one."""
    return {
        f"{path}.{matrix}": getattr(layer.lora[layer.active], matrix).detach()
        for path, layer in adapted_layers(model)
        if layer.active
        for matrix in ("A", "B")
    }


def load_lora_state(model: MiniMindLM, state: dict[str, Tensor]) -> None:
    """Copy matrices as of `lora_state` into the active adapter; ValueError if they differ."""
    own = lora_state(model)
    if difference := state_difference(state, own):
        raise ValueError(f"an adapter of another shape: {difference}")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def state_difference(there: dict[str, Tensor], here: dict[str, Tensor]) -> str | None:
    """Describe the first tensor that only one of two states has, or in another shape."""
    for name in {**here, **there}:
        shapes = [
            tuple(state[name].shape) if name in state else "missing" for state in (there, here)
        ]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} there, {shapes[1]} here"
    return None


def base_state(model: MiniMindLM) -> dict[str, Tensor]:
    """The state_dict of a plain model: the base's weights, or the merged ones."""
    return {name: t for name, t in model.state_dict().items() if ".lora." not in name}


def weights_hash(model: MiniMindLM) -> str:
    """SHA-256 of the base: its weights in their precision, and the numbers that its layers use."""
    _check_unmerged(model)
    c = model.config
    numbers = (c.n_heads, c.n_kv_heads, float(c.norm_eps), float(c.rope_theta))
    if c.use_moe:
        numbers += (c.num_experts_per_tok, c.scoring_func, c.norm_topk_prob)
    digest = hashlib.sha256(repr(numbers).encode())
    for name, tensor in base_state(model).items():
        if name == "output.weight":  # the embedding again
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def lora_settings(model: MiniMindLM) -> dict[str, Any]:
    """The arguments of `apply_lora` that made the active adapter (or ValueError), but its name."""
    active = {p.rpartition(".")[2]: layer for p, layer in adapted_layers(model) if layer.active}
    if not active:
        raise ValueError("no adapter is active")
    layer = next(iter(active.values()))
    lora = layer.lora[layer.active]
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout.p,
        "target_modules": [target for target in TARGETS if target in active],
    }


def merge_lora(model: MiniMindLM) -> None:
    """Add the active adapter to the weights, so that it costs nothing; see also `base_state`.

    Raises ValueError if no adapter is active, or it is merged already.
    """
    _check_unmerged(model)
    if active_lora(model) is None:
        raise ValueError("no adapter is active")
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            if layer.active:
                layer.weight += layer.lora[layer.active].delta()
                layer.merged = True


def unmerge_lora(model: MiniMindLM) -> None:
    """Subtract the merged adapter (or ValueError) from the weights again, up to rounding."""
    merged = [layer for _, layer in adapted_layers(model) if layer.merged]
    if not merged:
        raise ValueError("no adapter is merged")
    with torch.no_grad():
        for layer in merged:
            layer.weight -= layer.lora[layer.active].delta()
            layer.merged = False


def _check_unmerged(model: MiniMindLM) -> None:
    if any(layer.merged for _, layer in adapted_layers(model)):
        raise ValueError("an adapter is merged: unmerge_lora first")
