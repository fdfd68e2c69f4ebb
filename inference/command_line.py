"""Flags and start-up that the terminal, the server and the page share."""

import argparse
import socket
from pathlib import Path

from common import UserError, add_tokenizer_path, name_or_path, report_os_errors, user_path
from model import choose_device

from .loading import WeightSpec
from .pool import ModelPool


def add_model_arguments(
    parser: argparse._ActionsContainer,
    weight_help: str = "offer this model alone: a name, a .pth file or a folder",
) -> None:
    """Add the flags that select the models and what computes them."""
    add = parser.add_argument
    add("--out_dir", type=user_path, default=Path("out"), help="weight folder")
    add("--weight", type=name_or_path, help=weight_help)
    add("--quantize", choices=("int8",), help="8-bit weights: faster on a CPU, nearly as good")
    add_engine(parser)
    add("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    add_tokenizer_path(parser)


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


def open_pool(args: argparse.Namespace, rows: int, queue: int, loaded: int) -> ModelPool:
    """The models that the flags of `add_model_arguments` name; for the others see ModelPool."""
    spec = WeightSpec(args.out_dir, args.tokenizer_path, weight=args.weight)
    return ModelPool(spec, choose_device(args.device), chosen_engine(args), rows, queue, loaded)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens. Raises UserError if the port is taken, or no such host exists."""
    with report_os_errors(f"--host {host} --port {port}"):
        family = socket.getaddrinfo(host, port)[0][0]
        return socket.create_server((host, port), family=family)
