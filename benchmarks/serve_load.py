"""Many clients at once beside the same requests one after another, on a server of its own.

    python benchmarks/serve_load.py                     (26 M, 32 clients, 2 threads)
    python benchmarks/serve_load.py --quantize int8
    python benchmarks/serve_load.py --clients 16 --schema

The clients run beside the server, on the same processor. "As alone" counts the answers that equal
the model's alone. A piece of a stream is a token, or a few where a letter is several tokens. The
bound is the queue's: the last prompt's first token comes after as many rounds as there are clients,
and none takes longer than the longest time between two pieces. --schema asks the last number of
clients also for JSON of a schema, in turn with free answers. Needs scripts/requirements.txt.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from harness import parse_flags

from common import ROOT, make_parser
from model import LMConfig, MiniMindLM, load_tokenizer, save_weights, tokenizer_hash

WORDS = ["river", "stone", "cloud", "green", "seven", "market", "lantern", "山", "水", "朋友"]
MODEL = "full_sft_512"


class Answer(NamedTuple):
    """An answer: its text, the seconds from the request to each piece, its number of tokens."""

    text: str
    times: list[float]
    tokens: int


# Longer than an answer may be, so that as many tokens come as without it.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "size": {"enum": ["small", "large"]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    },
}
JSON = {"type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMA, "strict": True}}
ROUNDS = 3  # of answers without and with the schema


async def ask(client: httpx.AsyncClient, prompt: str, new: int, **more: Any) -> Answer:
    """Stream one answer; `more` are fields of the request."""
    began, text, times, tokens = time.perf_counter(), "", [], 0
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": new,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if chunk["usage"]:
                    tokens = chunk["usage"]["completion_tokens"]
                elif content := chunk["choices"][0]["delta"].get("content"):
                    times.append(time.perf_counter() - began)
                    text += content
    return Answer(text, times, tokens)


async def measure(
    url: str, prompts: Sequence[str], new: int, clients: int, **more: Any
) -> tuple[float, list[Answer]]:
    """Tokens per second over all prompts, so many at a time, and the answers."""
    places = asyncio.Semaphore(clients)

    async def ask_in_turn(prompt: str) -> Answer:
        async with places:
            return await ask(client, prompt, new, **more)

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        answers = await asyncio.gather(*map(ask_in_turn, prompts))
        return sum(answer.tokens for answer in answers) / (time.perf_counter() - began), answers


def percentiles(seconds: Sequence[float]) -> str:
    """The median, the 95th percentile and the largest, in milliseconds."""
    cut = statistics.quantiles(seconds, n=20, method="inclusive")
    return " / ".join(f"{1000 * value:,.0f}" for value in (cut[9], cut[18], max(seconds)))


def print_table(url: str, prompts: Sequence[str], args: argparse.Namespace) -> None:
    """Measure and print."""
    asyncio.run(measure(url, prompts[:2], 8, 1))  # warm up
    print(
        f"26 M, {args.quantize or 'fp32'}, {args.threads} threads, prompts of {args.prompt} words, "
        f"{args.new} new tokens\n"
        "| clients | tokens/s | ratio | first piece, ms: median / 95 % / last | bound | "
        "between pieces, ms: median / 95 % / longest | as alone |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    single, alone = 0.0, []
    for clients in (1, *args.clients):
        asked = prompts if clients == 1 else prompts[:clients]
        speed, answers = asyncio.run(measure(url, asked, args.new, clients))
        if clients == 1:
            single, alone = speed, answers
        gaps = [b - a for answer in answers for a, b in pairwise(answer.times)]
        # One at a time, no piece waits for a prompt: there is no round to bound.
        bound = f"{1000 * clients * max(gaps):,.0f}" if clients > 1 else "–"
        same = sum(a.text == b.text for a, b in zip(answers, alone[: len(answers)], strict=True))
        print(
            f"| {clients if clients > 1 else 'one after another'} | {speed:,.0f} | "
            f"{speed / single:.1f} | {percentiles([answer.times[0] for answer in answers])} | "
            f"{bound} | {percentiles(gaps)} | {same} of {len(answers)} |",
            flush=True,
        )


def compare_schema(url: str, prompts: Sequence[str], new: int) -> None:
    """Print how fast all prompts at once are answered freely and in JSON of SCHEMA."""
    asks: dict[str, dict[str, Any]] = {"free": {}, "schema": {"response_format": JSON}}
    speeds: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(ROUNDS):
        for name, more in asks.items():
            speeds[name].append(asyncio.run(measure(url, prompts, new, len(prompts), **more))[0])
    ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
    shown = (f"{name} {statistics.median(values):,.0f}" for name, values in speeds.items())
    print(f"{len(prompts)} clients, tokens/s: {', '.join(shown)}; ratio {ratio:.2f}")


def main() -> None:
    """Start the server, load it, print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32], help="2 or more each")
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--schema", action="store_true", help="also answers in JSON of a schema")
    args = parse_flags(parser, prompt=40, new=64, threads=2, port=8765)
    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer)))
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=args.prompt)) for _ in range(max(args.clients))]
    url = f"http://127.0.0.1:{args.port}"
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / f"{MODEL}.pth"
        save_weights(weights, model, model.config, "full_sft", tokenizer_hash(tokenizer))
        command = [sys.executable, ROOT / "scripts" / "serve_openai_api.py"]
        command += ["--out_dir", folder, "--port", str(args.port)]
        command += ["--device", args.device] if args.device else []
        command += ["--quantize", args.quantize] if args.quantize else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            if not server.stdout.readline():  # it prints a line as soon as it listens
                sys.exit("the server did not start")
            print_table(url, prompts, args)
            if args.schema:
                compare_schema(url, prompts[: args.clients[-1]], args.new)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
