"""Small models, and the same weights in transformers' layout, for several test files."""

import argparse
from pathlib import Path

import pytest
import torch
from rounding import assert_equal_to_rounding
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from model import LMConfig, MiniMindLM, save_weights, tokenizer_hash

TINY = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 300,
    "max_seq_len": 64,
    "rope_theta": 1e4,
}


def randomised(module: nn.Module) -> nn.Module:
    """Move every weight far from its initial value, so that none can be left out unnoticed."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.2 * noise)
    return module


def tiny(**overrides) -> MiniMindLM:
    """A small model, the same one for the same fields, in eval mode."""
    torch.manual_seed(0)
    return randomised(MiniMindLM(LMConfig(**{**TINY, **overrides}))).eval()


def random_model(seed: int = 0, **shape) -> MiniMindLM:
    """A model for the shipped tokenizer, by default as small as the runs of the tests take."""
    torch.manual_seed(seed)
    return randomised(MiniMindLM(LMConfig(**{"dim": 32, "n_layers": 1, **shape})))


def save_tuned(
    model: MiniMindLM,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "full_sft_32",
    stage: str = "full_sft",
    conversations: dict | None = None,
) -> Path:
    """Write a model as a stage leaves it, by default the second."""
    path = folder / f"{name}.pth"
    hash_ = tokenizer_hash(tokenizer)
    save_weights(path, model, model.config, stage, hash_, conversations=conversations)
    return path


def greedy_answer(
    path: Path, tokenizer: PreTrainedTokenizerBase, messages: list[dict], new: int, **shape
) -> str:
    """What the weights in a file answer to a conversation: through the chat template, alone."""
    model = random_model(**shape)
    model.load_state_dict(torch.load(path, weights_only=True))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    out = model.generate(torch.tensor([ids]), max_new_tokens=new)[0, len(ids) :]
    return tokenizer.decode(out, skip_special_tokens=True)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(first: dict[str, Tensor], second: dict[str, Tensor], sums: int):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert_equal_to_rounding(gradient, second[name], sums, name)


both_attentions = pytest.mark.parametrize("flash_attn", [True, False], ids=["sdpa", "plain"])
both_kinds = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


# Llama's rotary embedding turns component i with i + head_dim / 2, ours turns adjacent pairs.


def halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from adjacent pairs to halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def as_llama(weights: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Weights (or gradients) under Llama's names, in its layout."""
    renamed = {"model.embed_tokens.weight": weights["tok_embeddings.weight"]}
    renamed["model.norm.weight"] = weights["norm.weight"]
    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i in range(config.n_layers):
        for theirs, ours in names.items():
            weight = weights[f"layers.{i}.{ours}.weight"]
            if ours == "attention.wq":
                weight = halves(weight, config.n_heads)
            elif ours == "attention.wk":
                weight = halves(weight, config.n_kv_heads)
            renamed[f"model.layers.{i}.{theirs}.weight"] = weight
    return renamed


def llama_with_weights_of(model: MiniMindLM) -> LlamaForCausalLM:
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    weights = as_llama(model.state_dict(), config)
    llama.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return llama.eval()


def optimizer_flags(lr: float, weight_decay: float, **more) -> argparse.Namespace:
    """Flags as `make_optimizer` reads them."""
    flags = {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "lr_scale": []}
    flags |= {"learning_rate": lr, "weight_decay": weight_decay, "weight_decay_for": []}
    return argparse.Namespace(**flags | more)
