"""A model of ours as lm-evaluation-harness (lm_eval) calls it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from common import UserError
from model import Continuation, KVCache, Sampling
from model.generation import continue_all

from .chat_model import ChatModel
from .scoring import ROW

LONGEST_ANSWER = 256  # tokens, where a task sets no limit, as in lm_eval's own models

Scored = tuple[float, bool]  # log-probability of a continuation, and whether it is the greedy one


class HarnessModel(TemplateLM):
    """A model whose scores equal those of lm_eval's own `hf` model on its export.

    A text begins with `<s>`, as every document in training does; `hf` adds it with
    `add_bos_token=True`. A text that begins with `<s>` already has been through the chat template,
    and its control tokens are control tokens; in any other text they are ordinary characters.

    Args:
        chat_model: the model. Batches have as many rows as its decoder.
    """

    def __init__(self, chat_model: ChatModel):
        super().__init__()
        self.model = chat_model.model
        self.decoder = chat_model.decoder
        self.tokenizer = chat_model.tokenizer
        self.name = chat_model.name
        self.rows = len(self.decoder.tokens)
        self._device = self.model.device

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's cache of requests calls the chat template."""
        return self.name

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.model.config.max_seq_len

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages, up to where the next answer begins or the last one breaks off."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Ids of a text, which begins with `<s>` unless `add_special_tokens` is False."""
        templated = string.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(string, add_special_tokens=False, split_special_tokens=not templated)[
            "input_ids"
        ]
        if templated or add_special_tokens is False:
            return ids
        return [self.tokenizer.bos_token_id, *ids]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, each after `<s>`, in windows of the context's length.

        `hf` computes the same without `add_bos_token`, with which it predicts a second `<s>`.
        """
        owners, windows = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                owners.append(i)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (score, _) in zip(owners, scored, strict=True):
            totals[i] += score
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[Scored]:
        """Score continuations; a context that several have in common is computed once.

        Args:
            requests: texts (unused), ids of the context, ids of the continuation. What exceeds the
                model's context is cut from the left.
            disable_tqdm: show no progress.
        """
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"--tasks: a continuation of {len(continuation)} tokens, for a context of "
                    f"{self.max_length}"
                )
            by_context[tuple(context[-(self.max_length + 1 - len(continuation)) :])].append(i)
        groups = []
        for context, members in by_context.items():
            remaining = iter(members)
            while piece := list(islice(remaining, self.rows)):
                groups.append((list(context), piece))
        scores: list[Scored] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="continuations", disable=disable_tqdm) as progress:
            for batch in self._batches(groups, requests):
                continuations = [[requests[i][2] for i in members] for _, members in batch]
                scored = self._score([context for context, _ in batch], continuations)
                members = [i for _, group in batch for i in group]
                for i, score in zip(members, scored, strict=True):
                    scores[i] = score
                progress.update(len(members))
        return scores

    def _batches(
        self,
        groups: list[tuple[list[int], list[int]]],
        requests: Sequence[tuple[Any, list[int], list[int]]],
    ) -> Iterator[list[tuple[list[int], list[int]]]]:
        """Groups of like length together, the longest first, as many as fit into a batch."""

        def length(group: tuple[list[int], list[int]]) -> int:
            return len(group[0]) + max(len(requests[i][2]) for i in group[1])

        batch, rows, longest = [], 0, 0
        for group in sorted(groups, key=length, reverse=True):
            rows += len(group[1])
            if batch and (rows > self.rows or rows * longest > self.rows * ROW):
                yield batch
                batch, rows = [], len(group[1])
            longest = longest if batch else length(group)
            batch.append(group)
        if batch:
            yield batch

    @torch.no_grad()
    def _score(
        self, contexts: Sequence[list[int]], continuations: Sequence[Sequence[list[int]]]
    ) -> list[Scored]:
        """Score the continuations of each context, one after another.

        Positions alone tell rows apart from their padding: a token in slot s with position p
        attends to the slots from s − p on, which is where its row begins.
        """
        device = self.model.device
        rows = [
            (c[-1:], ids) for c, own in zip(contexts, continuations, strict=True) for ids in own
        ]
        known = torch.tensor([len(context) - 1 for context in contexts], device=device)
        slots, length = int(known.max()), max(len(ids) for _, ids in rows)
        counts = torch.tensor([len(own) for own in continuations], device=device)
        cache = None
        if slots:
            cache = KVCache(self.model.config.n_layers)
            ids = [[0] * (slots + 1 - len(c)) + c[:-1] for c in contexts]
            positions = torch.arange(slots, device=device) - (slots - known[:, None])
            self.model(
                torch.tensor(ids, device=device),
                position_ids=positions.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.keys = [x.repeat_interleave(counts, dim=0) for x in cache.keys]
            cache.values = [x.repeat_interleave(counts, dim=0) for x in cache.values]
        padded = torch.zeros(len(rows), length + 1, dtype=torch.long, device=device)
        for row, (last, ids) in zip(padded, rows, strict=True):
            row[: len(ids) + 1] = torch.tensor(last + ids)
        targets = padded[:, 1:]
        positions = torch.arange(length, device=device)
        logits = self.model(
            padded[:, :-1],
            position_ids=known.repeat_interleave(counts)[:, None] + positions,
            past_key_values=cache,
        ).logits.float()  # (rows, length, vocab_size)
        lengths = torch.tensor([len(ids) for _, ids in rows], device=device)
        padding = positions >= lengths[:, None]
        scores = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        greedy = (logits.argmax(-1) == targets) | padding
        totals = scores.masked_fill(padding, 0.0).sum(-1)
        return list(zip(totals.tolist(), greedy.all(-1).tolist(), strict=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until one of a task's stop strings, an end token or its limit."""
        by_options: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_options[repr(request.args[1])].append(i)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as progress:
            for members in by_options.values():
                members = iter(sorted(members, key=lambda i: len(prompts[i])))
                while batch := list(islice(members, self.rows)):
                    options = requests[batch[0]].args[1]
                    answers = self._generate([prompts[i] for i in batch], options)
                    for i, text in zip(batch, answers, strict=True):
                        texts[i] = text
                    progress.update(len(batch))
        return texts

    def _generate(self, prompts: Sequence[list[int]], options: Mapping[str, Any]) -> Iterator[str]:
        """Continue prompts with a task's generation_kwargs."""
        options = normalize_gen_kwargs(dict(options), LONGEST_ANSWER)
        stops = [stop for stop in options.pop("until") if stop]
        room = min(options.pop("max_gen_toks"), self.max_length // 2)
        known = {field.name for field in fields(Sampling)}
        for name in options.keys() - known:
            raise UserError(f"--tasks: generation_kwargs: {name} is not supported")
        rows = [
            Continuation(
                prompt[-(self.max_length - room) :],
                room,
                Sampling(**options),
                end_tokens=frozenset([self.eot_token_id]),
            )
            for prompt in prompts
        ]
        # A token has a byte at least: a stop string that has just ended lies within so many.
        newest = max((len(stop.encode("utf-8")) for stop in stops), default=0) + 1
        for _ in continue_all(self.decoder, rows):
            for row in rows:
                if row.finish_reason is None:
                    text = self.tokenizer.decode(row.new_tokens[-newest:])
                    if any(stop in text for stop in stops):
                        row.finish_reason = "stop"
        for row in rows:
            text = self.tokenizer.decode(row.answer(), skip_special_tokens=True)
            for stop in stops:
                text = text.partition(stop)[0]
            yield text
