"""Tokens per second of generation, beside transformers' generate on a model of the same shape.

    python benchmarks/generate.py                  (26 M, 2 threads, prompt 64, 256 new tokens)
    python benchmarks/generate.py --size 104m

All write the same number of tokens to the same prompts, greedily, in turns. int8 needs onnxruntime
and onnx (scripts/requirements.txt).
"""

from collections.abc import Callable

import torch
from harness import WARM_UP, Contenders, compare_speeds, describe, make_peer, parse_flags
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from common import make_parser
from model import LMConfig, MiniMindLM, TorchDecoder, choose_device
from model.onnx_decoder import OnnxDecoder

PEER = "transformers"
# Operations of PyTorch that only look at a tensor in another way, or call another one.
VIEWS = {
    *("view", "slice", "select", "as_strided", "transpose", "t", "expand", "split", "chunk"),
    *("unflatten", "unsqueeze", "reshape", "permute", "detach", "view_as_complex", "unbind"),
    *("empty", "empty_strided", "linear", "matmul", "narrow", "split_with_sizes", "item"),
}


def contenders(model: MiniMindLM, peer: nn.Module, prompts: Tensor, new: int) -> Contenders:
    """What continues the prompts (B, T) by `new` tokens each, by name."""
    rows = len(prompts)
    options = {"max_new_tokens": new, "eos_token_id": -1}

    def ask_peer(_: int) -> Tensor:
        exactly = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        mask = torch.ones_like(prompts)
        return peer.generate(prompts, attention_mask=mask, do_sample=False, **exactly)

    found = {PEER: ask_peer, "MiniMind": lambda _: model.generate(prompts, **options)}
    reused = {"MiniMind, decoder kept": TorchDecoder(model, rows)}
    if prompts.device.type == "cpu":
        reused["MiniMind in ONNX Runtime"] = OnnxDecoder(model, rows, bits=32)
        reused["MiniMind --quantize int8"] = OnnxDecoder(model, rows)
    for name, decoder in reused.items():
        found[name] = lambda _, decoder=decoder: model.generate(prompts, decoder=decoder, **options)
    return found


def operations_per_token(generate: Callable[[int], object], new: int) -> float:
    """Operations of PyTorch that compute something, per new token."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        generate(0)
    events = profiled.key_averages()
    return sum(e.count for e in events if e.key.removeprefix("aten::") not in VIEWS) / new


def main() -> None:
    """Measure and print a table for one row and one for a batch."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("26m", "104m"), default="26m")
    parser.set_defaults(device="cpu")
    args = parse_flags(parser, prompt=64, new=256, batch_size=16, threads=2, rounds=5)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig.from_size(args.size)).to(device).eval()
    peer = make_peer(model.config).to(device).eval()
    print(describe(args, device, torch.float32))
    single: dict[str, float] = {}
    for rows in (1, args.batch_size):
        shape = (rows, args.prompt)
        prompts = torch.randint(3, model.config.vocab_size, shape, device=device)
        generators = contenders(model, peer, prompts, args.new)
        tokens = dict.fromkeys(generators, [rows * args.new] * (WARM_UP + args.rounds))
        print(f"\nbatch {rows}", end="")
        speeds = compare_speeds(generators, tokens, "tokens/s", PEER)
        if rows == 1:
            single = speeds
            for name in (PEER, "MiniMind, decoder kept"):
                print(f"{name}: {operations_per_token(generators[name], args.new):.0f} operations")
    gains = (f"{name} {speed / single[name]:.1f}" for name, speed in speeds.items())
    print(f"\nbatch {args.batch_size} : batch 1: {', '.join(gains)}")


if __name__ == "__main__":
    main()
