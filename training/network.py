"""The model that a stage begins with."""

import argparse
from typing import TYPE_CHECKING

from common import UserError
from model import LMConfig, MiniMindLM

from .arguments import MOE_DEFAULTS
from .resume import seed_everything

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_context(max_seq_len: int, config: LMConfig) -> None:
    """Raise UserError if rows of `max_seq_len` positions do not fit into the model's context."""
    if max_seq_len > config.max_seq_len:
        raise UserError(
            f"--max_seq_len {max_seq_len} is above the model's context of {config.max_seq_len}"
        )


def init_model(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> MiniMindLM:
    """Build the network, the same on every process.

    Raises:
        UserError: for an impossible shape.
    """
    seed_everything(args.seed)
    experts = {name: getattr(args, name) for name in MOE_DEFAULTS} if args.use_moe else {}
    try:
        config = LMConfig(
            dim=args.dim,
            n_layers=args.n_layers,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads,
            vocab_size=len(tokenizer),
            dropout=args.dropout,
            flash_attn=args.flash_attn,
            use_moe=args.use_moe,
            **experts,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except ValueError as error:
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", *experts)
        flags = " ".join(f"--{name} {getattr(args, name)}" for name in names)
        raise UserError(f"{flags}: {error}") from None
    check_context(args.max_seq_len, config)
    model = MiniMindLM(config)
    model.gradient_checkpointing = args.gradient_checkpointing
    return model
