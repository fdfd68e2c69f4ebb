"""Many clients at once beside the same requests one after another, on a server of its own.

    python benchmarks/serve_load.py                     (26 M, 32 clients, 2 threads)
    python benchmarks/serve_load.py --quantize int8

The clients run beside the server, on the same processor. Every answer must equal the one that the
model gives alone. A piece of a stream is a token or, of letters that are several tokens, a few. The
bound is the queue's: a prompt waits for a round of each prompt before it, so the last one's first
token comes after as many rounds as there are clients, and none takes longer than the longest time
between two pieces. Needs scripts/requirements.txt.
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
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

from common import ROOT
from model import LMConfig, MiniMindLM, load_tokenizer, save_weights, tokenizer_hash

WORDS = ["river", "stone", "cloud", "green", "seven", "market", "lantern", "山", "水", "朋友"]


class Answer(NamedTuple):
    """What a client got: the text, its pieces' times in seconds from the request on, its tokens."""

    text: str
    times: list[float]
    tokens: int


async def ask(client: httpx.AsyncClient, prompt: str, new: int) -> Answer:
    """Stream one answer."""
    began, text, times, tokens = time.perf_counter(), "", [], 0
    body = {
        "model": "full_sft_512",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": new,
        "stream": True,
        "stream_options": {"include_usage": True},
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
    url: str, prompts: list[str], new: int, together: bool
) -> tuple[float, list[Answer]]:
    """Seconds for all prompts, and the answers."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        if together:
            answers = await asyncio.gather(*(ask(client, prompt, new) for prompt in prompts))
        else:
            answers = [await ask(client, prompt, new) for prompt in prompts]
        return time.perf_counter() - began, list(answers)


def percentiles(values: list[float]) -> str:
    """The median, the 95th percentile and the largest, in milliseconds."""
    cut = statistics.quantiles(values, n=20, method="inclusive")
    return " / ".join(f"{1000 * value:,.0f}" for value in (cut[9], cut[18], max(values)))


def main() -> None:
    """Start the server, load it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--prompt", type=int, default=40, help="words")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()

    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer)))
    rng = random.Random(0)
    prompts = [
        " ".join(rng.choice(WORDS) for _ in range(args.prompt)) for _ in range(max(args.clients))
    ]
    url = f"http://127.0.0.1:{args.port}"
    with tempfile.TemporaryDirectory() as folder:
        save_weights(
            Path(folder) / "full_sft_512.pth",
            model,
            model.config,
            "full_sft",
            tokenizer_hash(tokenizer),
        )
        command = [sys.executable, ROOT / "scripts" / "serve_openai_api.py"]
        command += ["--out_dir", folder, "--port", str(args.port)]
        command += ["--quantize", args.quantize] if args.quantize else []
        server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
        try:
            wait_for(url, server)
            run(url, prompts, args)
        finally:
            server.terminate()
            server.wait()


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Wait until the server answers."""
    while server.poll() is None:
        try:
            httpx.get(f"{url}/health")
            return
        except httpx.TransportError:
            time.sleep(0.2)
    sys.exit("the server did not start")


def run(url: str, prompts: list[str], args: argparse.Namespace) -> None:
    """Print the table."""
    asyncio.run(measure(url, prompts[:2], 8, together=False))  # warm up
    seconds, alone = asyncio.run(measure(url, prompts, args.new, together=False))
    single = sum(answer.tokens for answer in alone) / seconds
    print(
        f"26 M, {args.quantize or 'fp32'}, {args.threads} threads, prompts of {args.prompt} words, "
        f"{args.new} new tokens\n"
        "| clients | tokens/s | ratio | first piece, ms: median / 95 % / last | bound | "
        "between pieces, ms: median / 95 % / longest | as alone |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    runs = [("one after another", 1, seconds, alone)]
    for clients in args.clients:
        runs.append(
            (f"{clients}", clients, *asyncio.run(measure(url, prompts[:clients], args.new, True)))
        )
    for name, clients, seconds, answers in runs:
        speed = sum(answer.tokens for answer in answers) / seconds
        gaps = [b - a for answer in answers for a, b in pairwise(answer.times)]
        # One at a time, no piece waits for a prompt: the longest time says nothing of such rounds.
        bound = f"{1000 * clients * max(gaps):,.0f}" if clients > 1 else "–"
        firsts = [answer.times[0] for answer in answers]
        firsts = firsts if len(firsts) > 1 else firsts * 2
        same = sum(a.text == alone[i].text for i, a in enumerate(answers))
        print(
            f"| {name} | {speed:,.0f} | {speed / single:.1f} | {percentiles(firsts)} | "
            f"{bound} | {percentiles(gaps)} | {same} of {len(answers)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
