"""Talk to models in a browser.

    python scripts/web_demo.py                                   (the weights in out/)
    python scripts/web_demo.py --endpoint http://127.0.0.1:8000/v1   (any OpenAI server)

The page is for the person at this machine: it listens on 127.0.0.1 only unless told otherwise, and
keeps its conversations in out/chats/.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from streamlit.runtime import exists as runs_in_streamlit
from streamlit.web.cli import main as streamlit

from inference import Choice
from inference.backends import Backend, Endpoint, LocalModels
from inference.pool import ModelPool
from training import ROOT, count, find_processes, make_parser, report_user_errors


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Talk to MiniMind in a browser.")
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="where weights are")
    parser.add_argument("--weight", help="a .pth file: offer it alone")
    parser.add_argument("--quantize", choices=("int8",), help="weights of 8 bits, on a CPU")
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    parser.add_argument(
        "--tokenizer_path", type=Path, default=ROOT / "model" / "minimind_tokenizer", help="folder"
    )
    parser.add_argument("--endpoint", help="a server's address with /v1, instead of weights here")
    parser.add_argument("--api_key", help="what that server asks for; default: OPENAI_API_KEY")
    parser.add_argument("--chats_dir", type=Path, help="default: chats in --out_dir")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: also other machines")
    parser.add_argument("--port", type=count, default=8501)
    return parser.parse_args()


def make_backend(args: argparse.Namespace) -> Backend:
    """The source of answers that the flags name.

    Raises:
        UserError: if they do not fit together.
    """
    if args.endpoint is not None:
        return Endpoint(args.endpoint, args.api_key or os.environ.get("OPENAI_API_KEY"))
    device = find_processes(args.device, ddp=False).device
    choice = Choice(args.weight, None, args.out_dir, None, None, None, args.tokenizer_path)
    return LocalModels(ModelPool(choice, device, args.quantize, rows=4, queue=16, loaded=2))


def main() -> None:
    """Start Streamlit on this file, or under it draw the page."""
    args = parse_args()
    if runs_in_streamlit():
        from web_page import draw  # which only works there

        draw(tuple(sys.argv[1:]), args.chats_dir or args.out_dir / "chats")
        return
    make_backend(args)  # what is wrong with the flags shows here
    options = ["--server.address", args.host, "--server.port", str(args.port)]
    options += ["--server.headless", "true", "--browser.gatherUsageStats", "false"]
    options += ["--client.toolbarMode", "minimal"]
    print(f"http://{args.host}:{args.port}", flush=True)
    streamlit(["run", __file__, *options, "--", *sys.argv[1:]])


if __name__ == "__main__":
    with report_user_errors():
        main()
