"""Command-line flags that mean the same thing in every stage, and errors that users can mend."""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from .schedule import DECAYS

ROOT = Path(__file__).resolve().parent.parent
FEW_BAD_LINES = 0.1  # the share that --skip_bad_lines allows without a number

# What shapes a mixture of experts, and the weight of its auxiliary loss: LMConfig's names.
MOE_DEFAULTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "aux_loss_alpha": 0.1,
}


class UserError(Exception):
    """Something that the user can mend; its text names the flag or the file, a line for each.

    Under torchrun rank 0 prints it, `every_rank` what may happen on one process only.
    """

    def __init__(self, text: str, *, every_rank: bool = False):
        super().__init__(text)
        self.every_rank = every_rank


@contextmanager
def report_user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End with exit status 2 and the error's text, no traceback, on UserError and `kinds`.

    Ctrl-C ends with 130. What is printed inside may be any text.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see interrupt.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles may differ
    try:
        yield
    except (UserError, *kinds) as error:
        exit_with(str(error), every_rank=getattr(error, "every_rank", False))
    except KeyboardInterrupt:
        sys.exit(130)


def exit_with(message: str, *, every_rank: bool = False) -> NoReturn:
    """Print the message on stderr (rank 0 only, or every rank) and leave with exit status 2."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


class flag(argparse.Action):
    """A switch in every form users write: `--x`, `--no-x`, `--x True`, `--x false`."""

    WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        negations = [f"--no-{name.removeprefix('--')}" for name in option_strings]
        super().__init__([*option_strings, *negations], dest, nargs="?", **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | None,
        option_string: str | None = None,
    ) -> None:
        """Set the switch."""
        negated = option_string is not None and option_string.startswith("--no-")
        if values is None:
            value = True
        elif not negated and values.lower() in self.WORDS:
            value = self.WORDS[values.lower()]
        else:
            takes = "no value" if negated else "true or false"
            parser.error(f"argument {option_string}: takes {takes}, not {values!r}")
        setattr(namespace, self.dest, value != negated)

    def format_usage(self) -> str:
        """The spelling shown in the help text."""
        return " | ".join(self.option_strings)


class StageParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and which suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        """Report the message, without the usage text, and leave with exit status 2."""
        exit_with(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse; an unknown flag is an error that names the nearest known one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; {near[0]}?" if near else ""))
        return parsed


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str) -> StageParser:
    """A parser that shows defaults and takes flags by their whole names only."""
    return StageParser(
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def _number(kind: type, low: float, high: float = float("inf"), open_low: bool = False):
    """An argparse type for numbers within bounds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not low <= value <= high or value == float("inf") or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            bounds += "" if high == float("inf") else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    return parse


seed = _number(int, 0, 2**63 - 1)
count = _number(int, 1)
count_or_zero = _number(int, 0)
positive = _number(float, 0, open_low=True)
positive_or_zero = _number(float, 0)
fraction = _number(float, 0, 0.999999)
fraction_or_one = _number(float, 0, 1, open_low=True)
share = _number(float, 0, 1)
ratio = _number(float, 0, 0.999999, open_low=True)


def user_path(text: str) -> Path:
    """An argparse type: a path, its `~` expanded, which shells leave as it is in `--flag=~/x`."""
    with suppress(RuntimeError):  # ~NAME of no user is a file's name, as in a shell
        return Path(text).expanduser()
    return Path(text)


def name_or_path(text: str) -> str:
    """An argparse type: a name, or a path as for `user_path`; text either way."""
    return str(user_path(text)) if text.startswith("~") else text


def share_of_bad_lines(text: str) -> float:
    """An argparse type: a share, or true and false as a `flag` takes them."""
    if text not in ("0", "1") and text.lower() in flag.WORDS:
        return FEW_BAD_LINES if flag.WORDS[text.lower()] else 0.0
    return share(text)


def add_skip_bad_lines(parser: argparse._ActionsContainer) -> None:
    """Add `--skip_bad_lines [SHARE]`: the share of bad lines of a file that may be left out."""
    parser.add_argument(
        "--skip_bad_lines",
        type=share_of_bad_lines,
        nargs="?",
        const=FEW_BAD_LINES,
        default=0.0,
        metavar="SHARE",
        help="go on without lines that have errors, if at most this share has; "
        f"{FEW_BAD_LINES} if no number",
    )
    parser.add_argument(
        "--no-skip_bad_lines",
        dest="skip_bad_lines",
        action="store_const",
        const=0.0,
        help=argparse.SUPPRESS,
    )


def named_path(text: str) -> tuple[str, Path]:
    """An argparse type: `name=path`, or a path alone, whose name is that of its file."""
    name, equals, path = text.partition("=")
    whole = user_path(text)
    if equals and name and path and not {"/", "\\"} & set(name) and not whole.exists():
        return name, user_path(path)
    return whole.stem, whole


def is_run_name(text: str) -> bool:
    """Whether `text` can end the names of a run's files and be told from all other such ends."""
    other = r"\d+|moe|best|resume|step\d+"  # as in full_sft_512_moe_best.pth
    return bool(re.fullmatch(r"[^\W_]([^\W_]|-)*", text) and not re.fullmatch(other, text.lower()))


def run_name(text: str) -> str:
    """An argparse type: a name for a run, as for `is_run_name`."""
    if not is_run_name(text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: letters, digits and - only, not just digits, and none of moe, best, "
            "resume, stepN, which names of files end in for other reasons"
        )
    return text


def add_stage_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags that every training stage has.

    Args:
        parser: where to add them.
        defaults: the stage's own defaults, by flag name: data_path, from_weight, learning_rate,
            weight_decay, epochs, grad_clip, max_seq_len, batch_size; packing, False where rows
            cannot hold several documents; log_interval, if it is not 10.
    """
    model = parser.add_argument_group("model")
    model.add_argument("--dim", type=count, default=512, help="width")
    model.add_argument("--n_layers", type=count, default=8, help="blocks")
    model.add_argument("--n_heads", type=count, default=8, help="query heads")
    model.add_argument("--n_kv_heads", type=count, default=2, help="key and value heads")
    model.add_argument("--use_moe", action=flag, default=False, help="mixture of experts")
    experts: dict[str, tuple[Any, str]] = {
        "n_routed_experts": (count, "experts that each token chooses from"),
        "n_shared_experts": (count_or_zero, "experts that every token visits"),
        "num_experts_per_tok": (count, "routed experts that a token visits (top-k)"),
        "aux_loss_alpha": (positive_or_zero, "weight of the load-balancing loss"),
    }
    for name, (kind, meaning) in experts.items():
        default = f"with --use_moe; default: {MOE_DEFAULTS[name]}"
        model.add_argument(f"--{name}", type=kind, help=f"{meaning}, {default}")
    model.add_argument("--dropout", type=fraction, default=0.0)
    model.add_argument(
        "--flash_attn", action=flag, default=True, help="PyTorch's fused attention kernels"
    )
    model.add_argument(
        "--from_weight",
        type=name_or_path,
        default=defaults["from_weight"],
        help="weights to start from: a .pth file, a stage's or a run's name, or none",
    )
    model.add_argument(
        "--tokenizer_path",
        type=user_path,
        default=ROOT / "model" / "minimind_tokenizer",
        help="folder",
    )

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
        "--val_ratio", type=ratio, help="hold this share of the documents out to evaluate on"
    )
    data.add_argument(
        "--test_data_path",
        type=user_path,
        help="JSONL file to score the best weights on at the end",
    )
    data.add_argument(
        "--max_seq_len",
        type=_number(int, 2),
        default=defaults["max_seq_len"],
        help="positions of a row",
    )
    if defaults.get("packing", True):
        data.add_argument(
            "--packing", action=flag, default=True, help="fill each row from several documents"
        )
    data.add_argument(
        "--cache_dir", type=user_path, help="where token stores go; default: by the data"
    )
    add_skip_bad_lines(data)
    data.add_argument(
        "--num_workers", type=count_or_zero, help="loader processes; default: 2 on cuda, else 0"
    )

    loop = parser.add_argument_group("optimisation")
    loop.add_argument("--epochs", type=count, default=defaults["epochs"])
    loop.add_argument(
        "--batch_size", type=count, default=defaults["batch_size"], help="rows per process"
    )
    loop.add_argument(
        "--accumulation_steps", type=count, default=1, help="batches per optimizer step"
    )
    loop.add_argument("--learning_rate", type=positive, default=defaults["learning_rate"])
    loop.add_argument("--min_lr", type=positive_or_zero, help="default: learning_rate / 10")
    loop.add_argument(
        "--warmup_iters", type=count_or_zero, help="optimizer steps; default: 3 %% of the run"
    )
    loop.add_argument("--warmup_ratio", type=fraction, help="warm-up as a share of the run")
    loop.add_argument("--lr_decay", choices=DECAYS, default="cosine", help="after the warm-up")
    loop.add_argument("--weight_decay", type=positive_or_zero, default=defaults["weight_decay"])
    loop.add_argument("--beta1", type=fraction, default=0.9)
    loop.add_argument("--beta2", type=fraction, default=0.95)
    loop.add_argument(
        "--grad_clip", type=positive, default=defaults["grad_clip"], help="largest gradient norm"
    )
    loop.add_argument(
        "--max_bad_steps",
        type=count,
        default=10,
        help="stop after so many steps in a row with a non-finite loss or gradient",
    )
    loop.add_argument("--seed", type=seed, default=42)

    stopping = parser.add_argument_group("validation")
    stopping.add_argument(
        "--eval_interval", type=count, help="optimizer steps; default: save_interval"
    )
    stopping.add_argument(
        "--save_best", action=flag, default=False, help="keep the best weights as …_best.pth"
    )
    stopping.add_argument(
        "--early_stopping_patience",
        type=count,
        nargs="?",
        const=3,
        help="stop after so many evaluations without progress; 3 if no number is given",
    )
    stopping.add_argument(
        "--early_stopping_min_delta",
        type=positive_or_zero,
        default=1e-4,
        help="a lower validation loss is progress if it is lower by more than this",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    machine.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    machine.add_argument("--compile", action=flag, default=False, help="torch.compile the model")
    machine.add_argument(
        "--gradient_checkpointing", action=flag, default=False, help="less memory, more time"
    )
    machine.add_argument("--ddp", action=flag, default=False, help="insist on torchrun")
    machine.add_argument(
        "--local_rank", "--local-rank", type=int, help="accepted from launchers; not used"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--out_dir", type=user_path, default=Path("out"))
    output.add_argument(
        "--run_name",
        type=run_name,
        help="ends the names of weights and logs, so that runs lie side by side in --out_dir",
    )
    output.add_argument(
        "--resume", action=flag, default=False, help="go on with the run that --out_dir holds"
    )
    output.add_argument(
        "--overwrite",
        action=flag,
        default=False,
        help="delete an earlier run of this name, instead of moving it to replaced/ in --out_dir",
    )
    output.add_argument(
        "--dry_run", action=flag, default=False, help="print the plan and stop before training"
    )
    output.add_argument("--gpu_price", type=positive, help="of one GPU for an hour; gives the cost")
    output.add_argument(
        "--log_interval",
        type=count,
        default=defaults.get("log_interval", 10),
        help="optimizer steps",
    )
    output.add_argument("--save_interval", type=count, default=100, help="optimizer steps")
    output.add_argument("--save_dtype", choices=("float32", "float16"), default="float32")
    output.add_argument(
        "--save_total_limit",
        type=count,
        nargs="?",
        const=3,
        help="also keep the weights of the last so many saves as …_step{N}.pth; 3 if no number",
    )
    output.add_argument(
        "--keep_every", type=count, help="keep …_step{N}.pth for good every so many steps"
    )
    output.add_argument("--use_wandb", action=flag, default=False)
    output.add_argument("--wandb_project", default="MiniMind")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that stages which learn from conversations share besides."""
    chat = parser.add_argument_group("conversations")
    chat.add_argument("--max_turns", type=count, help="keep the last so many exchanges of each")
    chat.add_argument(
        "--loss_weighting",
        choices=("token", "sample"),
        default="token",
        help="mean over all answers' tokens, or each answer alike, however long",
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
