"""Weights as a run begins and ends with them."""

import argparse
from pathlib import Path

from torch import nn

from common import UserError, write_atomically
from model import MiniMindLM, load_weights, lora_state, resolve_weights
from model.weights import first_difference, read_state


def load_first_weights(args: argparse.Namespace, model: MiniMindLM, tokenizer_hash: str) -> None:
    """Load the weights that --from_weight names, if any.

    Raises:
        UserError: as `resolve_weights` and `load_weights`.
    """
    if args.from_weight != "none":
        path = resolve_weights("--from_weight", args.from_weight, args.out_dir, model.config)
        load_weights(path, model, tokenizer_hash)


def check_output(path: Path, model: nn.Module) -> None:
    """Make sure, before training, that weights and logs can be written.

    Args:
        path: of the weights; the best go beside it, the logs below its folder.
        model: whose weights.

    Raises:
        UserError: if a folder cannot be written, or the weights there are of another shape.
    """
    for probe in (path.with_suffix(".probe"), path.parent / "logs" / path.stem / ".probe"):
        try:
            write_atomically(probe, lambda file: file.write(b"a byte, as a full disk has none"))
            probe.unlink()
        except OSError as error:
            raise UserError(f"--out_dir {probe.parent}: {error.strerror or error}") from None
    for weights in (path, path.with_name(f"{path.stem}_best.pth")):
        difference = weights.is_file() and first_difference(weights, read_state(weights), model)
        if difference:
            other = "--lora_name" if lora_state(model) else "--out_dir"
            raise UserError(
                f"{weights} holds another model ({difference}): move it, or choose another {other} "
                "or --run_name"
            )
