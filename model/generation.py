"""Generation: the loop that samples token after token, and the methods that run it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import Decoder, TorchDecoder
from .LMConfig import LMConfig
from .sampling import Constraint, History, Sampling, add_bias, constrain, penalise, sample


@dataclass(eq=False)
class Continuation:
    """A prompt and the tokens that are sampled after it."""

    ids: Sequence[int]  # the prompt
    max_new_tokens: int
    sampling: Sampling
    generator: torch.Generator | None = None  # source of randomness; None: PyTorch's own
    end_tokens: frozenset[int] = frozenset()
    stop: Sequence[list[int]] = ()  # sequences of tokens of which each ends the text
    new_tokens: list[int] = field(default_factory=list)  # with those that ended the text
    # "stop" after an end token or a stop sequence, "length" at `max_new_tokens` or a full context.
    finish_reason: str | None = None
    history: History | None = None  # what penalties need
    constraint: Constraint | None = None  # the form that the new tokens must have

    def append(self, token: int, max_seq_len: int) -> None:
        """Add a new token, and set `finish_reason` if it is the last one."""
        self.new_tokens.append(token)
        if self.history is not None:
            self.history.add(token)
        if self.constraint is not None:
            self.constraint.add(token)
        length = len(self.new_tokens)
        if token in self.end_tokens or any(self.new_tokens[-len(s) :] == s for s in self.stop):
            self.finish_reason = "stop"
        elif length >= self.max_new_tokens or len(self.ids) + length >= max_seq_len:
            self.finish_reason = "length"

    def answer(self) -> list[int]:
        """The new tokens without the end token; a stop sequence stays."""
        tokens = self.new_tokens
        return tokens[:-1] if tokens and tokens[-1] in self.end_tokens else tokens


class SamplingLoop:
    """Continues the rows of a decoder, all by one token per step.

    Rows join and leave between steps: row i of the decoder belongs to `active[i]` and holds all its
    tokens but the newest.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.active: list[Continuation] = []

    def step(self) -> Tensor:
        """Compute the logits of every row's next token: (rows, vocab_size)."""
        return self.decoder.step([row.new_tokens[-1] for row in self.active])

    def sample(self, rows: Sequence[Continuation], logits: Tensor) -> None:
        """Sample the next token of some active rows, with one `sampling` and one `generator`."""
        sampling = rows[0].sampling
        if sampling.penalises:
            for row in rows:
                if row.history is None:
                    row.history = History(row.ids, logits.shape[-1], logits.device)
            logits = penalise(logits, sampling, [row.history for row in rows])
        if sampling.logit_bias:
            logits = add_bias(logits, sampling)
        if any(row.constraint is not None for row in rows):
            logits = constrain(logits, [row.constraint for row in rows])
        tokens = sample(logits, sampling, rows[0].generator).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.append(token, self.decoder.max_seq_len)

    def remove(self, index: int) -> None:
        """Take a row out of the loop; the last one takes its place."""
        last = self.active.pop()
        self.decoder.move(len(self.active), index)
        if index < len(self.active):
            self.active[index] = last


@torch.no_grad()
def continue_all(decoder: Decoder, rows: Sequence[Continuation]) -> Iterator[None]:
    """Continue prompts, which have one `sampling` and one `generator`, until all have finished.

    Yields each time that every unfinished row has got a token.
    """
    if rows[0].max_new_tokens == 0:
        return
    loop = SamplingLoop(decoder)
    logits = torch.stack([decoder.prefill(i, row.ids) for i, row in enumerate(rows)])
    loop.active.extend(rows)
    while True:
        loop.sample(loop.active, logits)
        yield
        for i in reversed(range(len(loop.active))):
            if loop.active[i].finish_reason is not None:
                loop.remove(i)
        if not loop.active:
            return
        logits = loop.step()


class GenerationMixin(nn.Module):
    """Gives MiniMindLM the methods that generate."""

    config: LMConfig
    device: torch.device

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        *,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        stop: Sequence[Sequence[int]] = (),
        num_return_sequences: int = 1,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        stream: bool = False,
        decoder: Decoder | None = None,
        **sampling: float | None,
    ) -> Tensor | Iterator[Tensor]:
        """Continue each row; defaults and names are those of transformers' `generate`.

        A row ends with an end token or a stop sequence, after `max_new_tokens`, or when it fills
        the context, to which padding does not count; it is computed no further.

        Args:
            input_ids: (B, T) int64, T at least 1; shorter rows padded on the left.
            attention_mask: (B, T), 0 at padding.
            max_new_tokens: upper limit of new tokens per row.
            eos_token_id: one or several end tokens. Default: the config's, as `pad_token_id`.
            pad_token_id: what a row that has ended is filled with.
            stop: sequences of tokens after which a row ends; they stay in it, as the end token.
            num_return_sequences: continuations of each row, one after another in the result.
            generator: source of randomness. Default: PyTorch's own, or one with `seed`.
            stream: return an iterator over new tokens, (B · num_return_sequences,) each.
            decoder: computes the tokens, in at least as many rows. A beginning of a prompt that it
                holds already is not computed again. Default: a new TorchDecoder.
            sampling: the fields of `Sampling`.

        Returns prompt and continuation, (B · num_return_sequences, T + new) int64, or the iterator.
        Raises ValueError for an empty prompt, one that fills the context, padding on the right, or
        a setting outside its range.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.shape[1] and not attention_mask[:, -1].all():
            raise ValueError("pad prompts on the left: a row's last position must be a token")
        prompts = [row[mask] for row, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        prompts = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        rows = self._continuations(
            prompts, max_new_tokens, eos_token_id, stop, generator, seed, **sampling
        )
        if decoder is None:
            decoder = TorchDecoder(self, len(rows))
        if len(decoder.tokens) < len(rows):
            raise ValueError(f"the decoder has {len(decoder.tokens)} rows, not {len(rows)}")
        pad = (self.config.pad_token_id or 0) if pad_token_id is None else pad_token_id

        def new_tokens() -> Iterator[Tensor]:
            for step, _ in enumerate(continue_all(decoder, rows)):
                tokens = [r.new_tokens[step] if step < len(r.new_tokens) else pad for r in rows]
                yield torch.tensor(tokens, device=input_ids.device)

        if stream:
            return new_tokens()
        input_ids = input_ids.repeat_interleave(num_return_sequences, dim=0)
        return torch.cat((input_ids, *(tokens[:, None] for tokens in new_tokens())), dim=1)

    def batch_generate(
        self,
        prompts: Sequence[Tensor],
        batch_size: int = 64,
        decoder: Decoder | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Continue prompts (T,) int64, those of like length together, `batch_size` at a time.

        The options are max_new_tokens, eos_token_id, stop, generator, seed, decoder and sampling of
        `generate`, whose errors they cause. Returns the new tokens of each prompt, (new,) int64,
        without the end token; a stop sequence stays.
        """
        rows = self._continuations(prompts, **options)
        if decoder is None:
            decoder = TorchDecoder(self, max(1, min(batch_size, len(rows))))
        batch_size = min(batch_size, len(decoder.tokens))
        by_length = sorted(rows, key=lambda row: len(row.ids))
        for start in range(0, len(by_length), batch_size):
            for _ in continue_all(decoder, by_length[start : start + batch_size]):
                pass
        return [torch.tensor(r.answer(), dtype=torch.long, device=self.device) for r in rows]

    def _continuations(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int = 20,
        eos_token_id: int | list[int] | None = None,
        stop: Sequence[Sequence[int]] = (),
        generator: torch.Generator | None = None,
        seed: int | None = None,
        **sampling: float | None,
    ) -> list[Continuation]:
        """Check the arguments of `generate` and make a Continuation of each prompt."""
        settings = Sampling(**sampling)
        if not all(map(len, prompts)):
            raise ValueError("the prompt is empty: give at least one token")
        longest, context = max(map(len, prompts), default=0), self.config.max_seq_len
        if longest >= context:
            raise ValueError(f"a prompt of {longest} tokens fills the max_seq_len {context}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        if not all(stop):
            raise ValueError("a stop sequence is empty")
        if seed is not None:
            if generator is not None:
                raise ValueError("give a generator or a seed, not both")
            generator = torch.Generator(self.device).manual_seed(seed)
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        stop = [list(sequence) for sequence in stop]
        return [
            Continuation(prompt.tolist(), max_new_tokens, settings, generator, ends, stop)
            for prompt in prompts
        ]
