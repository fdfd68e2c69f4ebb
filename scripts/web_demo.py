"""Chat with models in a browser.

    python scripts/web_demo.py                                   (the weights in out/ and below)
    python scripts/web_demo.py --endpoint http://127.0.0.1:8000/v1   (any OpenAI server)

The page is for the person at this machine. Its conversations are in out/chats/.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import os
import sys

from common import UserError, make_parser, port, report_user_errors, user_path
from inference import add_model_arguments, add_tool_file, describe_weights, listen, open_pool
from inference.backends import Backend, Endpoint, LocalModels
from inference.tools import BUILT_IN, find_tools


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Chat with MiniMind in a browser.")
    add_model_arguments(parser)
    parser.add_argument("--endpoint", help="a server's address with /v1, instead of weights here")
    parser.add_argument("--api_key", help="key for that server; default: OPENAI_API_KEY")
    add_tool_file(parser)
    parser.add_argument("--chats_dir", type=user_path, help="default: chats in --out_dir")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: also other machines")
    parser.add_argument("--port", type=port, default=8501)
    args = parser.parse_args()
    args.chats_dir = args.chats_dir or args.out_dir / "chats"
    if args.endpoint is not None and not args.endpoint.startswith(("http://", "https://")):
        raise UserError(f"--endpoint {args.endpoint}: an address, as http://127.0.0.1:8000/v1")
    return args


def make_backend(args: argparse.Namespace) -> Backend:
    """The source of answers that the flags name."""
    if args.endpoint is not None:
        return Endpoint(args.endpoint, args.api_key or os.environ.get("OPENAI_API_KEY"))
    return LocalModels(open_pool(args, rows=4, queue=16, loaded=2))


def main() -> None:
    """Check the flags, and start Streamlit on this file."""
    args = parse_args()
    try:
        from streamlit.web.cli import main as streamlit

        make_backend(args)  # what is wrong with the flags shows here
        find_tools(list(BUILT_IN), args.tool_file)
    except ImportError as error:
        raise UserError(f"needs {error.name}: pip install -r scripts/requirements.txt") from None
    if args.weight is None and args.endpoint is None:
        for line in describe_weights(args.out_dir):
            print(line, file=sys.stderr)
    with listen(args.host, args.port) as socket:  # Streamlit opens its own, and says less
        args.port = socket.getsockname()[1]
    options = [f"--server.address={args.host}", f"--server.port={args.port}"]
    options += ["--server.headless=true", "--browser.gatherUsageStats=false"]
    options.append("--client.toolbarMode=minimal")
    # It would warn, with a stack, that the address gives a widget another value than its default.
    options.append("--global.disableWidgetStateDuplicationWarning=true")
    print(f"http://{args.host}:{args.port}", flush=True)
    streamlit(["run", __file__, *options, "--", *sys.argv[1:]])


if __name__ == "__main__":
    # Streamlit runs this file too, in a process that has its runtime, at every click.
    runtime = sys.modules.get("streamlit.runtime")
    if runtime is not None and runtime.exists():
        from web_page import draw

        flags = parse_args()
        tools = find_tools(list(BUILT_IN), flags.tool_file)
        draw(lambda: make_backend(flags), flags.chats_dir, tools)
    else:
        with report_user_errors():
            main()
