"""Flags and start-up that the terminal, the server and the page share."""

import argparse
import socket
from dataclasses import fields
from pathlib import Path

from common import (
    BooleanFlag,
    UserError,
    add_tokenizer_path,
    name_or_path,
    non_negative_int,
    positive_int,
    report_os_errors,
    user_path,
)
from model import choose_device

from .loading import WeightSpec
from .pool import ModelPool
from .tools import BUILT_IN

THINKING = {"on": True, "off": False, "auto": None}  # `enable_thinking` of prompts


def add_weight_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags that select one model, which `named_weights` reads."""
    add = parser.add_argument
    add("--out_dir", type=user_path, default=Path("out"), help="weight folder")
    add(
        "--weight",
        type=name_or_path,
        help="a stage's or a run's name, a .pth file, or a folder of an old version; default: the "
        "newest chat weights in --out_dir and the folders in it, else the newest pretrained ones",
    )
    add(
        "--lora_name", type=name_or_path, help="an adapter's name, or its .pth file: use it as well"
    )
    add("--dim", type=positive_int, help="width of the weights; 512 for those without a .json")
    add("--n_layers", type=positive_int, help="blocks of the weights; likewise 8")
    add("--use_moe", action=BooleanFlag, help="whether they are a mixture of experts")
    add_tokenizer_path(parser, default=None)


def named_weights(args: argparse.Namespace) -> WeightSpec:
    """The weights that the flags of `add_weight_arguments` name."""
    return WeightSpec(**{field.name: getattr(args, field.name) for field in fields(WeightSpec)})


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags of server and page: which models they offer, and what computes them."""
    add = parser.add_argument
    add("--out_dir", type=user_path, default=Path("out"), help="weight folder")
    add(
        "--weight",
        type=name_or_path,
        help="offer this model alone: a name, a .pth file or a folder",
    )
    add_tokenizer_path(parser, default=None)
    add_compute_arguments(parser)


def add_answer_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags of thoughts and tools: --thinking, --tools and --tool_file."""
    add = parser.add_argument
    thinks = "whether answers begin with a thought; auto: the model decides"
    add("--thinking", choices=THINKING, default="auto", help=thinks)
    offered = "built-in tools that the model may call: calculator, clock"
    add("--tools", nargs="+", choices=BUILT_IN, default=[], metavar="TOOL", help=offered)
    add_tool_file(parser)


def add_tool_file(parser: argparse._ActionsContainer) -> None:
    """Add `--tool_file`: tools of the user's own."""
    own = "a Python file whose functions the model may call, too"
    parser.add_argument("--tool_file", type=user_path, metavar="FILE", help=own)


def add_history_cnt(parser: argparse._ActionsContainer) -> None:
    """Add `--history_cnt`: how much of a conversation a model gets with a question."""
    parser.add_argument(
        "--history_cnt",
        type=non_negative_int,
        help="exchanges before a question that stay in the prompt, as far as they fit; default: "
        "one fewer than the weights' longest training conversation has, where their .json says it, "
        "else all",
    )


def add_compute_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags that select what computes a model."""
    add = parser.add_argument
    add("--quantize", choices=("int8",), help="8-bit weights: faster on a CPU, nearly as good")
    add_engine(parser)
    add("--device", help="cuda, cuda:N, mps or cpu; default: the first there")


def add_engine(parser: argparse._ActionsContainer) -> None:
    """Add `--engine`: what computes the tokens."""
    parser.add_argument(
        "--engine",
        choices=("onnx", "torch"),
        help="what computes the tokens, in fp32 the same ones; default: ONNX Runtime on a CPU "
        "where it is installed, else PyTorch",
    )


def chosen_engine(args: argparse.Namespace) -> str | None:
    """The engine that `--engine` and `--quantize` name, as ChatModel takes it."""
    if args.quantize is not None and args.engine == "torch":
        raise UserError(f"--quantize {args.quantize}: not with --engine torch")
    return args.quantize or args.engine


def open_pool(
    args: argparse.Namespace, rows: int, queue: int, loaded: int, history_cnt: int | None = None
) -> ModelPool:
    """The models that the flags of `add_model_arguments` name; for the others see ModelPool."""
    spec = WeightSpec(args.out_dir, args.tokenizer_path, weight=args.weight)
    device, engine = choose_device(args.device), chosen_engine(args)
    return ModelPool(spec, device, engine, rows, queue, loaded, history_cnt)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens. Raises UserError if the port is taken, or no such host exists."""
    with report_os_errors(f"--host {host} --port {port}"):
        family = socket.getaddrinfo(host, port)[0][0]
        return socket.create_server((host, port), family=family)
