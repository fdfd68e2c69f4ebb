"""Configuration of a MiniMind model."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass
class LMConfig:
    """Shape and routing of a MiniMindLM.

    Raises ValueError for an impossible combination; the message names the fields.
    """

    model_type: ClassVar[str] = "minimind"

    dim: int = 512  # width of the residual stream
    n_layers: int = 8  # transformer blocks
    n_heads: int = 8  # query heads; the head size is dim / n_heads
    # Key and value heads, each of n_heads / n_kv_heads query heads (https://arxiv.org/abs/2305.13245).
    n_kv_heads: int = 2
    vocab_size: int = 6400  # entries of the tokenizer
    # Inner width of the feed-forward layer. None: 2/3 · 4 · dim, which gives SwiGLU the parameters
    # of an ungated layer of 4 · dim (https://arxiv.org/abs/2002.05202), up to a `multiple_of`.
    hidden_dim: int | None = None
    multiple_of: int = 64
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    max_seq_len: int = 8192  # context length, in positions
    rope_theta: float = 1e6  # base of the rotary frequencies
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    flash_attn: bool = True  # F.scaled_dot_product_attention; False: the softmax step by step
    use_moe: bool = False  # a mixture of experts in place of each feed-forward layer
    num_experts_per_tok: int = 2  # routed experts of a token (top-k)
    n_routed_experts: int = 4
    n_shared_experts: int | bool | None = 1  # of every token, as one layer of that many widths
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.1  # weight of the load-balancing loss
    seq_aux: bool = True  # balance within each sequence; False: over the whole batch
    # Scale the top-k scores of a token to sum 1; not with top-1, whose gate would get no gradient.
    norm_topk_prob: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2  # the token, or tokens, that end a text
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        self.n_shared_experts = int(self.n_shared_experts or 0)
        self._check()
        if self.hidden_dim is None:
            rounded = -(-int(2 * 4 * self.dim / 3) // self.multiple_of)
            self.hidden_dim = rounded * self.multiple_of

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.dim // self.n_heads

    @property
    def shape(self) -> dict[str, Any]:
        """What tells models apart whose tensors may have the same shapes, by field."""
        names = ["use_moe", "dim", "n_layers", "n_heads", "n_kv_heads", "rope_theta"]
        if self.use_moe:
            names += ["n_routed_experts", "n_shared_experts", "num_experts_per_tok"]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LMConfig":
        """Make a configuration from the result of `dataclasses.asdict`.

        A dict with `transformers_version` is from when this class was a PretrainedConfig; what
        transformers wrote beside the fields is ignored. Else an unknown name is a TypeError.
        """
        if "transformers_version" in values:
            known = {field.name for field in fields(cls)}
            values = {name: value for name, value in values.items() if name in known}
        return cls(**values)

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "LMConfig":
        """Make one of `SIZES` by name; ValueError for another name."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **overrides})

    def _check(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(message)

        above_0 = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"]
        above_0 += ["max_seq_len", "norm_eps", "rope_theta"]
        if self.hidden_dim is not None:
            above_0.append("hidden_dim")
        if self.use_moe:
            above_0 += ["num_experts_per_tok", "n_routed_experts"]
        for name in above_0:
            require(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}")
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        heads, kv_heads, top_k = self.n_heads, self.n_kv_heads, self.num_experts_per_tok
        require(self.dim % heads == 0, f"dim {self.dim} is not divisible by n_heads {heads}")
        require(
            self.head_dim % 2 == 0,
            f"dim {self.dim} / n_heads {heads} must be even, for rotary embeddings",
        )
        require(heads % kv_heads == 0, f"n_heads {heads} is not divisible by n_kv_heads {kv_heads}")
        if self.use_moe:
            for name in ("n_shared_experts", "aux_loss_alpha"):
                value = getattr(self, name)
                require(value >= 0, f"{name} must be at least 0, not {value}")
            require(
                top_k <= self.n_routed_experts,
                f"num_experts_per_tok {top_k} is above n_routed_experts {self.n_routed_experts}",
            )
            require(self.scoring_func == "softmax", "scoring_func must be 'softmax'")


def shape_of_depth(depth: int) -> dict[str, int]:
    """The fields of a dense model of that many layers: width 64 · depth, as 512 × 8 has.

    8 heads, or fewer where the head size would be below 32.
    """
    return {"dim": 64 * depth, "n_layers": depth, "n_heads": min(8, 2 * depth)}


# By name, which is the number of parameters with the vocabulary of 6,400; moe: 145 M. The last
# three are those of MiniMind2's public weights.
SIZES: dict[str, dict[str, Any]] = {
    "2m": shape_of_depth(3),
    "5m": shape_of_depth(4),
    "26m": shape_of_depth(8),
    "104m": {"dim": 768, "n_layers": 16},
    "moe": {"dim": 640, "n_layers": 8, "use_moe": True},
}
