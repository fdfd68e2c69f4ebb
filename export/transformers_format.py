"""A model as a folder that transformers, vLLM and SGLang load without code of ours.

Dense models become LlamaForCausalLM, mixtures of experts GraniteMoeSharedForCausalLM. Names and
layout are those of files on the model hub, which all versions of transformers read.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common import UserError
from model import LMConfig, Tokenizer

ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
FEED_FORWARD = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

BASE_HASH = "minimind_weights"  # key of the hash of the weights that a file was made from

# What eval_model.py uses by default.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}


def write_transformers(
    folder: Path,
    config: LMConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    weights_hash: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights, configuration, generation settings and tokenizer into a folder.

    Args:
        folder: existing folder.
        config: configuration of the model.
        weights: its state_dict in fp32; it is empty afterwards, so that memory holds each tensor
            once.
        tokenizer: tokenizer of the model, loaded from a folder.
        weights_hash: hash of the weights, by which `--from peft` finds them again.
        dtype: dtype of the written tensors.

    Raises:
        UserError: if no class of transformers computes what the model does.
    """
    check_routing(config)
    renamed = rename_weights(config, weights)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in renamed}
    save_tensors(folder / "model.safetensors", tensors, {})
    settings = transformers_config(config, dtype) | {BASE_HASH: weights_hash}
    write_json(folder / "config.json", settings)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(folder / "generation_config.json", {name: settings[name] for name in ids} | SAMPLING)
    copy_tokenizer(folder, tokenizer, config.max_seq_len)


def check_routing(config: LMConfig) -> None:
    """Refuse a mixture of experts that GraniteMoeShared cannot express.

    Raises:
        UserError: if the scores of a token's experts do not sum to 1.
    """
    if config.use_moe and not scores_sum_to_one(config):
        raise UserError(
            "--to transformers: it has no class for experts weighted by raw scores "
            f"(num_experts_per_tok {config.num_experts_per_tok}, norm_topk_prob "
            f"{config.norm_topk_prob}); "
            "--to gguf has one where there is a shared expert"
        )


def scores_sum_to_one(config: LMConfig) -> bool:
    """Whether the scores of a token's routed experts always have the sum 1."""
    scaled = config.norm_topk_prob and config.num_experts_per_tok > 1
    return scaled or config.num_experts_per_tok == config.n_routed_experts


def rename_weights(config: LMConfig, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Take the weights out of a state_dict, under transformers' names and in its layout."""
    weights.pop("output.weight", None)  # the embedding again
    yield "model.embed_tokens.weight", weights.pop("tok_embeddings.weight")
    rotary_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for name, their_name in NORMS.items():
            yield f"{theirs}.{their_name}.weight", weights.pop(f"{ours}.{name}.weight")
        for name, their_name in ATTENTION.items():
            weight = weights.pop(f"{ours}.attention.{name}.weight")
            if name in rotary_heads:
                weight = pairs_to_halves(weight, rotary_heads[name])
            yield f"{theirs}.self_attn.{their_name}.weight", weight
        if config.use_moe:
            yield from _rename_experts(config, weights, f"{ours}.feed_forward", theirs)
            continue
        for name, their_name in FEED_FORWARD.items():
            yield (
                f"{theirs}.mlp.{their_name}.weight",
                weights.pop(f"{ours}.feed_forward.{name}.weight"),
            )
    yield "model.norm.weight", weights.pop("norm.weight")


def _rename_experts(
    config: LMConfig, weights: dict[str, Tensor], ours: str, theirs: str
) -> Iterator[tuple[str, Tensor]]:
    def gate_and_up(layer: str) -> Tensor:
        return torch.cat([weights.pop(f"{ours}.{layer}.{name}.weight") for name in ("w1", "w3")])

    experts = [f"experts.{number}" for number in range(config.n_routed_experts)]
    moe = f"{theirs}.block_sparse_moe"
    yield f"{moe}.router.layer.weight", weights.pop(f"{ours}.gate.weight")
    yield f"{moe}.input_linear.weight", torch.stack([gate_and_up(expert) for expert in experts])
    down = [weights.pop(f"{ours}.{expert}.w2.weight") for expert in experts]
    yield f"{moe}.output_linear.weight", torch.stack(down)
    if config.n_shared_experts:
        yield f"{theirs}.shared_mlp.input_linear.weight", gate_and_up("shared_experts")
        down = weights.pop(f"{ours}.shared_experts.w2.weight")
        yield f"{theirs}.shared_mlp.output_linear.weight", down


def pairs_to_halves(rows: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of each head as transformers' rotary embedding wants them.

    It rotates row j with row j + head_dim / 2; ours rotates rows 2j and 2j + 1.

    Args:
        rows: (n_heads · head_dim, …), of a projection to queries or keys.
        n_heads: heads of the projection.
    """
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def halves_to_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """Undo `pairs_to_halves`."""
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def transformers_config(config: LMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json, for old and new versions of transformers."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # up to transformers 4
        "rope_parameters": rope,  # from transformers 5 on
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": f"{dtype}".removeprefix("torch."),
    }
    if not config.use_moe:
        return settings
    return settings | {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        "shared_intermediate_size": config.hidden_dim * config.n_shared_experts,
        "num_local_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.aux_loss_alpha,
        "attention_multiplier": config.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def tag_ids(tokenizer: Tokenizer) -> set[int]:
    """The tokens around thoughts, calls of tools and results: those that the template writes.

    In an export they are not special, as in Qwen's tokenizers: engines leave special tokens out of
    an answer's text, in which their parsers look for these.
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    template = tokenizer.chat_template or ""
    known = tokenizer.get_added_vocab()
    return {id_ for text, id_ in known.items() if id_ not in ends and text in template}


def copy_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Copy a tokenizer's files as two, with a class that every version of transformers knows."""
    source = Path(tokenizer.name_or_path)
    parts = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tags = tag_ids(tokenizer)
    for token in parts["added_tokens"]:
        token["special"] = token["id"] not in tags
    write_json(folder / "tokenizer.json", parts)
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = max_seq_len
    if tokenizer.chat_template:  # which may be in a file of its own
        settings["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", settings)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is readable for whom other files are."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", **metadata})  # for the owner alone
    path.chmod(mode)


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write indented UTF-8 JSON."""
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
