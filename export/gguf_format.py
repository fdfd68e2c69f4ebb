"""GGUF files, which llama.cpp and the programs built on it read.

A dense model is GGUF's `llama`. A mixture of experts is its `granitemoe`, with scales set to what
MiniMind computes, or where experts are weighted by raw scores its `deepseek` (the first one). All
rotate adjacent pairs, as MiniMind does, so weights keep their order.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, report_os_errors
from model import LMConfig, MiniMindLM, Tokenizer

from .pre_tokenizer import PRE_TOKENIZER, check_tokenizer, merge_pairs
from .transformers_format import scores_sum_to_one, tag_ids

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}

LLAMA_QUANTIZE_TYPE = "q4_k_m"

# llama.cpp sets enable_thinking in every prompt, by default to true. A thought that is opened for a
# model that never learnt any would end its chats, so there true leaves it to the model.
THINKING_IS_FREE = "{%- set enable_thinking = false if enable_thinking == false else none -%}"

BLOCK = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
}
FEED_FORWARD = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
IN_FLOAT32 = ("norm", "ffn_gate_inp")  # rounded gates would change routes


def tensor_sources(config: LMConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield GGUF's name of each tensor, and ours: several are stacked, one for each expert."""
    yield "token_embd.weight", ["tok_embeddings.weight"]
    for i in range(config.n_layers):
        for theirs, ours in BLOCK.items():
            yield f"blk.{i}.{theirs}.weight", [f"layers.{i}.{ours}.weight"]
        prefix = f"layers.{i}.feed_forward"
        if config.use_moe:
            yield f"blk.{i}.ffn_gate_inp.weight", [f"{prefix}.gate.weight"]
        for theirs, ours in FEED_FORWARD.items():
            if not config.use_moe:
                yield f"blk.{i}.{theirs}.weight", [f"{prefix}.{ours}.weight"]
                continue
            experts = range(config.n_routed_experts)
            stack = [f"{prefix}.experts.{e}.{ours}.weight" for e in experts]
            yield f"blk.{i}.{theirs}_exps.weight", stack
            if config.n_shared_experts:
                yield f"blk.{i}.{theirs}_shexp.weight", [f"{prefix}.shared_experts.{ours}.weight"]
    yield "output_norm.weight", ["norm.weight"]


def architecture(config: LMConfig) -> str:
    """GGUF's name of the architecture that computes what the model does.

    Raises:
        UserError: if there is none.
    """
    if not config.use_moe:
        return "llama"
    if scores_sum_to_one(config):
        return "granitemoe"
    if config.n_shared_experts:
        return "deepseek"
    name = "norm_topk_prob off" if config.num_experts_per_tok > 1 else "num_experts_per_tok 1"
    raise UserError(
        f"--to gguf: {name} weights experts by raw scores, which llama.cpp does in no architecture "
        "without shared experts"
    )


def write_gguf(
    path: Path,
    model: MiniMindLM,
    tokenizer: Tokenizer,
    file_type: str = "f16",
    name: str = "minimind",
) -> None:
    """Write weights and tokenizer to one GGUF file, tensor by tensor.

    Norms and gates stay in float32. A matrix whose rows are no multiple of 32 numbers, which Q8_0
    cannot hold, is written in float16.

    Args:
        path: the file.
        model: weights in float32 on the CPU, adapters merged.
        tokenizer: tokenizer of the model.
        file_type: f32, f16, bf16, q8_0, or q4_k_m by llama.cpp's own program.
        name: name of the model inside the file.

    Raises:
        UserError: if llama.cpp computes no such model or may give other token ids, or the program
            is not installed.
    """
    if file_type == LLAMA_QUANTIZE_TYPE:
        write_by_llama_quantize(path, model, tokenizer, name)
        return
    import gguf

    config = model.config
    arch = architecture(config)
    check_tokenizer(tokenizer)
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"--tokenizer_path: {len(tokenizer)} entries, while the model has {config.vocab_size}"
        )
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[file_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer)

    state = model.state_dict()
    plan = []
    for theirs, ours in tensor_sources(config):
        shape = tuple(state[ours[0]].shape)
        if theirs.endswith("_exps.weight"):
            shape = (len(ours), *shape)
        kind = tensor_type(theirs, shape[-1], file_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = prod(shape) // block * block_bytes
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), n_bytes, kind)
        plan.append((ours, shape, kind, n_bytes))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(n_bytes for *_, n_bytes in plan)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"{name}, {file_type}", disable=None
    ) as bar:
        for ours, shape, kind, n_bytes in plan:
            tensor = state[ours[0]] if len(ours) == 1 else torch.stack([state[n] for n in ours])
            writer.write_tensor_data(gguf.quantize(tensor.view(shape).numpy(), kind))
            bar.update(n_bytes)
    writer.close()


def tensor_type(name: str, row: int, file_type: str) -> "GGMLQuantizationType":
    """The type of a tensor, of which one row has `row` numbers, in a file of a type."""
    import gguf

    types = gguf.GGMLQuantizationType
    if any(part in name for part in IN_FLOAT32):
        return types.F32
    kind = types[file_type.upper()]
    return types.F16 if row % gguf.GGML_QUANT_SIZES[kind][0] else kind


def write_by_llama_quantize(path: Path, model: MiniMindLM, tokenizer: Tokenizer, name: str) -> None:
    """Write a float32 file, let llama.cpp quantize it to Q4_K_M, and remove it.

    Rows that are no multiple of 256 numbers take more bits: Q5_0 in place of Q4_K, and Q8_0 in
    place of Q6_K.
    """
    program = shutil.which("llama-quantize")
    if program is None:
        raise UserError(
            f"--dtype {LLAMA_QUANTIZE_TYPE}: needs llama-quantize of llama.cpp on the PATH "
            "(https://github.com/ggml-org/llama.cpp/releases has it); --dtype q8_0 needs nothing"
        )
    source = path.with_name(f".{path.name}.f32")
    try:
        write_gguf(source, model, tokenizer, "f32", name)
        command = [program, source, path, LLAMA_QUANTIZE_TYPE.upper()]
        with report_os_errors(f"--dtype {LLAMA_QUANTIZE_TYPE}: {program}"):
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    finally:
        source.unlink(missing_ok=True)
    if done.returncode or not path.is_file():
        last = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise UserError(f"--dtype {LLAMA_QUANTIZE_TYPE}: {program} failed ({last})")


def add_shape(writer: "GGUFWriter", config: LMConfig) -> None:
    """Add what llama.cpp needs to know of the model beside its weights."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if not config.use_moe:
        return
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if writer.arch == "deepseek":
        writer.add_leading_dense_block_count(0)
        writer.add_expert_feed_forward_length(config.hidden_dim)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(1.0)
        return
    if config.n_shared_experts:
        width = config.hidden_dim * config.n_shared_experts
        writer.add_expert_shared_feed_forward_length(width)
    writer.add_attention_scale(config.head_dim**-0.5)
    writer.add_embedding_scale(1.0)
    writer.add_residual_scale(1.0)
    writer.add_logit_scale(1.0)


def add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer) -> None:
    """Add vocabulary, merges, special tokens and chat template."""
    import gguf

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    types = [gguf.TokenType.NORMAL] * len(tokenizer)
    tags = tag_ids(tokenizer)
    for token in backend["added_tokens"]:
        is_tag = token["id"] in tags
        types[token["id"]] = gguf.TokenType.USER_DEFINED if is_tag else gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merge_pairs(backend)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        knows_thinking = "enable_thinking" in tokenizer.chat_template
        writer.add_chat_template(THINKING_IS_FREE * knows_thinking + tokenizer.chat_template)
