"""The network, in the order in which a token meets it: masks, attention, feed-forward, model."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .generation import GenerationMixin
from .kv_cache import KVCache
from .LMConfig import LMConfig
from .rotary import apply_rotary_emb, rotary_cos_sin


def visible_mask(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
    length: int,
    device: torch.device,
) -> Tensor | None:
    """Which slots each of `length` queries after `past` slots attends to: (B or 1, 1, T, S) bool.

    None where attention is simply causal. A query of padding that may attend to nothing attends to
    itself: a softmax over nothing is NaN.
    """
    if attention_mask is None and position_ids is None and (past == 0 or length == 1):
        return None
    keys = torch.arange(past + length, device=device)
    queries = keys[past:]
    mask = (keys <= queries[:, None])[None]  # (1, T, S)
    if position_ids is not None:
        mask = mask & (keys >= (queries - position_ids)[..., None])  # (B, T, S)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None].bool()
        itself = keys == queries[:, None]
        mask = mask | (itself & ~mask.any(-1, keepdim=True))
    return mask[:, None]


def additive_mask(visible: Tensor, x: Tensor, config: LMConfig) -> Tensor:
    """Turn a mask into what attention adds to its scores, once for all layers: 0, or −∞ if hidden.

    (B or 1, 1, T, S) → the same shape, or with flash_attn (B · n_kv_heads, 1, T, S): see
    `Attention.forward`. The result has the dtype of matrix products with x (B, T, dim).
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
    if not config.flash_attn:
        return mask
    return mask.expand(len(x), config.n_kv_heads, -1, -1).flatten(0, 1)[:, None]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim), in the dtype of the input."""
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.type_as(x)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat each head: (B, n_kv_heads, S, head_dim) → (B, n_kv_heads · n_rep, S, head_dim)."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=1)


class Attention(nn.Module):
    """Causal self-attention with shared key and value heads."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        self.flash_attn = config.flash_attn
        self.dropout = config.dropout
        kv_dim = self.n_kv_heads * self.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.wo.writes_residual = True

    def forward(
        self, x: Tensor, cos_sin: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Mix each position with those that it may attend to: (B, T, dim) → (B, T, dim).

        `cos_sin` is the rotary table of these T positions. `mask` is from `additive_mask`, or None
        if causal, for an empty cache or a single query. New keys and values go into `cache`.
        """
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.n_heads, self.head_dim)
        k = self.wk(x).view(batch, length, self.n_kv_heads, self.head_dim)
        v = self.wv(x).view(batch, length, self.n_kv_heads, self.head_dim)
        q, k = apply_rotary_emb(q, k, cos_sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)

        dropout = self.dropout if self.training else 0.0
        causal = mask is None and length > 1
        n_rep = self.n_heads // self.n_kv_heads
        if not self.flash_attn:
            scores = q @ repeat_kv(k, n_rep).transpose(-1, -2) * self.head_dim**-0.5
            if causal:
                mask = scores.new_full((length, length), float("-inf")).triu(1)
            if mask is not None:
                scores = scores + mask
            weights = F.dropout(scores.float().softmax(-1).type_as(q), dropout)
            out = weights @ repeat_kv(v, n_rep)
        elif mask is None:
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=n_rep > 1
            )
        else:
            # CUDA's fused kernels take a mask only without enable_gqa. So each group of query heads
            # becomes a batch entry, whose one key and value head is shared by a view.
            k, v = (t.flatten(0, 1)[:, None].expand(-1, n_rep, -1, -1) for t in (k, v))
            out = F.scaled_dot_product_attention(
                q.unflatten(1, (-1, n_rep)).flatten(0, 1), k, v, attn_mask=mask, dropout_p=dropout
            ).reshape(q.shape)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2.writes_residual = True

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoEGate(nn.Module):
    """Chooses the experts of each token and computes the loss that balances their load.

    The load-balancing loss is alpha · Σ_e f_e · P_e: f_e is the share of (token, choice) pairs that
    went to expert e, times the number of experts, and P_e its mean score; over each sequence and
    then averaged (`seq_aux`; DeepSeekMoE, https://arxiv.org/abs/2401.06066) or over the batch
    (Switch Transformer, https://arxiv.org/abs/2101.03961). Padding does not count.
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_experts = config.n_routed_experts
        self.alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(self.n_experts, config.dim))

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route each token of x (B, T, dim); `valid` (B, T) is False at padding, or None.

        Returns indices of experts (B, T, top_k), their weights (B, T, top_k) fp32, the auxiliary
        loss (alpha included), and (token, choice) pairs per expert without padding (n_experts,).
        """
        # In fp32: rounded to bf16, scores would change routes.
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).softmax(-1)  # (B, T, n_experts)
        weights, experts = scores.topk(self.top_k, dim=-1)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)

        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        chosen = F.one_hot(experts, self.n_experts).sum(2) * valid[..., None]  # (B, T, n_experts)
        load = chosen.sum((0, 1))
        if not self.seq_aux:
            chosen, scores, valid = chosen.flatten(0, 1), scores.flatten(0, 1), valid.flatten()
        tokens = valid.sum(-1).clamp(min=1)[..., None]  # (B, 1), or (1,) over the batch
        share = chosen.sum(-2) * self.n_experts / (tokens * self.top_k)
        mean_score = (scores * valid[..., None]).sum(-2) / tokens
        balance = (share * mean_score).sum(-1)  # 0 for a sequence of padding alone
        aux_loss = self.alpha * balance.sum() / valid.any(-1).sum().clamp(min=1)
        return experts, weights, aux_loss, load


class MOEFeedForward(nn.Module):
    """A gate, routed experts and optionally a shared one, in place of one feed-forward layer."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.experts = nn.ModuleList(
            FeedForward(config.dim, config.hidden_dim) for _ in range(config.n_routed_experts)
        )
        self.gate = MoEGate(config)
        shared = config.n_shared_experts
        self.shared_experts = (
            FeedForward(config.dim, config.hidden_dim * shared) if shared else None
        )

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, dim) → (B, T, dim), with `MoEGate`'s auxiliary loss and load per expert."""
        experts, weights, aux_loss, load = self.gate(x, valid)
        tokens = x.flatten(0, 1)  # (N, dim)
        top_k = experts.shape[-1]
        order = experts.flatten().argsort(stable=True)  # (N · top_k,) pairs, grouped by expert
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        # An expert without tokens runs on an empty tensor, so that its gradient is 0, not None.
        groups = tokens[order // top_k].split(counts)
        outputs = torch.cat(
            [expert(group) for expert, group in zip(self.experts, groups, strict=True)]
        )
        outputs = outputs[order.argsort()].view(-1, top_k, x.shape[-1])  # back in token order
        y = (outputs * weights.view(-1, top_k, 1).type_as(outputs)).sum(1).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, aux_loss, load


class MiniMindBlock(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        if config.use_moe:
            self.feed_forward = MOEFeedForward(config)
        else:
            self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, T, dim) → (B, T, dim), with the auxiliary loss and expert load of a MoE layer."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cos_sin, mask, cache))
        aux_loss = load = None
        if isinstance(self.feed_forward, MOEFeedForward):
            y, aux_loss, load = self.feed_forward(self.ffn_norm(x), valid)
        else:
            y = self.feed_forward(self.ffn_norm(x))
        return x + self.dropout(y), aux_loss, load


class MiniMindOutput(NamedTuple):
    """Result of one forward pass.

    `expert_load` counts the (token, choice) pairs of each expert, without padding.
    """

    loss: Tensor | None = None  # scalar, with labels
    logits: Tensor | None = None  # (B, T, vocab_size), or the last `logits_to_keep` positions
    past_key_values: KVCache | None = None  # with `use_cache`
    last_hidden_state: Tensor | None = None  # (B, T, dim), after the last norm
    aux_loss: Tensor | None = None  # scalar, summed over layers, alpha included; 0 if dense
    expert_load: Tensor | None = None  # (n_layers, n_experts) int64; None if dense


class MiniMindLM(GenerationMixin):
    """A decoder-only language model whose output layer shares its weight with the embedding.

    With `gradient_checkpointing`, training stores only the layers' inputs and computes the rest
    again in the backward pass (https://arxiv.org/abs/1604.06174).
    """

    def __init__(self, config: LMConfig | None = None):
        super().__init__()
        self.config = config = config or LMConfig()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight
        self.gradient_checkpointing = False
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02), times 1 / √(2 · n_layers) for projections into the residual stream.

        There are two of these per layer, so the stream's variance does not grow with depth (GPT-2).
        """
        if isinstance(module, nn.Linear):
            residual = getattr(module, "writes_residual", False)
            scale = (2 * self.config.n_layers) ** -0.5 if residual else 1.0
            nn.init.normal_(module.weight, std=0.02 * scale)
        elif isinstance(module, nn.Embedding | MoEGate):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.tok_embeddings.weight.device

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The trained projections of the blocks; not norms, gates, adapters and the embedding."""
        linear = (m for m in self.layers.modules() if isinstance(m, nn.Linear))
        return [layer.weight for layer in linear if layer.weight.requires_grad]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
    ) -> MiniMindOutput:
        """Predict the next token at every position of `input_ids` (B, T) int64.

        A query in slot s with position p attends to the slots s − p … s that `attention_mask`
        keeps; without `position_ids`, to every kept slot up to s. Rows that hold several documents
        give `position_ids` that restart at 0 with each document.

        Args:
            attention_mask: (B, past + T), 0 at padding.
            position_ids: (B, T) int64. Default: index of the slot, padding not counted.
            past_key_values: cache of the earlier slots, extended in place with `use_cache` only.
            use_cache: return a cache, from which the next call continues.
            logits_to_keep: compute logits of only so many last positions; 0 for all.
            labels: (B, T) int64, as `input_ids` (not shifted); -100 is ignored. `loss` is the mean
                over them; in train mode a MoE's auxiliary loss is added to it, so that any outside
                trainer balances the experts.

        Raises ValueError if the slots exceed max_seq_len (rows with `position_ids` may be longer),
        `attention_mask` has another width, `labels` come with `logits_to_keep`, or a cache with
        gradient checkpointing.
        """
        length, config = input_ids.shape[1], self.config
        past = past_key_values.length if past_key_values is not None else 0
        slots = past + length
        checkpointing = self.gradient_checkpointing and self.training
        if position_ids is None and slots > config.max_seq_len:
            raise ValueError(f"{slots} positions exceed max_seq_len {config.max_seq_len}")
        if use_cache and checkpointing:
            raise ValueError("gradient checkpointing runs layers twice and cannot fill a cache")
        if labels is not None and logits_to_keep:
            raise ValueError("labels need all logits: leave logits_to_keep at 0")
        if attention_mask is not None and attention_mask.shape[1] != slots:
            raise ValueError(f"attention_mask has {attention_mask.shape[1]} slots, not {slots}")
        visible = visible_mask(attention_mask, position_ids, past, length, input_ids.device)
        valid = None if attention_mask is None else attention_mask[:, past:].bool()
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        elif position_ids is None:
            position_ids = torch.arange(past, slots, device=input_ids.device)
        cos_sin = rotary_cos_sin(config.head_dim, position_ids, config.rope_theta)

        cache = past_key_values
        if cache is None and use_cache:
            cache = KVCache(config.n_layers)
        x = self.dropout(self.tok_embeddings(input_ids))
        mask = None if visible is None else additive_mask(visible, x, config)
        aux_losses, loads = [], []
        for layer in self.layers:
            inputs = (x, cos_sin, mask, cache, valid)
            if checkpointing:
                x, aux_loss, load = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, aux_loss, load = layer(*inputs)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
                loads.append(load)
        if use_cache:
            cache.length += length
        x = self.norm(x)
        logits = self.output(x[:, -logits_to_keep:])  # -0 keeps all

        aux_loss = torch.stack(aux_losses).sum() if aux_losses else x.new_zeros(())
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
            loss = loss / (targets != -100).sum().clamp(min=1)
            if self.training:
                loss = loss + aux_loss
        return MiniMindOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            last_hidden_state=x,
            aux_loss=aux_loss,
            expert_load=torch.stack(loads) if loads else None,
        )
