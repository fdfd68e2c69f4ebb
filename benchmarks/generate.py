"""Tokens per second of generation, beside transformers and llama.cpp on a model of the same shape.

    python benchmarks/generate.py                  (26 M, 2 threads, prompt 64, 256 new tokens)
    python benchmarks/generate.py --size 104m

All write the same number of tokens to the same prompts, greedily, in turns, each in a process of
its own. ONNX Runtime and int8 need onnxruntime and onnx (scripts/requirements.txt), llama.cpp needs
gguf and xllamacpp (tests/requirements.txt); it is measured on a CPU, with one row.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from harness import WARM_UP, compare_speeds, describe, in_own_process, make_peer, parse_flags
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common import ROOT, make_parser
from model import LMConfig, MiniMindLM, TorchDecoder, choose_device, load_tokenizer

PEER, OURS = "transformers", "MiniMind, decoder kept"
ONNX = {"MiniMind in ONNX Runtime": 32, "MiniMind --quantize int8": 8}  # bits
LLAMA_CPP = {"llama.cpp, F32": "f32", "llama.cpp, Q8_0": "q8_0"}  # file types
# Operations of PyTorch that only look at a tensor in another way, or call another one.
VIEWS = {
    *("view", "slice", "select", "as_strided", "transpose", "t", "expand", "split", "chunk"),
    *("unflatten", "unsqueeze", "reshape", "permute", "detach", "view_as_complex", "unbind"),
    *("empty", "empty_strided", "linear", "matmul", "narrow", "split_with_sizes", "item"),
}

Generate = Callable[[int], object]  # a function of the round's number


def make_generate(name: str, args: argparse.Namespace, rows: int) -> Generate:
    """What continues the prompts of a round by `args.new` tokens each."""
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig.from_size(args.size)).to(device).eval()
    shape = (WARM_UP + args.rounds, rows, args.prompt)  # other prompts each time: none is cached
    prompts = torch.randint(3, model.config.vocab_size, shape, device=device)
    if name in LLAMA_CPP:
        return ask_llama_cpp(model, prompts, LLAMA_CPP[name], args)
    options = {"max_new_tokens": args.new, "eos_token_id": -1}
    if name == PEER:
        model = make_peer(model.config).to(device).eval()
        options = {"max_new_tokens": args.new, "min_new_tokens": args.new, "pad_token_id": 0}
        options |= {"do_sample": False, "attention_mask": torch.ones_like(prompts[0])}
    elif name in ONNX:
        from model.onnx_decoder import OnnxDecoder

        options["decoder"] = OnnxDecoder(model, rows, ONNX[name])
    elif name == OURS:
        options["decoder"] = TorchDecoder(model, rows)
    return lambda round_: model.generate(prompts[round_], **options)


def ask_llama_cpp(
    model: MiniMindLM, prompts: Tensor, file_type: str, args: argparse.Namespace
) -> Generate:
    """The same for the model as a GGUF file in llama.cpp, one row at a time."""
    from llama_cpp import LlamaCpp

    from export.gguf_format import write_gguf

    with tempfile.TemporaryDirectory() as folder:  # it has read or mapped the file when it is up
        path = Path(folder) / "model.gguf"
        tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
        write_gguf(path, model, tokenizer, file_type)
        engine = LlamaCpp(path, threads=args.threads, exact=False)
    options = {"n_predict": args.new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def generate(round_: int) -> None:
        for row in prompts[round_].tolist():
            reply = engine.post("/completion", prompt=row, return_tokens=True, **options)
            assert len(reply["tokens"]) == args.new

    return generate


def answer_rounds(connection: Connection, name: str, args: argparse.Namespace, rows: int) -> None:
    """In a process of its own: make the engine, and let it generate for each number received."""
    generate = make_generate(name, args, rows)
    connection.send("ready")
    for round_ in iter(connection.recv, None):
        generate(round_)
        connection.send("done")


@contextmanager
def own_process(name: str, args: argparse.Namespace, rows: int) -> Iterator[Generate]:
    """An engine in a process of its own, so that no threads of another one wait beside it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer_rounds, args=(theirs, name, args, rows), daemon=True)
    process.start()
    theirs.close()  # if the process ends, `recv` raises an error
    ours.recv()

    def generate(round_: int) -> None:
        ours.send(round_)
        ours.recv()

    yield generate
    ours.send(None)
    process.join()


def operations_per_token(name: str, args: argparse.Namespace) -> float:
    """Operations of PyTorch that compute something, per new token of one row."""
    generate = make_generate(name, args, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        generate(0)
    events = profiled.key_averages()
    return sum(e.count for e in events if e.key.removeprefix("aten::") not in VIEWS) / args.new


def main() -> None:
    """Measure and print a table for one row and one for a batch."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("26m", "104m"), default="26m")
    parser.set_defaults(device="cpu")
    args = parse_flags(parser, prompt=64, new=256, batch_size=16, threads=2, rounds=5)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    print(describe(args, device, torch.float32))
    single: dict[str, float] = {}
    for rows in (1, args.batch_size):
        names = [PEER, "MiniMind", OURS]
        if device.type == "cpu":
            names += [*ONNX, *(LLAMA_CPP if rows == 1 else ())]
        tokens = dict.fromkeys(names, [rows * args.new] * (WARM_UP + args.rounds))
        print(f"\nbatch {rows}", end="", flush=True)
        with ExitStack() as stack:
            engines = {name: stack.enter_context(own_process(name, args, rows)) for name in names}
            speeds = compare_speeds(engines, tokens, "tokens/s", PEER)
        single = single or speeds
    for name in (PEER, OURS):
        print(f"{name}: {in_own_process(operations_per_token, name, args):.0f} operations")
    gains = (f"{name} {speed / single[name]:.1f}" for name, speed in speeds.items())
    print(f"\nbatch {args.batch_size} : batch 1: {', '.join(gains)}")


if __name__ == "__main__":
    main()
