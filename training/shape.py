"""The shape of a run's model: by flags, the run that is resumed, or the weights to start from."""

import argparse
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import TOKENIZER, UserError
from model import LMConfig, find_weights, list_weights, read_about, tokenizer_folder
from model.tokenizer import text_has_hash

from .arguments import EXPERTS, MOE_DEFAULTS, SHAPE, fill
from .distributed import Distributed
from .run_files import beside

RUN_SHAPE = ("dim", "use_moe")  # what tells the runs of a stage apart by their names


class Origin(NamedTuple):
    """What gives a run's model its shape, beside flags."""

    first_weights: Path | None  # file of --from_weight, if it was looked for and is there
    config: LMConfig | None  # of the run to resume, else of `first_weights`, if a .json tells it
    tokenizer_path: Path | None  # None: the shipped one


def settle_shape(args: argparse.Namespace, stage: str, world: Distributed) -> Origin:
    """Set the flags of shape and tokenizer that were not given: as the weights have them.

    The main process alone looks for weights. UserError for a flag that contradicts them.
    """
    origin = world.share_early(partial(_find_origin, args, stage))
    if origin.config is not None:
        fill(args, origin.config.shape)
    fill(args, {name: getattr(LMConfig, name) for name in SHAPE})
    for name in MOE_DEFAULTS:
        if not args.use_moe and getattr(args, name) is not None:
            raise UserError(f"--{name} needs --use_moe")
    if args.use_moe:
        fill(args, MOE_DEFAULTS)
    args.tokenizer_path = origin.tokenizer_path or TOKENIZER
    return origin


def _find_origin(args: argparse.Namespace, stage: str) -> Origin:
    """Weights without a .json file give nothing.

    A run to resume gives the shape itself. Of several whose shape the flags leave open, it is the
    one that the weights of --from_weight, or the defaults, would give.
    """
    given = {n: getattr(args, n) for n in SHAPE + EXPERTS if getattr(args, n) is not None}
    runs = _runs_to_resume(args, stage, given) if args.resume else {}
    first = None
    if len(runs) != 1 and args.from_weight != "none":
        first = find_weights("--from_weight", args.from_weight, args.out_dir, given)
    about = first and read_about(first)
    there = about["config"].shape if about else {}
    for name, value in given.items():
        if there.get(name, value) != value:
            raise UserError(
                f"--{name} {value}: {first} has {there[name]}; without the flag it gives the shape"
            )
    dim, use_moe = ({**there, **given}.get(name, getattr(LMConfig, name)) for name in RUN_SHAPE)
    own = next(iter(runs.values())) if len(runs) == 1 else runs.get((dim, use_moe))
    weights = own or first
    about = weights and read_about(weights)
    if not about:
        return Origin(first, None, args.tokenizer_path)
    tokenizer_path = args.tokenizer_path
    # A run keeps a copy of its tokenizer, also of the shipped one, which it goes on with.
    if tokenizer_path is None and not (own and text_has_hash(TOKENIZER, about["tokenizer"])):
        tokenizer_path = tokenizer_folder(None, weights)
    shipped = tokenizer_path == TOKENIZER  # which may be elsewhere on other hosts
    return Origin(first, about["config"], None if shipped else tokenizer_path)


def _runs_to_resume(
    args: argparse.Namespace, stage: str, given: Mapping[str, Any]
) -> dict[tuple[int, bool], Path]:
    """By RUN_SHAPE, the weights of the stage's runs that have a resume file and what is `given`."""
    run = f"_{args.run_name}" if args.run_name else ""
    pattern = re.compile(rf"{re.escape(stage)}_\d+(_moe)?{run}")
    return {
        (about["config"].dim, about["config"].use_moe): path
        for path, about in list_weights(args.out_dir)
        if pattern.fullmatch(path.stem)
        and given.items() <= vars(about["config"]).items()
        and any(beside(path, end).is_file() for end in ("resume", "resume.prev"))
    }
