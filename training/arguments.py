"""Command-line flags that mean the same in every stage."""

import argparse
import re
from pathlib import Path
from typing import Any

from common import (
    BooleanFlag,
    UserError,
    add_skip_bad_lines,
    add_tokenizer_path,
    half_open_unit_interval,
    name_or_path,
    named_path,
    non_negative_float,
    non_negative_int,
    number,
    open_unit_interval,
    positive_float,
    positive_int,
    run_name,
    seed,
    user_path,
)

from .schedule import DECAYS

# What shapes a mixture of experts, and the weight of its auxiliary loss: LMConfig's names.
MOE_DEFAULTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "aux_loss_alpha": 0.1,
}


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


def add_stage_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags that every training stage has.

    Args:
        parser: where to add them.
        defaults: the stage's own defaults, by flag name: data_path, from_weight, learning_rate,
            weight_decay, epochs, grad_clip, max_seq_len, batch_size; packing, False where rows
            cannot hold several documents; log_interval, if it is not 10.
    """
    model = parser.add_argument_group("model")
    model.add_argument("--dim", type=positive_int, default=512, help="width")
    model.add_argument("--n_layers", type=positive_int, default=8, help="blocks")
    model.add_argument("--n_heads", type=positive_int, default=8, help="query heads")
    model.add_argument("--n_kv_heads", type=positive_int, default=2, help="key and value heads")
    model.add_argument("--use_moe", action=BooleanFlag, default=False, help="mixture of experts")
    experts: dict[str, tuple[Any, str]] = {
        "n_routed_experts": (positive_int, "routed experts per layer"),
        "n_shared_experts": (non_negative_int, "experts applied to every token"),
        "num_experts_per_tok": (positive_int, "routed experts per token (top-k)"),
        "aux_loss_alpha": (non_negative_float, "weight of the load-balancing loss"),
    }
    for name, (kind, meaning) in experts.items():
        default = f"with --use_moe; default: {MOE_DEFAULTS[name]}"
        model.add_argument(f"--{name}", type=kind, help=f"{meaning}, {default}")
    model.add_argument("--dropout", type=half_open_unit_interval, default=0.0)
    model.add_argument(
        "--flash_attn", action=BooleanFlag, default=True, help="PyTorch's fused attention kernels"
    )
    model.add_argument(
        "--from_weight",
        type=name_or_path,
        default=defaults["from_weight"],
        help="weights to start from: a .pth file, a stage's or a run's name, or none",
    )
    add_tokenizer_path(model)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path", type=user_path, default=defaults["data_path"], help="JSONL file"
    )
    data.add_argument(
        "--val_data_path",
        type=named_path,
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]PATH",
        help="JSONL files to evaluate on",
    )
    data.add_argument(
        "--val_ratio",
        type=open_unit_interval,
        help="share of the documents that is held out for evaluation",
    )
    data.add_argument(
        "--test_data_path",
        type=user_path,
        help="JSONL file to score the best weights on at the end",
    )
    data.add_argument(
        "--max_seq_len",
        type=number(int, 2),
        default=defaults["max_seq_len"],
        help="positions of a row",
    )
    if defaults.get("packing", True):
        data.add_argument(
            "--packing",
            action=BooleanFlag,
            default=True,
            help="fill each row from several documents",
        )
    data.add_argument(
        "--cache_dir", type=user_path, help="where token stores go; default: by the data"
    )
    add_skip_bad_lines(data)
    data.add_argument(
        "--num_workers", type=non_negative_int, help="loader processes; default: 2 on cuda, else 0"
    )

    loop = parser.add_argument_group("optimisation")
    loop.add_argument("--epochs", type=positive_int, default=defaults["epochs"])
    loop.add_argument(
        "--batch_size", type=positive_int, default=defaults["batch_size"], help="rows per process"
    )
    loop.add_argument(
        "--accumulation_steps", type=positive_int, default=1, help="batches per optimizer step"
    )
    loop.add_argument("--learning_rate", type=positive_float, default=defaults["learning_rate"])
    loop.add_argument("--min_lr", type=non_negative_float, help="default: learning_rate / 10")
    loop.add_argument(
        "--warmup_iters", type=non_negative_int, help="optimizer steps; default: 3 %% of the run"
    )
    loop.add_argument(
        "--warmup_ratio", type=half_open_unit_interval, help="warm-up as a share of the run"
    )
    loop.add_argument("--lr_decay", choices=DECAYS, default="cosine", help="after the warm-up")
    loop.add_argument("--weight_decay", type=non_negative_float, default=defaults["weight_decay"])
    loop.add_argument(
        "--lr_scale",
        type=pattern_and_number,
        nargs="+",
        default=[],
        metavar="PATTERN=FACTOR",
        help="multiply the learning rate of parameters whose name the pattern matches",
    )
    loop.add_argument(
        "--weight_decay_for",
        type=pattern_and_number,
        nargs="+",
        default=[],
        metavar="PATTERN=DECAY",
        help="weight decay of parameters whose name the pattern matches",
    )
    loop.add_argument("--beta1", type=half_open_unit_interval, default=0.9)
    loop.add_argument("--beta2", type=half_open_unit_interval, default=0.95)
    loop.add_argument(
        "--grad_clip",
        type=positive_float,
        default=defaults["grad_clip"],
        help="largest gradient norm",
    )
    loop.add_argument(
        "--max_bad_steps",
        type=positive_int,
        default=10,
        help="stop after this many steps in a row with a non-finite loss or gradient",
    )
    loop.add_argument("--seed", type=seed, default=42)

    stopping = parser.add_argument_group("validation")
    stopping.add_argument(
        "--eval_interval", type=positive_int, help="optimizer steps; default: save_interval"
    )
    stopping.add_argument(
        "--save_best", action=BooleanFlag, default=False, help="keep the best weights as …_best.pth"
    )
    stopping.add_argument(
        "--early_stopping_patience",
        type=positive_int,
        nargs="?",
        const=3,
        help="stop after this many evaluations without progress; 3 if no number is given",
    )
    stopping.add_argument(
        "--early_stopping_min_delta",
        type=non_negative_float,
        default=1e-4,
        help="a lower validation loss is progress if it is lower by more than this",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    machine.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    machine.add_argument(
        "--compile", action=BooleanFlag, default=False, help="torch.compile the model"
    )
    machine.add_argument(
        "--gradient_checkpointing", action=BooleanFlag, default=False, help="less memory, more time"
    )
    machine.add_argument("--ddp", action=BooleanFlag, default=False, help="require torchrun")
    machine.add_argument(
        "--local_rank", "--local-rank", type=int, help="accepted from launchers; not used"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--out_dir", type=user_path, default=Path("out"))
    output.add_argument(
        "--run_name",
        type=run_name,
        help="suffix of the names of weights and logs, so that runs can share an --out_dir",
    )
    output.add_argument(
        "--resume",
        action=BooleanFlag,
        default=False,
        help="continue the run that --out_dir holds",
    )
    output.add_argument(
        "--overwrite",
        action=BooleanFlag,
        default=False,
        help="delete an earlier run of this name, instead of moving it to replaced/ in --out_dir",
    )
    output.add_argument(
        "--dry_run",
        action=BooleanFlag,
        default=False,
        help="print the plan and stop before training",
    )
    output.add_argument(
        "--gpu_price", type=positive_float, help="price of a GPU-hour, for an estimate of the cost"
    )
    output.add_argument(
        "--log_interval",
        type=positive_int,
        default=defaults.get("log_interval", 10),
        help="optimizer steps",
    )
    output.add_argument("--save_interval", type=positive_int, default=100, help="optimizer steps")
    output.add_argument("--save_dtype", choices=("float32", "float16"), default="float32")
    output.add_argument(
        "--save_total_limit",
        type=positive_int,
        nargs="?",
        const=3,
        help="also keep the weights of this many last saves as …_step{N}.pth; 3 if no number",
    )
    output.add_argument(
        "--keep_every", type=positive_int, help="keep …_step{N}.pth for good every this many steps"
    )
    output.add_argument("--use_wandb", action=BooleanFlag, default=False)
    output.add_argument("--wandb_project", default="MiniMind")


CHAT_IDENTITY = ("max_turns", "loss_weighting")  # flags below that a resumed run keeps


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that stages which learn from conversations share besides."""
    chat = parser.add_argument_group("conversations")
    chat.add_argument(
        "--max_turns", type=positive_int, help="use only this many last turns of each"
    )
    chat.add_argument(
        "--loss_weighting",
        choices=("token", "sample"),
        default="token",
        help="token: mean over the tokens of all answers; sample: each answer counts the same",
    )


def check_stage_arguments(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags; refuse flags that contradict each other.

    Raises:
        UserError: for those.
    """
    for name, default in MOE_DEFAULTS.items():
        if not args.use_moe and getattr(args, name) is not None:
            raise UserError(f"--{name} needs --use_moe")
        if args.use_moe and getattr(args, name) is None:
            setattr(args, name, default)
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.min_lr > args.learning_rate:
        raise UserError(f"--min_lr {args.min_lr:g} is above --learning_rate {args.learning_rate:g}")
    if args.warmup_iters is not None and args.warmup_ratio is not None:
        raise UserError("--warmup_ratio and --warmup_iters: give one of them")
    if args.val_ratio is not None and args.val_data_path:
        raise UserError("--val_ratio and --val_data_path: give one of them")
    names = [name for name, _ in args.val_data_path]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--val_data_path: two files are named {name}; name them: name=path")
    if args.val_ratio is None and not args.val_data_path:
        for needing in ("save_best", "early_stopping_patience", "eval_interval"):
            if getattr(args, needing):
                raise UserError(f"--{needing} needs --val_data_path or --val_ratio")
    if args.eval_interval is None:
        args.eval_interval = args.save_interval
