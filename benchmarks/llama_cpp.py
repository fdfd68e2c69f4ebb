"""llama.cpp as a peer, through the package xllamacpp: its server inside this process."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from torch import Tensor

SEPARATOR = 0  # an id that no text has


class LlamaCpp:
    """llama.cpp's server with one GGUF file, for one request at a time.

    Args:
        path: the file.
        context: tokens of prompt and answer together.
        threads: threads to compute with.
        exact: compute attention in float32 and keep keys and values so; else llama.cpp's defaults.
    """

    def __init__(self, path: Path, context: int = 1024, threads: int = 1, exact: bool = True):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = -1
        if exact:
            disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.flash_attn_type = disabled
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        """The reply to a request."""
        request = urllib.request.Request(
            f"{self.server.listening_address}{route}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts; what spells a control token stays text."""
        content = [part for text in texts for part in (text, SEPARATOR)]
        ids: list[list[int]] = [[]]
        body = {"content": content, "add_special": True, "parse_special": False}
        for id_ in self.post("/tokenize", **body)["tokens"]:
            if id_ == SEPARATOR:
                ids.append([])
            else:
                ids[-1].append(id_)
        return ids[:-1]

    def logprobs(self, ids: list[int], entries: int) -> Tensor:
        """Log-probabilities of every entry after some ids: (entries,)."""
        # Without logprobs of a token that ends in half a character: "a", after 16 control tokens.
        forced = [[16 + ord("a") - ord("!"), 1e4]]
        body = {"prompt": ids, "n_predict": 1, "n_probs": entries, "temperature": 0}
        reply = self.post("/completion", **body, logit_bias=forced, cache_prompt=False)
        found = {
            e["id"]: e["logprob"] for e in reply["completion_probabilities"][0]["top_logprobs"]
        }
        return torch.tensor([found[id_] for id_ in range(entries)])

    def generate(self, ids: list[int], new: int) -> list[int]:
        """Greedy tokens after some ids, up to `new` of them."""
        body = {"prompt": ids, "n_predict": new, "temperature": 0, "return_tokens": True}
        return self.post("/completion", **body, cache_prompt=False)["tokens"]
