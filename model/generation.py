"""How the network writes: its cache, and the loop that chooses token after token."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .decoder import Decoder, TorchDecoder
from .sampling import History, Sampling, penalise, sample


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


class GenerationMixin:
    """Gives a MiniMindLM the means to write."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        stop: Sequence[Sequence[int]] = (),
        num_return_sequences: int = 1,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        stream: bool = False,
        decoder: Decoder | None = None,
    ) -> Tensor | Iterator[Tensor]:
        """Continue each row; defaults and names are those of transformers' `generate`.

        A row ends with an end token or a stop sequence, after `max_new_tokens`, or when it fills
        the context, to which padding does not count; it is computed no further.

        Args:
            input_ids: (B, T) int64, T at least 1; shorter rows padded on the left.
            attention_mask: (B, T), 0 at padding.
            max_new_tokens: upper limit of new tokens per row.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty,
                presence_penalty: see `Sampling`.
            eos_token_id: one or several end tokens. Default: the config's.
            pad_token_id: what a row that has ended is filled with. Default: the config's.
            stop: sequences of tokens after which a row ends; they stay in it, as the end token.
            num_return_sequences: continuations of each row, one after another in the result.
            generator: source of randomness. Default: PyTorch's own.
            seed: makes a generator.
            stream: return an iterator over new tokens, (B · num_return_sequences,) each, as they
                are chosen.
            decoder: what to compute with, with room for so many rows. Prompts that begin as what it
                holds are not computed again. Default: a new TorchDecoder.

        Returns:
            Prompt and continuation, (B · num_return_sequences, T + new) int64, or the iterator.

        Raises:
            ValueError: for an empty prompt, one that fills the context, padding on the right, or a
                setting outside its range.
        """
        sampling = Sampling(
            do_sample,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
        )
        if input_ids.shape[1] == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("pad prompts on the left: a row's last position must be a token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be at least 1, not {num_return_sequences}")
        if not all(stop):
            raise ValueError("a stop sequence is empty")
        if seed is not None:
            if generator is not None:
                raise ValueError("give a generator or a seed, not both")
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        if pad_token_id is None:
            pad_token_id = self.config.pad_token_id or 0
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[mask.bool()] for row, mask in zip(input_ids, kept, strict=True)]
        longest = max(map(len, prompts))
        if longest >= self.config.max_seq_len:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room in the context of max_seq_len "
                f"{self.config.max_seq_len}"
            )
        prompts = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        if decoder is None:
            decoder = TorchDecoder(self, len(prompts))
        if len(decoder.tokens) < len(prompts):
            raise ValueError(f"the decoder has {len(decoder.tokens)} rows, not {len(prompts)}")
        tokens = self._continue(
            decoder,
            prompts,
            max_new_tokens,
            sampling,
            generator,
            self._ends(eos_token_id),
            [list(sequence) for sequence in stop],
            pad_token_id,
        )
        if stream:
            return tokens
        input_ids = input_ids.repeat_interleave(num_return_sequences, dim=0)
        return torch.cat((input_ids, *(token[:, None] for token in tokens)), dim=1)

    def batch_generate(
        self,
        prompts: Sequence[Tensor],
        batch_size: int = 64,
        decoder: Decoder | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Continue prompts of different lengths, several at a time, those of like length together.

        Args:
            prompts: (T,) int64 each, T at least 1.
            batch_size: the most rows at a time.
            decoder: as for `generate`.
            options: of `generate`, but for `attention_mask`, `num_return_sequences` and `stream`.

        Returns:
            The new tokens of each prompt, each as long as it is, without the end token; a stop
            sequence stays: (new,) int64.

        Raises:
            ValueError: as `generate`.
        """
        ends = self._ends(options.get("eos_token_id"))
        stop = [list(sequence) for sequence in options.get("stop", ())]
        if decoder is None:
            decoder = TorchDecoder(self, max(1, min(batch_size, len(prompts))))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(prompts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(prompts[chosen[-1]])
            ids = torch.zeros(len(chosen), width, dtype=torch.long, device=self.device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(prompts[i]) :] = prompts[i]
                mask[row, width - len(prompts[i]) :] = 1
            new = self.generate(ids, mask, decoder=decoder, **options)[:, width:]
            for i, row in zip(chosen, new, strict=True):
                room = self.config.max_seq_len - len(prompts[i])
                answers[i] = row[: length_until(row[:room].tolist(), ends, stop)]
        return answers

    def _ends(self, eos_token_id: int | list[int] | None) -> set[int]:
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        if ends is None:
            return set()
        return {ends} if isinstance(ends, int) else set(ends)

    @torch.no_grad()
    def _continue(
        self,
        decoder: Decoder,
        prompts: list[Tensor],
        new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        ends: set[int],
        stop: list[list[int]],
        pad: int,
    ) -> Iterator[Tensor]:
        if new_tokens == 0:
            return
        device = prompts[0].device
        logits = torch.stack([decoder.prefill(i, ids.tolist()) for i, ids in enumerate(prompts)])
        history = None
        if sampling.penalises:
            history = History(prompts, logits.shape[-1], device)
        going = list(range(len(prompts)))  # which row of the result each row of the decoder is
        written: list[list[int]] = [[] for _ in prompts]
        for step in range(new_tokens):
            rows = torch.tensor(going, device=device)
            if history is not None:
                logits = penalise(logits, sampling, history.seen[rows], history.written[rows])
            chosen = sample(logits, sampling, generator)
            if history is not None:
                history.add(rows, chosen)
            yield torch.full((len(prompts),), pad, device=device).index_copy(0, rows, chosen)
            tokens = chosen.tolist()
            for row, token in zip(going, tokens, strict=True):
                written[row].append(token)
            ended = [
                has_ended(written[row], ends, stop)
                or len(prompts[row]) + len(written[row]) == self.config.max_seq_len
                for row in going
            ]
            if step == new_tokens - 1 or all(ended):
                return
            # The last row takes the place of one that ended.
            for i in reversed([i for i, done in enumerate(ended) if done]):
                decoder.move(len(going) - 1, i)
                going[i], tokens[i] = going[-1], tokens[-1]
                del going[-1], tokens[-1]
            logits = decoder.step(tokens)


def has_ended(written: list[int], ends: set[int], stop: list[list[int]]) -> bool:
    """Whether new tokens end in an end token or a stop sequence."""
    return written[-1] in ends or any(written[-len(tokens) :] == tokens for tokens in stop)


def length_until(tokens: list[int], ends: set[int], stop: list[list[int]]) -> int:
    """How many new tokens there are before the first end token, or with the first stop sequence."""
    for number in range(1, len(tokens) + 1):
        if has_ended(tokens[:number], ends, stop):
            return number - (tokens[number - 1] in ends)
    return len(tokens)
