"""LoRA: small matrices beside frozen ones, trained in their place (https://arxiv.org/abs/2106.09685).

A model can carry several adapters, by name. The one in use adds its product to the projections that
it sits on, or is merged into them; without one the model computes what its base does, bit for bit.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import MiniMindLM

# The projections of attention and feed-forward, those of every expert among them. The output layer
# is not one of them: it shares its tensor with the embedding.
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class LoRA(nn.Module):
    """alpha / rank · B A dropout(x): what an adapter adds to a projection (Hu et al., 2021).

    A begins as normal(0, 0.02) and B as 0, so that a new adapter changes nothing.

    Args:
        in_features, out_features: of the projection.
        rank: rows of A, columns of B.
        alpha: scale, in units of the rank.
        dropout: probability, on the input.

    Raises:
        ValueError: for a setting outside its range.
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
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.normal_(self.A, std=0.02)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        # Scaled while it is narrow: a pass over (…, rank) numbers, not over (…, out_features).
        return F.linear(F.linear(self.dropout(x), self.A) * self.scale, self.B)

    def delta(self) -> Tensor:
        """What merging adds to the projection's weight: (out_features, in_features) fp32."""
        return self.B.float() @ self.A.float() * self.scale


class AdaptedLinear(nn.Linear):
    """A projection that adapters sit on; its own weight keeps its name.

    Args:
        linear: the projection whose place it takes.

    Attributes:
        lora: the adapters, by name.
        active: the one in use, None without.
        merged: whether that one is in the weight now.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.lora = nn.ModuleDict()
        self.active: str | None = None
        self.merged = False
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        y = super().forward(x)
        if self.active is None or self.merged:
            return y
        return y + self.lora[self.active](x)

    @property
    def adapted_weight(self) -> Tensor:
        """The weight with the adapter in use added, (out_features, in_features)."""
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
    """Put a new adapter on the model and use it; nothing else of the model is trained from now on.

    Args:
        model: the base, which may carry other adapters.
        rank, alpha, dropout: see `LoRA`.
        target_modules: last names of the projections that it sits on, of `TARGETS`.
        name: of the adapter, by which `use_lora` finds it.

    Raises:
        ValueError: for a setting outside its range, a target that the model does not have, a name
            that is taken or that no module can have, or while an adapter is merged.
    """
    _check_unmerged(model)
    if not target_modules:
        raise ValueError("an adapter needs a target")
    for target in target_modules:
        if target not in TARGETS:
            raise ValueError(f"no adapter sits on {target!r}, only on {', '.join(TARGETS)}")
    if name in adapters(model):
        raise ValueError(f"the model has an adapter {name!r} already")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter cannot be named {name!r}")
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
    """The projections that adapters sit on, with their names in the model."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, AdaptedLinear))


def adapters(model: MiniMindLM) -> list[str]:
    """Names of the adapters that the model carries, in the order in which they came."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.lora))


def active_lora(model: MiniMindLM) -> str | None:
    """Name of the adapter in use, None without."""
    return next((layer.active for _, layer in adapted_layers(model) if layer.active), None)


def use_lora(model: MiniMindLM, name: str | None) -> None:
    """Use another of the adapters that the model carries, or with None only the base.

    The parameters of the adapter in use require gradients; no others do.

    Raises:
        ValueError: if there is no such adapter, or while one is merged.
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
    """A (rank, in_features) and B (out_features, rank) of the adapter in use; empty without one.

    Named by their projection, whatever the adapter's name: `layers.0.attention.wq.A`.
    """
    return {
        f"{path}.{matrix}": getattr(layer.lora[layer.active], matrix).detach()
        for path, layer in adapted_layers(model)
        if layer.active
        for matrix in ("A", "B")
    }


def load_lora_state(model: MiniMindLM, state: dict[str, Tensor]) -> None:
    """Copy the matrices of an adapter into the one in use.

    Args:
        model: with an adapter in use.
        state: as `lora_state`, in any precision.

    Raises:
        ValueError: naming the first difference, if names or shapes are others.
    """
    own = lora_state(model)
    for name in {**own, **state}:
        there, here = (tuple(s[name].shape) if name in s else "nothing" for s in (state, own))
        if there != here:
            raise ValueError(f"an adapter of another shape: {name} is {there} there, {here} here")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def base_state(model: MiniMindLM) -> dict[str, Tensor]:
    """The state_dict without adapters: the base's, or while one is merged that of a plain model."""
    return {name: t for name, t in model.state_dict().items() if ".lora." not in name}


def weights_hash(model: MiniMindLM) -> str:
    """SHA-256 of the base: what it computes with its weights, their precision and every bit.

    Raises:
        ValueError: while an adapter is merged.
    """
    _check_unmerged(model)
    c = model.config
    numbers = (c.n_heads, c.n_kv_heads, float(c.norm_eps), float(c.rope_theta))
    if c.use_moe:
        numbers += (c.num_experts_per_tok, c.scoring_func, c.norm_topk_prob)
    digest = hashlib.sha256(repr(numbers).encode())
    for name, tensor in base_state(model).items():
        if name == "output.weight":  # the embedding once more
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_lora(
    model: MiniMindLM,
    file: Path | BinaryIO,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> None:
    """Write the adapter in use: its matrices, its configuration, and which base it belongs to.

    Args:
        model: whose adapter.
        file: a path, or a file that is open for writing.
        dtype: of the saved matrices.
        base: `weights_hash` of the base, where it is known already: a run saves often.

    Raises:
        ValueError: if no adapter is in use, or it is merged.
    """
    _check_unmerged(model)
    layers = [(path, layer) for path, layer in adapted_layers(model) if layer.active]
    if not layers:
        raise ValueError("no adapter is in use")
    lora = layers[0][1].lora[layers[0][1].active]
    sits_on = {path.rpartition(".")[2] for path, _ in layers}
    contents = {
        "lora": {
            "rank": lora.rank,
            "alpha": lora.alpha,
            "dropout": lora.dropout.p,
            "target_modules": [target for target in TARGETS if target in sits_on],
        },
        "base": base or weights_hash(model),
        "weights": {n: t.to("cpu", dtype) for n, t in lora_state(model).items()},
    }
    torch.save(contents, file)


def load_lora(model: MiniMindLM, saved: Path | dict[str, Any], name: str = "default") -> None:
    """Put a saved adapter on its base and use it.

    Args:
        model: the base with the weights that the adapter was trained on, in their precision; it may
            carry other adapters.
        saved: the file, or what torch.load read from it.
        name: what to call it.

    Raises:
        ValueError: if it is no adapter, or belongs to another base; and as `apply_lora` and
            `load_lora_state`.
    """
    contents = saved
    if not isinstance(saved, dict):
        contents = torch.load(saved, map_location="cpu", weights_only=True)
    if not isinstance(contents, dict) or contents.keys() != {"lora", "base", "weights"}:
        raise ValueError("not an adapter")
    if contents["base"] != weights_hash(model):
        raise ValueError("an adapter of another base: these are not the weights it was trained on")
    apply_lora(model, **contents["lora"], name=name)
    load_lora_state(model, contents["weights"])


def merge_lora(model: MiniMindLM) -> None:
    """Add the adapter in use to the weights: the same answers at the base's cost.

    `base_state` is then the state_dict of a plain model.

    Raises:
        ValueError: if no adapter is in use, or it is merged already.
    """
    _check_unmerged(model)
    if active_lora(model) is None:
        raise ValueError("no adapter is in use")
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            if layer.active:
                layer.weight += layer.lora[layer.active].delta()
                layer.merged = True


def unmerge_lora(model: MiniMindLM) -> None:
    """Subtract the merged adapter from the weights again.

    Both roundings stay: a weight w, merged v, comes back to within u · (|v| + |w|), up to u², where
    u is 2⁻²⁴ in fp32. Who needs the base bit for bit loads it.

    Raises:
        ValueError: if no adapter is merged.
    """
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
