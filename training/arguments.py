"""Command-line flags that mean the same in every stage."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import (
    TOKENIZER,
    BooleanFlag,
    StageParser,
    UserError,
    add_empty_think_ratio,
    add_parse_think,
    add_skip_bad_lines,
    add_tokenizer_path,
    half_open_unit_interval,
    make_parser,
    name_or_path,
    named_path,
    non_negative_float,
    non_negative_int,
    number,
    open_unit_interval,
    positive_float,
    positive_int,
    prompts,
    run_name,
    seed,
    user_path,
    weighted_path,
)
from model import (
    SIZES,
    first_weights,
    read_about,
    shape_of_depth,
    tokenizer_folder,
)

from .schedule import DECAYS

# What shapes a mixture of experts, and the weight of its auxiliary loss: LMConfig's names.
MOE_DEFAULTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "aux_loss_alpha": 0.1,
}
EXPERTS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe")  # what --size and --depth set
BUDGETS = ("max_steps", "max_tokens", "max_minutes", "tokens_per_parameter")


def pattern_and_number(text: str) -> tuple[str, float]:
    """An argparse type: `pattern=number`, a regular expression and a number of at least 0."""
    pattern, _, number_text = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{pattern!r}: {error}") from None
    if not pattern:
        raise argparse.ArgumentTypeError(f"{text!r}: PATTERN=NUMBER")
    return pattern, non_negative_float(number_text)


def make_stage_parser(description: str, *, packing: bool = True, **defaults: Any) -> StageParser:
    """A parser with the flags that every training stage has, and its own defaults, by flag name.

    At least data_path, from_weight, optimizer, weight_decay, grad_clip and max_seq_len need one.
    Without one, learning_rate, epochs and batch_size are left to `choose_settings`. `packing` is
    False where rows cannot hold several documents.
    """
    parser = make_parser(description)
    switch: dict[str, Any] = {"action": BooleanFlag, "default": False}
    model = parser.add_argument_group("model")
    add = model.add_argument
    named = "a shape by its number of parameters; a flag below that is given beside it counts"
    add("--size", choices=SIZES, help=named)
    add("--depth", type=positive_int, help="a dense shape by its layers: width 64 × depth")
    add("--dim", type=positive_int, default=512, help="width")
    add("--n_layers", type=positive_int, default=8, help="blocks")
    add("--n_heads", type=positive_int, default=8, help="query heads")
    add("--n_kv_heads", type=positive_int, default=2, help="key and value heads")
    add("--use_moe", **switch, help="mixture of experts")
    for name, kind, meaning in (
        ("n_routed_experts", positive_int, "routed experts per layer"),
        ("n_shared_experts", non_negative_int, "experts applied to every token"),
        ("num_experts_per_tok", positive_int, "routed experts per token (top-k)"),
        ("aux_loss_alpha", non_negative_float, "weight of the load-balancing loss"),
    ):
        default = f"with --use_moe; default: {MOE_DEFAULTS[name]}"
        add(f"--{name}", type=kind, help=f"{meaning}, {default}")
    add("--dropout", type=half_open_unit_interval, default=0.0)
    add("--flash_attn", action=BooleanFlag, default=True, help="PyTorch's fused attention kernels")
    weights = "weights to start from: a .pth file, a stage's or a run's name, or none"
    add("--from_weight", type=name_or_path, help=weights)
    add_tokenizer_path(model, default=None)

    data = parser.add_argument_group("data")
    add = data.add_argument
    sources: dict[str, Any] = {"type": weighted_path, "nargs": "+", "metavar": "PATH[=WEIGHT]"}
    shares = "files, folders or hf://NAME; of several, with each one's share of the tokens"
    add("--data_path", **sources, help=shares)
    final = "shares at the end of the run, approached linearly; sources not named keep theirs"
    add("--mix_schedule", **sources, default=[], help=final)
    ends = "begin a source that runs out anew, or go on with the others until the epoch ends"
    add("--source_end", choices=("repeat", "stop"), default="repeat", help=ends)
    files = {"nargs": "+", "action": "extend", "default": [], "metavar": "[NAME=]PATH"}
    add("--val_data_path", type=named_path, **files, help="data to evaluate on")
    held_out = "share of the documents that is held out for evaluation"
    add("--val_ratio", type=open_unit_interval, help=held_out)
    scored = "data to score the best weights on at the end"
    add("--test_data_path", type=user_path, help=scored)
    add("--max_seq_len", type=number(int, 2), help="positions of a row")
    if packing:
        filled = "fill each row from several documents"
        add("--packing", action=BooleanFlag, default=True, help=filled)
    add("--cache_dir", type=user_path, help="where token stores go; default: by the data")
    add_skip_bad_lines(data)
    loaders = "loader processes; default: 2 on cuda, else 0"
    add("--num_workers", type=non_negative_int, help=loaders)

    add = parser.add_argument_group("optimisation").add_argument
    passes = (
        "passes over the data, fractions too; without a number of its own, a budget replaces it"
    )
    by_data = "default: by the size of the data"
    if "epochs" not in defaults:
        passes += f"; {by_data}"
    add("--epochs", type=positive_float, help=passes)
    add("--max_steps", type=positive_int, help="budget: optimizer steps")
    add("--max_tokens", type=positive_float, help="budget: target tokens, such as 2e7")
    minutes = "budget: wall-clock time from reading the data on, what ends the run included"
    add("--max_minutes", type=positive_float, help=minutes)
    chinchilla = "budget: target tokens for each (active) parameter; compute-optimal is about 20"
    add("--tokens_per_parameter", type=positive_float, help=chinchilla)
    of_process = "rows per process"
    if "batch_size" not in defaults:
        of_process += f"; {by_data}"
    add("--batch_size", type=positive_int, help=of_process)
    add("--accumulation_steps", type=positive_int, default=1, help="batches per optimizer step")
    chosen = "muon: Muon for the blocks' matrices, AdamW for the rest"
    add("--optimizer", choices=("adamw", "muon"), help=chosen)
    add("--learning_rate", type=positive_float, help="default: by optimizer and size of the model")
    add("--min_lr", type=non_negative_float, help="default: learning_rate / 10")
    warmup = "optimizer steps; default: 3 %% of the run"
    add("--warmup_iters", type=non_negative_int, help=warmup)
    add("--warmup_ratio", type=half_open_unit_interval, help="warm-up as a share of the run")
    add("--lr_decay", choices=DECAYS, default="cosine", help="after the warm-up")
    add("--weight_decay", type=non_negative_float)
    patterns: dict[str, Any] = {"type": pattern_and_number, "nargs": "+", "default": []}
    scaled = "multiply the learning rate of parameters whose name the pattern matches"
    add("--lr_scale", **patterns, metavar="PATTERN=FACTOR", help=scaled)
    decayed = "weight decay of parameters whose name the pattern matches"
    add("--weight_decay_for", **patterns, metavar="PATTERN=DECAY", help=decayed)
    add("--beta1", type=half_open_unit_interval, default=0.9)
    add("--beta2", type=half_open_unit_interval, default=0.95)
    add("--grad_clip", type=positive_float, help="largest gradient norm")
    bad = "stop after this many steps in a row with a non-finite loss or gradient"
    add("--max_bad_steps", type=positive_int, default=10, help=bad)
    add("--seed", type=seed, default=42)

    add = parser.add_argument_group("validation").add_argument
    add("--eval_interval", type=positive_int, help="optimizer steps; default: save_interval")
    add("--save_best", **switch, help="keep the best weights as …_best.pth")
    patience = "stop after this many evaluations without progress; 3 if no number is given"
    add("--early_stopping_patience", type=positive_int, nargs="?", const=3, help=patience)
    sampled = "texts, or files with one on each line, to continue or answer at each validation"
    texts: dict[str, Any] = {"type": prompts, "nargs": "+", "action": "extend", "default": []}
    add("--sample_prompts", **texts, metavar="TEXT|FILE", help=sampled)
    progress = "a lower validation loss is progress if it is lower by more than this"
    add("--early_stopping_min_delta", type=non_negative_float, default=1e-4, help=progress)

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--compile", **switch, help="torch.compile the model")
    add("--gradient_checkpointing", **switch, help="less memory, more time")
    add("--ddp", **switch, help="require torchrun")
    add("--local_rank", "--local-rank", type=int, help="accepted from launchers; not used")

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", type=user_path, default=Path("out"))
    suffix = "suffix of the names of weights and logs, so that runs can share an --out_dir"
    add("--run_name", type=run_name, help=suffix)
    add("--resume", **switch, help="continue the run that --out_dir holds")
    deleted = "delete an earlier run of this name, instead of moving it to replaced/ in --out_dir"
    add("--overwrite", **switch, help=deleted)
    add("--dry_run", **switch, help="print the plan and stop before training")
    price = "price of a GPU-hour, for an estimate of the cost"
    add("--gpu_price", type=positive_float, help=price)
    add("--log_interval", type=positive_int, default=10, help="optimizer steps")
    add("--save_interval", type=positive_int, default=100, help="optimizer steps")
    add("--save_dtype", choices=("float32", "float16"), default="float32")
    last = "also keep the weights of this many last saves as …_step{N}.pth; 3 if no number"
    add("--save_total_limit", type=positive_int, nargs="?", const=3, help=last)
    every = "keep …_step{N}.pth for good every this many steps"
    add("--keep_every", type=positive_int, help=every)
    shown = "also send the figures there; its package must be installed"
    add("--tracker", choices=("wandb", "swanlab", "tensorboard"), help=shown)
    add("--use_wandb", **switch, help="the same as --tracker wandb")
    add("--wandb_project", default="MiniMind", help="project in wandb or SwanLab")
    parser.set_defaults(**defaults)
    return parser


CHAT_IDENTITY = ("max_turns", "loss_weighting")  # flags below that a resumed run keeps


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that stages which learn from conversations share besides."""
    group = parser.add_argument_group("conversations")
    add = group.add_argument
    add("--max_turns", type=positive_int, help="use only this many last turns of each")
    means = "token: mean over the tokens of all answers; sample: each answer counts the same"
    add("--loss_weighting", choices=("token", "sample"), default="token", help=means)
    add_parse_think(group)
    add_empty_think_ratio(group)


def set_sources(args: argparse.Namespace) -> None:
    """Make `data_path` a path, or of several sources (path, weight); or UserError."""
    if isinstance(args.data_path, Path):  # the default
        args.data_path = [(args.data_path, None)]
    paths, weights = zip(*args.data_path, strict=True)
    given = [weight for weight in weights if weight is not None]
    if len(paths) > 1 and given and (len(given) < len(paths) or not all(given)):
        raise UserError("--data_path: each source needs a weight above 0, or none has one")
    if len(set(paths)) < len(paths):
        raise UserError("--data_path: a source is named twice")
    final = dict(args.mix_schedule)
    has_all = len(given) == len(paths) and None not in final.values()
    if final and not (has_all and final.keys() <= {*paths}):
        raise UserError("--mix_schedule: PATH=WEIGHT of sources that --data_path gives a weight")
    if final and len(paths) < 2:
        raise UserError("--mix_schedule needs several sources in --data_path")
    if final and args.source_end == "stop":
        raise UserError("--mix_schedule needs --source_end repeat")
    if final and not any(final.get(path, weight) for path, weight in args.data_path):
        raise UserError("--mix_schedule: all weights are 0")
    if len(paths) == 1:
        args.data_path = paths[0]


def parse_stage_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and fill in defaults that depend on other flags; UserError for a contradiction."""
    # Flags that are not given are None, whatever their defaults.
    args = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys((*SHAPE, "epochs"))))
    args.sample_prompts = [prompt for some in args.sample_prompts for prompt in some]
    if args.use_wandb:
        if args.tracker not in (None, "wandb"):
            raise UserError("--use_wandb and --tracker: give one of them")
        args.tracker = "wandb"
    if args.size and args.depth:
        raise UserError("--size and --depth: give one of them")
    shape = SIZES[args.size] if args.size else shape_of_depth(args.depth) if args.depth else {}
    _fill(args, shape)
    _follow_weights(args)
    _fill(args, {name: parser.get_default(name) for name in SHAPE})
    if args.epochs is None and not any(getattr(args, name) for name in BUDGETS):
        args.epochs = parser.get_default("epochs")
    for name in MOE_DEFAULTS:
        if not args.use_moe and getattr(args, name) is not None:
            raise UserError(f"--{name} needs --use_moe")
    if args.use_moe:
        _fill(args, MOE_DEFAULTS)
    if args.learning_rate is not None:
        set_min_lr(args)
    if args.warmup_iters is not None and args.warmup_ratio is not None:
        raise UserError("--warmup_ratio and --warmup_iters: give one of them")
    set_sources(args)
    if args.val_ratio is not None and args.val_data_path:
        raise UserError("--val_ratio and --val_data_path: give one of them")
    names = [name for name, _ in args.val_data_path]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--val_data_path: two files are named {name}; name them: name=path")
    if args.val_ratio is None and not args.val_data_path:
        for needing in ("save_best", "early_stopping_patience", "eval_interval", "sample_prompts"):
            if getattr(args, needing):
                raise UserError(f"--{needing} needs --val_data_path or --val_ratio")
    if args.eval_interval is None:
        args.eval_interval = args.save_interval
    return args


def _fill(args: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Set the flags that were not given."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _follow_weights(args: argparse.Namespace) -> None:
    """Take shape and tokenizer from the weights of --from_weight, where no flag gives them.

    Weights that are missing, or have no .json file, give nothing. UserError for a flag that
    contradicts them.
    """
    given = {n: getattr(args, n) for n in SHAPE + EXPERTS if getattr(args, n) is not None}
    path = None
    if args.from_weight != "none":
        path = first_weights("--from_weight", args.from_weight, args.out_dir, given)
    about = path and read_about(path)
    if not about:
        args.tokenizer_path = args.tokenizer_path or TOKENIZER
        return
    there = about["config"].shape
    for name, value in given.items():
        if there.get(name, value) != value:
            raise UserError(
                f"--{name} {value}: {path} has {there[name]}; without the flag it gives the shape"
            )
    _fill(args, there)
    args.tokenizer_path = tokenizer_folder(args.tokenizer_path, path)


def set_min_lr(args: argparse.Namespace) -> None:
    """Set --min_lr, if it was not given, to a tenth of --learning_rate; UserError if above it."""
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.min_lr > args.learning_rate:
        raise UserError(f"--min_lr {args.min_lr:g} is above --learning_rate {args.learning_rate:g}")
