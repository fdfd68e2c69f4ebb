"""How the next token is sampled from the logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NUCLEUS = 256  # candidates that top_p tries first: it seldom needs more, and sorting all is slow


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; names, defaults and order of effect are those of transformers.

    Raises ValueError for a setting outside its range.
    """

    do_sample: bool = False  # False takes the most likely token
    temperature: float = 1.0
    top_k: int | None = None  # draw among the k most likely only; None or 0 for all
    # Draw among the fewest tokens whose probability reaches p (https://arxiv.org/abs/1904.09751).
    top_p: float = 1.0
    # Drop what is below this share of the top probability (https://arxiv.org/abs/2407.01082).
    min_p: float = 0.0
    # Divides positive and multiplies negative logits of tokens that occur in the prompt or were
    # generated (CTRL, https://arxiv.org/abs/1909.05858).
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # subtracted once for each time a token was generated
    presence_penalty: float = 0.0  # subtracted once if a token was generated at all
    logit_bias: tuple[tuple[int, float], ...] = ()  # tokens and what is added to their logits

    def __post_init__(self) -> None:
        if self.do_sample and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


class History:
    """The tokens of one text, as penalties need them; only one penalty counts the prompt's."""

    def __init__(self, prompt: Sequence[int], vocab_size: int, device: torch.device):
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt[list(prompt)] = True
        self.counts = torch.zeros(vocab_size, device=device)  # of new tokens

    def add(self, token: int) -> None:
        """Count a new token."""
        self.counts[token] += 1


def penalise(logits: Tensor, sampling: Sampling, histories: Sequence[History]) -> Tensor:
    """Lower the logits (B, vocab_size) of tokens that occurred in each row's history."""
    counts = torch.stack([history.counts for history in histories])
    generated = counts > 0
    occurred = torch.stack([history.in_prompt for history in histories]) | generated
    factor = sampling.repetition_penalty
    lowered = torch.where(logits < 0, logits * factor, logits / factor)
    logits = torch.where(occurred, lowered, logits)
    logits = logits - sampling.frequency_penalty * counts
    logits = logits - sampling.presence_penalty * generated.to(logits.dtype)
    limits = torch.finfo(logits.dtype)
    return logits.clamp(limits.min, limits.max)  # a tiny factor must not make them infinite


def add_bias(logits: Tensor, sampling: Sampling) -> Tensor:
    """Add the `logit_bias` to logits (B, vocab_size)."""
    tokens, values = zip(*sampling.logit_bias, strict=True)
    indices = torch.tensor(tokens, device=logits.device)
    return logits.index_add(-1, indices, logits.new_tensor(values).expand(len(logits), -1))


class Constraint(Protocol):
    """The form that one text must have, as far as it has come."""

    def allowed(self) -> Tensor:
        """Which tokens may come next: (vocab_size,) bool on the CPU, at least one of them True."""
        ...

    def add(self, token: int) -> None:
        """Go on to the next place of the text."""
        ...


def constrain(logits: Tensor, constraints: Sequence[Constraint | None]) -> Tensor:
    """Exclude from the logits (B, vocab_size) what each row's constraint does not allow."""
    every = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed = torch.stack([every if one is None else one.allowed() for one in constraints])
    return logits.masked_fill(~allowed.to(logits.device), float("-inf"))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The weights of a draw: (B, vocab_size) fp32, 0 where excluded; a row need not sum to 1."""
    logits = logits.float()
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # never overflows
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    threshold = sampling.min_p * probs.amax(-1, keepdim=True)
    if sampling.top_p < 1.0:
        descending, tokens = probs.topk(min(NUCLEUS, probs.shape[-1]))
        if (descending.sum(-1) < sampling.top_p).any():
            descending, tokens = probs.sort(-1, descending=True)
        before = descending.cumsum(-1) - descending  # probability of all likelier tokens
        excluded = before >= sampling.top_p
        excluded[:, 0] = False  # a p that is 0 in fp32 leaves the most likely
        nucleus = descending.masked_fill(excluded, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, tokens, nucleus)
    if sampling.min_p:
        probs = probs.masked_fill(probs < threshold, 0.0)
    return probs


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row, (B,) int64, from logits (B, vocab_size), penalties included."""
    if not sampling.do_sample:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator).squeeze(1)
