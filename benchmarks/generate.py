"""Tokens per second of generation, beside transformers' generate on the same weights.

    python benchmarks/generate.py                  (26 M, 2 threads, prompt 64, 256 new tokens)
    python benchmarks/generate.py --size base

All write the same number of tokens to the same prompts, greedily, in turn, so that a machine that
slows down slows all. int8 needs onnxruntime and onnx (scripts/requirements.txt).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from common import ROOT
from model import LMConfig, MiniMindLM, TorchDecoder
from model.onnx_decoder import OnnxDecoder

sys.path.append(str(ROOT / "tests"))

from tiny_models import llama_with_weights_of

PEER = "transformers"


def contenders(
    model: MiniMindLM, llama: LlamaForCausalLM, prompts: Tensor, new: int
) -> dict[str, Callable[[], Tensor]]:
    """What continues the prompts (B, T) by `new` tokens each, by name: to (B, T + new) int64."""
    rows = len(prompts)
    options = {"max_new_tokens": new, "eos_token_id": -1}

    def peer() -> Tensor:
        mask = torch.ones_like(prompts)
        return llama.generate(
            prompts,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
        )

    found = {PEER: peer, "MiniMind": lambda: model.generate(prompts, **options)}
    kept = {"MiniMind, decoder kept": TorchDecoder(model, rows)}
    if prompts.device.type == "cpu":
        kept["MiniMind in ONNX Runtime"] = OnnxDecoder(model, rows, bits=32)
        kept["MiniMind --quantize int8"] = OnnxDecoder(model, rows)
    for name, decoder in kept.items():
        found[name] = lambda decoder=decoder: model.generate(prompts, decoder=decoder, **options)
    return found


def kernels_per_token(generate: Callable[[], Tensor], new: int) -> float:
    """Operations of PyTorch that do not only look at a tensor in another way, per new token."""
    views = {"view", "slice", "select", "as_strided", "transpose", "t", "expand", "split", "chunk"}
    views |= {"unflatten", "unsqueeze", "reshape", "permute", "detach", "view_as_complex", "unbind"}
    views |= {"empty", "empty_strided", "linear", "matmul", "narrow", "split_with_sizes", "item"}
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        generate()
    events = profiled.key_averages()
    return sum(e.count for e in events if e.key.removeprefix("aten::") not in views) / new


def main() -> None:
    """Measure and print a table for one row and one for a batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("small", "base"), default="small")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=256, help="tokens")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig.from_size(args.size)).eval()
    llama = llama_with_weights_of(model).to(args.device)
    model.to(args.device)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M, prompt {args.prompt}, "
        f"{args.new} new tokens, fp32, {args.device}, {args.threads} threads, "
        f"torch {torch.__version__}; median of {args.rounds}"
    )
    single: dict[str, float] = {}
    for rows in (1, args.batch_size):
        shape = (rows, args.prompt)
        prompts = torch.randint(3, model.config.vocab_size, shape, device=args.device)
        generators = contenders(model, llama, prompts, args.new)
        seconds: dict[str, list[float]] = {name: [] for name in generators}
        written = {name: generate() for name, generate in generators.items()}  # and warm up
        for _ in range(args.rounds):
            for name, generate in generators.items():
                started = time.perf_counter()
                generate().cpu()
                seconds[name].append(time.perf_counter() - started)
        print(f"\n{f'batch {rows}':28}{'tokens/s':>10}{'ratio':>8}{'× batch 1':>11}{'same':>7}")
        for name, times in seconds.items():
            speed = rows * args.new / statistics.median(times)
            single.setdefault(name, speed)
            ratio = statistics.median(b / t for b, t in zip(seconds[PEER], times, strict=True))
            same = (written[name] == written[PEER])[:, args.prompt :].float().mean().item()
            line = f"{name:28}{speed:10,.0f}{ratio:8.2f}{speed / single[name]:11.1f}{same:7.0%}"
            print(line, flush=True)
        if rows == 1:
            for name in (PEER, "MiniMind, decoder kept"):
                print(f"{name}: {kernels_per_token(generators[name], args.new):.0f} operations")
    print(f"\nratio: to {PEER} in the same round; same: tokens equal to {PEER}'s")


if __name__ == "__main__":
    main()
