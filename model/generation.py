"""How the network writes: its cache, how a token is chosen, and the loop around both."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far, for every layer.

    Room for `capacity` slots is taken at the first write and doubled when it runs out, so that a
    step writes its own slots and copies no others. The model advances `length` once a pass has
    gone through all layers.

    Args:
        n_layers: layers of the model.
        capacity: slots to make room for at once.

    Attributes:
        length: slots filled.
    """

    def __init__(self, n_layers: int, capacity: int = 0):
        self.length = 0
        self.capacity = capacity
        self.keys: list[Tensor | None] = [None] * n_layers
        self.values: list[Tensor | None] = [None] * n_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values behind the `length` that are there.

        Args:
            layer: number of the layer.
            k: (B, n_kv_heads, T, head_dim).
            v: as `k`.

        Returns:
            All keys and values, (B, n_kv_heads, length + T, head_dim). Where gradients are
            recorded they are copies, since autograd cannot follow a write in place.
        """
        return self._append(self.keys, layer, k), self._append(self.values, layer, v)

    def _append(self, store: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        old = store[layer]
        end = self.length + new.shape[2]
        if torch.is_grad_enabled():
            joined = new if old is None else torch.cat((old[:, :, : self.length], new), dim=2)
            store[layer] = joined
            return joined
        if old is None or end > old.shape[2]:
            room = max(end, self.capacity, 0 if old is None else 2 * old.shape[2])
            store[layer] = new.new_zeros(*new.shape[:2], room, new.shape[3])
            if old is not None:
                store[layer][:, :, : self.length] = old[:, :, : self.length]
        store[layer][:, :, self.length : end] = new
        return store[layer][:, :, :end]


def choose_token(
    logits: Tensor,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row.

    Args:
        logits: (B, vocab_size).
        do_sample: draw from the distribution; else take the likeliest token.
        temperature: divides the logits; below 1 sharpens.
        top_k: draw among the k likeliest only.
        top_p: draw among the fewest tokens whose probability reaches p (nucleus sampling,
            https://arxiv.org/abs/1904.09751).
        generator: source of randomness.

    Returns:
        (B,) int64.
    """
    if not do_sample:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # never overflows
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        probs = probs.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), 0.0)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


class GenerationMixin:
    """Gives a model with MiniMindLM's `forward` the means to write."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        stream: bool = False,
    ) -> Tensor | Iterator[Tensor]:
        """Continue each row; defaults and names are those of transformers' `generate`.

        It ends when every row has written an end token, after `max_new_tokens`, or when the
        context is full.

        Args:
            input_ids: (B, T) int64, T at least 1; shorter rows padded on the left.
            attention_mask: (B, T), 0 at padding.
            max_new_tokens: upper limit of new tokens per row.
            do_sample, temperature, top_k, top_p, generator: see `choose_token`.
            eos_token_id: one or several end tokens. Default: the config's.
            pad_token_id: what a row that has ended is filled with. Default: the config's.
            stream: return an iterator over new tokens, (B,) each, as they are chosen.

        Returns:
            Prompt and continuation, (B, T + new) int64, or the iterator.

        Raises:
            ValueError: for an empty prompt, one that fills the context, padding on the right, or a
                sampling setting outside its range.
        """
        if input_ids.shape[1] == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if input_ids.shape[1] >= self.config.max_seq_len:
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} tokens leaves no room in the context of "
                f"max_seq_len {self.config.max_seq_len}"
            )
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("pad prompts on the left: a row's last position must be a token")
        if do_sample and temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {top_p}")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {top_k}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        if eos_token_id is None:
            eos_token_id = self.config.eos_token_id
        if pad_token_id is None:
            pad_token_id = self.config.pad_token_id or 0
        ends = [] if eos_token_id is None else eos_token_id
        ends = torch.as_tensor(ends, dtype=torch.long, device=input_ids.device).flatten()
        room = self.config.max_seq_len - input_ids.shape[1]
        sampling = (do_sample, temperature, top_k, top_p, generator)
        tokens = self._continue(
            input_ids, attention_mask, min(max_new_tokens, room), sampling, ends, pad_token_id
        )
        if stream:
            return tokens
        return torch.cat((input_ids, *(token[:, None] for token in tokens)), dim=1)

    def batch_generate(
        self, prompts: Sequence[Tensor], batch_size: int = 64, **options: Any
    ) -> list[Tensor]:
        """Continue prompts of different lengths, several at a time, those of like length together.

        Args:
            prompts: (T,) int64 each, T at least 1.
            batch_size: the most rows at a time.
            options: of `generate`, but for `attention_mask` and `stream`.

        Returns:
            The new tokens of each prompt, without the end token and what follows it: (new,) int64.

        Raises:
            ValueError: as `generate`.
        """
        eos = options.pop("eos_token_id", None)
        if eos is None:
            eos = self.config.eos_token_id
        ends = torch.as_tensor([] if eos is None else eos, dtype=torch.long, device=self.device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[Tensor] = [ends] * len(prompts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(prompts[chosen[-1]])
            ids = torch.zeros(len(chosen), width, dtype=torch.long, device=self.device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(prompts[i]) :] = prompts[i]
                mask[row, width - len(prompts[i]) :] = 1
            new = self.generate(ids, mask, eos_token_id=eos, **options)[:, width:]
            ended = torch.isin(new, ends).int()
            lengths = torch.where(ended.any(1), ended.argmax(1), new.shape[1])
            for row, i in enumerate(chosen):
                answers[i] = new[row, : lengths[row]]
        return answers

    @torch.no_grad()
    def _continue(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        new_tokens: int,
        sampling: tuple,
        ends: Tensor,
        pad: int,
    ) -> Iterator[Tensor]:
        batch, prompt = input_ids.shape
        if attention_mask is not None:
            new_slots = attention_mask.new_ones(batch, new_tokens)
            attention_mask = torch.cat((attention_mask, new_slots), dim=1)
        cache = KVCache(self.config.n_layers, capacity=prompt + new_tokens)
        ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        for _ in range(new_tokens):
            slots = cache.length + input_ids.shape[1]
            logits = self(
                input_ids,
                attention_mask=None if attention_mask is None else attention_mask[:, :slots],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            token = choose_token(logits, *sampling).masked_fill(ended, pad)
            yield token
            ended |= torch.isin(token, ends)
            if ended.all():
                return
            input_ids = token[:, None]
