"""Tokens per second of a whole optimizer step, beside transformers' model of the same shape.

    python benchmarks/train_throughput.py                 (26 M beside Llama)
    python benchmarks/train_throughput.py --compile
    python benchmarks/train_throughput.py --size moe      (145 M beside GraniteMoeShared)

Both models take the same batches and the same optimizer, in turn, so that a machine that slows down
slows both. A step is forward, loss, backward, clipping, AdamW.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from model import LMConfig, MiniMindLM
from training import make_optimizer

BATCH = {"small": 8, "base": 2, "moe": 4}


def peer_of(config: LMConfig) -> nn.Module:
    """Transformers' model of the same shape, untrained."""
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if not config.use_moe:
        return LlamaForCausalLM(LlamaConfig(**shape))
    return GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            **shape,
            num_local_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            shared_intermediate_size=config.hidden_dim * config.n_shared_experts,
            attention_multiplier=config.head_dim**-0.5,
            output_router_logits=True,
        )
    )


def own_loss(model: nn.Module, ids: Tensor, **rows: Tensor) -> Tensor:
    """The same computation as the peer's: each row is one document."""
    output = model(ids[:, :-1], **rows)
    loss = F.cross_entropy(output.logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    return loss + output.aux_loss


def own_packed_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """What train_pretrain.py computes: four documents to a row, isolated from each other."""
    positions = torch.arange(ids.shape[1] - 1, device=ids.device) % (ids.shape[1] // 4)
    rows = {
        "position_ids": positions.expand(len(ids), -1),
        "attention_mask": torch.ones_like(ids[:, :-1]),
    }
    return own_loss(model, ids, **rows)


def in_bf16_on_cuda(loss_of: Callable) -> Callable:
    """The same loss, with a GPU's matrix products in bf16, as training computes them there."""

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            return loss_of(model, ids)

    return loss


def peer_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """As transformers computes it, on the same targets."""
    targets = ids[:, 1:].contiguous()
    return model(ids[:, :-1], labels=targets, shift_labels=targets).loss


def make_step(model: nn.Module, loss_of: Callable, compiled: bool) -> Callable[[Tensor], None]:
    """A function that takes one optimizer step on a batch of ids."""
    optimizer = make_optimizer(model, optimizer_flags(5e-4, 0.1))
    called = torch.compile(model) if compiled else model

    def step(ids: Tensor) -> None:
        loss_of(called, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=BATCH, default="small")
    parser.add_argument("--batch_size", type=int, help="rows; default: 8, 4 for the MoE")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also the compiled models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LMConfig.from_size(args.size)
    batch = args.batch_size or BATCH[args.size]
    peer = "GraniteMoeShared" if config.use_moe else "Llama"
    contenders = {}
    for compiled in (False, True) if args.compile else (False,):
        suffix = ", compiled" if compiled else ""
        own_model = MiniMindLM(config).to(args.device).train()
        peer_model = peer_of(config).to(args.device).train()
        for name, model, loss_of in (
            ("MiniMind", own_model, own_loss),
            ("MiniMind, packed rows", own_model, own_packed_loss),
            (f"transformers {peer}", peer_model, peer_loss),
        ):
            contenders[name + suffix] = make_step(model, in_bf16_on_cuda(loss_of), compiled)
    precision = "bf16" if args.device.startswith("cuda") else "fp32"
    print(
        f"{sum(p.numel() for p in own_model.parameters()) / 1e6:.1f} M against "
        f"{sum(p.numel() for p in peer_model.parameters()) / 1e6:.1f} M parameters, "
        f"{batch} × {args.seq_len} tokens, {precision}, {args.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(args.rounds + 2):  # two to warm up
        ids = torch.randint(config.vocab_size, (batch, args.seq_len + 1), device=args.device)
        for name, step in contenders.items():
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            started = time.perf_counter()
            step(ids)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - started)

    tokens = batch * args.seq_len
    baseline = seconds[f"transformers {peer}"]
    print(f"\n{'median of ' + str(args.rounds):34}{'s/step':>8}{'tokens/s':>10}{'ratio':>8}")
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(baseline, times, strict=True))
        median = statistics.median(times)
        print(f"{name:34}{median:8.3f}{tokens / median:10,.0f}{ratio:8.2f}")
    print(f"ratio: how many times as fast as transformers {peer}, median over rounds")


if __name__ == "__main__":
    main()
