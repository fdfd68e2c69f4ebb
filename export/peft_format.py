"""An adapter as PEFT's folder, for the base as `write_transformers` writes it, and back.

PEFT adapts fused projections as one: w1 and w3 of an expert are one matrix there, whose adapter is
block-diagonal and has twice the rank. An adapter with such projections is written with that rank
everywhere, filled up with zeros.
"""

import json
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common import UserError, number, positive_int
from model import LMConfig
from model.model_lora import TARGETS

from .transformers_format import (
    ATTENTION,
    BASE_HASH,
    FEED_FORWARD,
    check_routing,
    halves_to_pairs,
    pairs_to_halves,
    save_tensors,
    write_json,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Settings of PEFT's LoraConfig with which an adapter computes B A x on the base as it is.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
UNSUPPORTED = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "corda_config"),
    *("fan_in_fan_out", "kasa_config", "layer_replication", "loftq_config", "lora_bias"),
    *("lora_ga_config", "modules_to_save", "monteclora_config", "rank_pattern"),
    *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"),
)


@dataclass(frozen=True)
class Projection:
    """A projection of transformers' model, and ours whose rows it stacks.

    Attributes:
        key: its name in PEFT's file, without `.lora_A.weight`.
        target: its name in PEFT's settings.
        experts: for each expert (for one, where there are none) the names of our projections.
        heads: heads whose rows transformers has in another order; 0: the order is ours.
    """

    key: str
    target: str
    experts: list[list[str]]
    heads: int = 0


def projections(config: LMConfig) -> Iterator[Projection]:
    """All projections that can have an adapter."""
    rotary_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    for i in range(config.n_layers):
        theirs, ours = f"base_model.model.model.layers.{i}", f"layers.{i}.feed_forward"
        for name, target in ATTENTION.items():
            projection = [[f"layers.{i}.attention.{name}"]]
            heads = rotary_heads.get(name, 0)
            yield Projection(f"{theirs}.self_attn.{target}", target, projection, heads)
        if not config.use_moe:
            for name, target in FEED_FORWARD.items():
                yield Projection(f"{theirs}.mlp.{target}", target, [[f"{ours}.{name}"]])
            continue
        # PEFT wraps the two parameters of a module one around the other, in this order.
        experts = [f"{ours}.experts.{e}" for e in range(config.n_routed_experts)]
        for layer, target, names in (
            ("experts.base_layer", "experts.gate_up_proj", ("w1", "w3")),
            ("experts", "experts.down_proj", ("w2",)),
        ):
            stacked = [[f"{expert}.{name}" for name in names] for expert in experts]
            yield Projection(f"{theirs}.block_sparse_moe.{layer}", target, stacked)
        if config.n_shared_experts:
            shared = f"{ours}.shared_experts"
            for target, names in (("input_linear", ("w1", "w3")), ("output_linear", ("w2",))):
                stacked = [[f"{shared}.{name}" for name in names]]
                yield Projection(f"{theirs}.shared_mlp.{target}", target, stacked)


def write_peft(
    folder: Path,
    config: LMConfig,
    settings: dict[str, Any],
    matrices: dict[str, Tensor],
    base_name: str,
    base_hash: str,
) -> None:
    """Write an adapter as PEFT's adapter_config.json and adapter_model.safetensors.

    Args:
        folder: existing folder.
        config: configuration of the base.
        settings: `lora_settings` of the adapter.
        matrices: its `lora_state`.
        base_name: name of the base.
        base_hash: hash of its weights, by which `exported_base` finds them again.

    Raises:
        UserError: if no class of transformers computes what the base does, or the adapter is on a
            part of its experts' projections.
    """
    check_routing(config)
    feed_forward = set(FEED_FORWARD) & set(settings["target_modules"])
    if config.use_moe and feed_forward not in (set(), set(FEED_FORWARD)):
        raise UserError(
            f"--lora_name: on {', '.join(sorted(feed_forward))} of the experts; PEFT has adapters "
            "on all of w1, w2, w3 of a mixture of experts, or on none"
        )
    adapted = [
        projection
        for projection in projections(config)
        if any(f"{name}.A" in matrices for expert in projection.experts for name in expert)
    ]
    rank = settings["rank"] * max(len(p.experts[0]) for p in adapted)
    tensors = {}
    for projection in adapted:
        pairs = [_stack(expert, matrices, rank) for expert in projection.experts]
        b = torch.stack([b for _, b in pairs], dim=-1).flatten(1)  # (out, rank · experts)
        if projection.heads:
            b = pairs_to_halves(b, projection.heads)
        tensors[f"{projection.key}.lora_A.weight"] = torch.cat([a for a, _ in pairs]).contiguous()
        tensors[f"{projection.key}.lora_B.weight"] = b.contiguous()
    targets = sorted({projection.target for projection in adapted})
    parameters = [target for target in targets if target.startswith("experts.")]
    save_tensors(folder / WEIGHTS_FILE, tensors, {BASE_HASH: base_hash})
    contents = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": settings["alpha"] / settings["rank"] * rank,
        "lora_dropout": 0.0 if parameters else settings["dropout"],  # PEFT drops no expert's input
        "target_modules": [target for target in targets if target not in parameters],
        "target_parameters": parameters or None,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG_FILE, contents)


def _stack(names: list[str], matrices: dict[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """One adapter for projections whose rows are stacked: A (rank, in) and B (out, rank)."""
    a = torch.cat([matrices[f"{name}.A"] for name in names])
    b = torch.block_diag(*(matrices[f"{name}.B"] for name in names))
    missing = rank - len(a)
    return (
        torch.nn.functional.pad(a, (0, 0, 0, missing)),
        torch.nn.functional.pad(b, (0, missing)),
    )


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read the settings of PEFT's folder.

    Raises:
        UserError: if there are none, or they ask for something that an adapter here does not have.
    """
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if settings["peft_type"] != "LORA":
            raise UserError(f"--weight {folder}: {settings['peft_type']}, not LORA")
        for name, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0)):
            settings[name] = number(float, 0)(f"{settings.get(name, default) or 0}")
        settings["r"] = positive_int(f"{settings['r']:g}")
    except OSError as error:
        raise UserError(f"--weight {folder}: no {CONFIG_FILE} there ({error.strerror})") from None
    except (AttributeError, KeyError, TypeError, ValueError, ArgumentTypeError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: not PEFT's settings ({error!r})") from None
    changed = [name for name in UNSUPPORTED if settings.get(name)]
    if settings.get("init_lora_weights", True) not in PLAIN_INITS:
        changed.append(f"init_lora_weights {settings['init_lora_weights']}")
    if settings.get("bias", "none") != "none":
        changed.append("bias")
    if changed:
        raise UserError(f"{folder / CONFIG_FILE}: {changed[0]} has no counterpart here")
    return settings


def exported_base(folder: Path, settings: dict[str, Any]) -> str:
    """The hash of the weights that an adapter's base was exported from.

    It stands in an adapter that `write_peft` wrote, or in the base that `write_transformers` wrote.

    Raises:
        UserError: if it stands in neither.
    """
    base = settings.get("base_model_name_or_path")
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            metadata = file.metadata() or {}
        if BASE_HASH in metadata:
            return metadata[BASE_HASH]
        exported = json.loads((Path(f"{base}") / "config.json").read_text(encoding="utf-8"))
        return exported[BASE_HASH]
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: cannot be read ({error})") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path {base!r} is no folder that "
            "--to transformers wrote"
        ) from None


def read_peft(
    folder: Path, settings: dict[str, Any], config: LMConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read PEFT's folder as an adapter of ours.

    Args:
        folder: PEFT's folder.
        settings: from `read_peft_config`.
        config: configuration of the base.

    Returns:
        The arguments of `apply_lora`, and the matrices as `load_lora_state` takes them; those of
        layers that PEFT left alone are 0.

    Raises:
        UserError: if a file is damaged, adapts what has no adapter here, or is of another shape.
    """
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: cannot be read ({error})") from None
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    matrices: dict[str, Tensor] = {}
    for projection in projections(config):
        a = tensors.pop(f"{projection.key}.lora_A.weight", None)
        b = tensors.pop(f"{projection.key}.lora_B.weight", None)
        if a is None or b is None:
            continue
        n_experts = len(projection.experts)
        if len(a) != rank * n_experts or b.shape[1] != rank * n_experts:
            raise UserError(f"{folder / WEIGHTS_FILE}: {projection.key} has another rank than r")
        if projection.heads:
            b = halves_to_pairs(b, projection.heads)
        all_a, all_b = a.unflatten(0, (n_experts, rank)), b.unflatten(1, (rank, n_experts))
        for expert, names in enumerate(projection.experts):
            for name, rows in zip(names, all_b[..., expert].chunk(len(names)), strict=True):
                matrices[f"{name}.A"] = all_a[expert].float()
                matrices[f"{name}.B"] = rows.float()
    if tensors:
        raise UserError(f"{folder / WEIGHTS_FILE}: {next(iter(tensors))} has no counterpart here")
    adapted = {name.split(".")[-2] for name in matrices}
    arguments = {
        "rank": rank,
        "alpha": scale * rank,
        "dropout": settings["lora_dropout"],
        "target_modules": [target for target in TARGETS if target in adapted],
    }
    return arguments, matrices
