"""Decoding: the layers of the network as they run token by token, for rows of different lengths.

`MiniMindLM.forward` is made for training and for reading. Here are the same layers with as few
operations per token as PyTorch allows: a step of a small model on a CPU spends its time on starting
operations and on reading weights from memory, not on arithmetic.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rotary import rotary_cos_sin, rotate

CHUNK = 512  # tokens of a prompt that go through the layers together
PREFIXES = 8  # finished rows whose keys and values are stored for prompts that begin with them
FEW = 32  # for so many rows or fewer, a CPU computes W xᵀ faster than x Wᵀ


class Decoder(ABC):
    """Rows of tokens with their keys and values, and how they grow.

    Rows 0 … n − 1 are those that `step` continues: when a row ends, `move` puts the last one into
    its place. All rows have as many slots as the longest one ever needed, and some to grow into.
    """

    def __init__(self, rows: int, max_seq_len: int, device: torch.device):
        # The tokens of each row whose keys and values are computed.
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.max_seq_len = max_seq_len
        self.device = device
        self.caches: list[Tensor] = []  # keys and values, (rows, heads, slots, head_dim) each
        # Tokens of finished rows, each with its part of every cache.
        self.prefix_cache: deque[tuple[list[int], list[Tensor]]] = deque(maxlen=PREFIXES)

    @property
    def capacity(self) -> int:
        """Slots of every row."""
        return self.caches[0].shape[2] if self.caches else 0

    def prefill(self, row: int, ids: Sequence[int]) -> Tensor:
        """Put a prompt into a row, and compute the logits of the next token: (vocab_size,).

        A beginning that some row or the prefix cache has is copied. Raises ValueError if the prompt
        is empty or longer than the context.
        """
        *_, logits = self.prefill_in_chunks(row, ids)
        return logits

    def prefill_in_chunks(
        self, row: int, ids: Sequence[int], all_logits: bool = False
    ) -> Iterator[Tensor]:
        """Put a prompt into a row, CHUNK tokens at a time: other rows may take steps in between.

        Yields the logits after the last token of each chunk, (vocab_size,). With `all_logits`,
        nothing is copied, and logits follow every token, (T, vocab_size), of chunks of half the
        size (the output layer then takes as long as the others).
        """
        ids = list(ids)
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        self._make_room(len(ids))
        # The last token is always computed, since its logits are needed.
        shared = 0 if all_logits else self._copy_prefix(row, ids[:-1])
        self.tokens[row] = ids[:shared]
        size = CHUNK // 2 if all_logits else CHUNK
        for start in range(shared, len(ids), size):
            chunk = ids[start : start + size]
            logits = self._extend(row, chunk, len(chunk) if all_logits else 1)
            self.tokens[row] += chunk
            yield logits if all_logits else logits[0]

    def _copy_prefix(self, row: int, ids: list[int]) -> int:
        """Copy the longest known beginning of `ids` into a row, and return its length."""
        in_rows = [common_prefix(tokens, ids) for tokens in self.tokens]
        stored = [common_prefix(tokens, ids) for tokens, _ in self.prefix_cache]
        shared = max(in_rows + stored)
        if in_rows[row] == shared:
            return shared
        if shared in in_rows:
            self._copy(in_rows.index(shared), row, shared)
        else:
            _, parts = self.prefix_cache[stored.index(shared)]
            for cache, part in zip(self.caches, parts, strict=True):
                cache[row, :, :shared] = part[:, :shared]
        return shared

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each of the first n rows, and compute the logits (n, vocab_size).

        Raises ValueError if a row is full.
        """
        lengths = [len(row) for row in self.tokens[: len(tokens)]]
        self._make_room(max(lengths) + 1)
        logits = self._step(tokens, lengths)
        for row, token in enumerate(tokens):
            self.tokens[row].append(token)
        return logits

    def move(self, source: int, target: int) -> None:
        """Replace row `target` by row `source`, which is empty afterwards."""
        if source != target:
            self._copy(source, target, len(self.tokens[source]))
            self.tokens[target] = self.tokens[source]
            self.tokens[source] = []

    def cache_prefix(self, row: int) -> None:
        """Copy a row into the prefix cache, which drops the oldest of PREFIXES."""
        length = len(self.tokens[row])
        parts = [cache[row, :, :length].clone() for cache in self.caches]
        self.prefix_cache.append((list(self.tokens[row]), parts))

    def release(self) -> None:
        """Empty all rows and free their memory; the prefix cache stays."""
        self.tokens = [[] for _ in self.tokens]
        self.caches = []

    def _make_room(self, length: int) -> None:
        """Make sure that every row has slots for so many tokens."""
        if length > self.max_seq_len:
            raise ValueError(f"{length} tokens exceed max_seq_len {self.max_seq_len}")
        if length > self.capacity:
            self._resize(min(self.max_seq_len, max(length, 2 * self.capacity, 128)))

    def _resize(self, capacity: int) -> None:
        """Reallocate the caches with `capacity` slots, and copy what they hold."""
        caches = self._new_caches(capacity)
        if self.caches:
            for new, old in zip(caches, self.caches, strict=True):
                new[:, :, : self.capacity] = old
        self.caches = caches

    def _copy(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` slots from row to row."""
        for cache in self.caches:
            cache[target, :, :length] = cache[source, :, :length]

    @abstractmethod
    def _new_caches(self, capacity: int) -> list[Tensor]:
        """Make tensors of zeros for `caches`."""

    @abstractmethod
    def _extend(self, row: int, chunk: list[int], logits_to_keep: int) -> Tensor:
        """Compute tokens that follow a row's: logits of the last (logits_to_keep, vocab_size)."""

    @abstractmethod
    def _step(self, tokens: Sequence[int], lengths: list[int]) -> Tensor:
        """Compute a token for each of n rows of these lengths: logits (n, vocab_size)."""


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two sequences have in common at their beginning."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


class Layer(NamedTuple):
    """A block's weights; projections of the same input are one matrix."""

    attention_norm: Tensor  # (dim,)
    qkv: Tensor  # (dim + 2 · kv_dim, dim)
    wo: Tensor  # (dim, dim)
    ffn_norm: Tensor  # (dim,)
    w13: Tensor | None  # (2 · hidden_dim, dim), w1's rows first; None for a mixture of experts
    w2: Tensor | None  # (dim, hidden_dim)
    moe: nn.Module | None


class TorchDecoder(Decoder):
    """A decoder of PyTorch operations, on the model's device and in its dtype.

    Making one takes a part of a second, since most weights are copied: code that generates often
    keeps it. After a change of weights or of the active adapter, another must be made. `model` is a
    MiniMindLM (whose file imports this one); dropout is off, whatever its mode.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, rows: int = 1):
        config = model.config
        super().__init__(rows, config.max_seq_len, model.device)
        self.config = config
        self.kv_heads = config.n_kv_heads
        self.group = config.n_heads // config.n_kv_heads
        self.embedding = model.tok_embeddings.weight
        self.few_rows = self.device.type == "cpu" and rows > 1
        self.layers = [self._fuse(block) for block in model.layers]
        self.norm = self._norm(model.norm)
        self.output = self._stored(self.embedding)
        self.epsilon = self.norm.new_tensor(math.sqrt(config.dim * config.norm_eps))

    def _fuse(self, block: nn.Module) -> Layer:
        attention, feed_forward = block.attention, block.feed_forward
        dense = not self.config.use_moe
        return Layer(
            self._norm(block.attention_norm),
            self._stored(attention.wq, attention.wk, attention.wv),
            self._stored(attention.wo),
            self._norm(block.ffn_norm),
            self._stored(feed_forward.w1, feed_forward.w3) if dense else None,
            self._stored(feed_forward.w2) if dense else None,
            None if dense else feed_forward,
        )

    def _norm(self, norm: nn.Module) -> Tensor:
        return norm.weight.float() * math.sqrt(self.config.dim)

    def _stored(self, *projections: nn.Linear | Tensor) -> Tensor:
        """Stack weights into one, (out, in), in the memory layout that is read fastest."""
        weights = [p if isinstance(p, Tensor) else applied_weight(p) for p in projections]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        out_features, in_features = weight.shape
        # For one row on a CPU, a product reads a wide matrix faster by columns.
        if self.device.type == "cpu" and not self.few_rows and out_features > in_features:
            return weight.t().contiguous().t()
        return weight.detach()

    def _new_caches(self, capacity: int) -> list[Tensor]:
        # One tensor per layer: the heads of keys, then those of values.
        shape = (len(self.tokens), 2 * self.kv_heads, capacity, self.config.head_dim)
        return [self.embedding.new_zeros(shape) for _ in self.layers]

    def _resize(self, capacity: int) -> None:
        positions = torch.arange(capacity, device=self.device)
        table = rotary_cos_sin(self.config.head_dim, positions, self.config.rope_theta)
        self.table = table[:, None]  # (slots, 1, head_dim / 2, 2)
        super()._resize(capacity)

    @torch.no_grad()
    def _extend(self, row: int, chunk: list[int], logits_to_keep: int) -> Tensor:
        past, length = len(self.tokens[row]), len(chunk)
        slots, kv = past + length, self.kv_heads
        mask = None
        if past:
            slot = torch.arange(slots, device=self.device)
            mask = slot <= slot[past:, None]  # (T, S)

        def attend(cache: Tensor, q: Tensor, kv_new: Tensor) -> Tensor:
            cache[row, :, past:slots] = kv_new.transpose(0, 1)
            # Each group of query heads shares its head of keys and values by a view.
            k, v = cache[row, :, None, :slots].expand(-1, self.group, -1, -1).split(kv)
            q = q.unflatten(1, (kv, -1)).permute(1, 2, 0, 3)  # (kv, group, T, head_dim)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past)
            return out.permute(2, 0, 1, 3)  # (T, kv, group, head_dim)

        ids = torch.tensor(chunk, device=self.device)
        with torch.autocast(self.device.type, enabled=False):  # compute in the weights' dtype
            x = self._layers(ids, self.table[past:slots], attend)
            return self._logits(x[-logits_to_keep:])

    @torch.no_grad()
    def _step(self, tokens: Sequence[int], lengths: list[int]) -> Tensor:
        n, kv, slots = len(tokens), self.kv_heads, max(lengths) + 1
        if min(lengths) == max(lengths):
            here, positions, mask = (slice(n), slice(None), lengths[0]), lengths[0], None
        else:
            positions = torch.tensor(lengths, device=self.device)
            here = (torch.arange(n, device=self.device), slice(None), positions)
            visible = torch.arange(slots, device=self.device) <= positions[:, None]
            mask = torch.zeros_like(visible, dtype=self.embedding.dtype)
            mask = mask.masked_fill_(~visible, float("-inf"))[:, None, None]  # (n, 1, 1, S)

        def attend(cache: Tensor, q: Tensor, kv_new: Tensor) -> Tensor:
            cache[here] = kv_new
            k, v = cache[:n, :, :slots].split(kv, dim=1)
            # The query heads of a group become several queries to one head of keys and values.
            q = q.unflatten(1, (kv, -1))  # (n, kv, group, head_dim)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        with torch.autocast(self.device.type, enabled=False):
            ids = torch.tensor(tokens, device=self.device)
            return self._logits(self._layers(ids, self.table[positions], attend))

    def _layers(
        self, ids: Tensor, table: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Ids (N,) → (N, dim); `attend` takes a layer's cache, the queries, the keys and values."""
        heads, kv = self.config.n_heads, self.kv_heads
        rotated = heads + kv  # queries and keys
        x = self.embedding[ids]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = self._product(self._normed(x, layer.attention_norm), layer.qkv)
            qkv = qkv.contiguous().view(len(ids), rotated + kv, self.config.head_dim)
            qkv[:, :rotated] = rotate(qkv[:, :rotated], table)
            out = attend(cache, qkv[:, :heads], qkv[:, heads:])
            x = x + self._product(out.reshape(len(ids), -1), layer.wo)
            h = self._normed(x, layer.ffn_norm)
            if layer.moe is not None:
                x = x + layer.moe(h[None], None)[0][0]
            else:
                gate, up = self._product(h, layer.w13).chunk(2, dim=-1)
                x = x + self._product(F.silu(gate) * up, layer.w2)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self._product(self._normed(x, self.norm), self.output)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in three operations: x · √dim · w / √(‖x‖² + dim · eps), in fp32."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.epsilon) * weight).to(x.dtype)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, in) times (out, in) transposed: (N, out)."""
        if self.few_rows and len(x) <= FEW:
            return torch.mm(weight, x.t()).t()
        return F.linear(x, weight)


def applied_weight(projection: nn.Linear) -> Tensor:
    """A projection's weight, with the active adapter added where it has one."""
    return getattr(projection, "adapted_weight", projection.weight)
