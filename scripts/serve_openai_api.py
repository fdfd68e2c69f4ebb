"""Serve models by OpenAI's API: any of its clients can use them.

    python scripts/serve_openai_api.py                    (http://127.0.0.1:8000/v1)
    python scripts/serve_openai_api.py --quantize int8 --api_key secret --host 0.0.0.0

It offers all weights in out/ and the folders in it, and all adapters in lora/ there; a request's
`model` selects one. / lists the models, /docs describes the API, /metrics has figures.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import os
import sys

from common import (
    UserError,
    make_parser,
    non_negative_int,
    port,
    positive_float,
    positive_int,
    report_user_errors,
)
from inference import add_history_cnt, add_model_arguments, describe_weights, listen, open_pool


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Serve MiniMind by OpenAI's API.")
    models = parser.add_argument_group("models")
    add_model_arguments(models)
    add_history_cnt(models)
    models.add_argument("--max_models", type=positive_int, default=2, help="most in memory")
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0: also other machines")
    add("--port", type=port, default=8000, help="0: any that is free")
    add(
        "--api_key",
        help="key that clients must send; in MINIMIND_API_KEY, other users cannot see it",
    )
    add("--cors_origin", action="append", default=[], help="a page that may call from a browser")
    add(
        "--access_log",
        "--log_requests",
        action="store_true",
        help="print for each request: time, method, path, status, model, tokens, seconds; no texts",
    )
    add = parser.add_argument_group("limits").add_argument
    add("--max_batch", type=positive_int, default=32, help="texts of a batch")
    add("--max_queue", type=non_negative_int, default=64, help="texts that may wait")
    add("--max_prompt", type=positive_int, default=2048, help="tokens of a prompt")
    add("--max_tokens", type=positive_int, default=4096, help="new tokens of a text")
    add("--max_seconds", type=positive_float, default=300.0, help="per request")
    add("--max_bytes", type=positive_int, default=1_000_000, help="per request")
    args = parser.parse_args()
    if args.api_key is None:  # no default of the flag: --help shows those
        args.api_key = os.environ.get("MINIMIND_API_KEY")
    if args.api_key == "":
        raise UserError("--api_key, MINIMIND_API_KEY: empty; leave both out to ask for no key")
    return args


def main() -> None:
    """Serve until a signal comes."""
    args = parse_args()
    try:
        import uvicorn

        from inference.api import Limits, create_app
    except ImportError as error:
        raise UserError(f"needs {error.name}: pip install -r scripts/requirements.txt") from None
    pool = open_pool(args, args.max_batch, args.max_queue, args.max_models, args.history_cnt)
    names = list(pool.cards())
    if not names:
        raise UserError(
            f"--out_dir {args.out_dir}: no weights of this tokenizer there; --out_dir and "
            "--tokenizer_path name others"
        )
    for line in describe_weights(args.out_dir) if args.weight is None else ():
        print(line, file=sys.stderr)
    server = listen(args.host, args.port)
    for error in pool.load_first():
        print(error, file=sys.stderr)
    limits = Limits(args.max_prompt, args.max_tokens, args.max_seconds, args.max_bytes)
    request_log = sys.stdout if args.access_log else None
    app = create_app(pool, limits, args.api_key, args.cors_origin, request_log)
    print(f"{', '.join(names)} at http://{args.host}:{server.getsockname()[1]}/v1", flush=True)
    # Answers may take 5 s more when the server ends.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[server])


if __name__ == "__main__":
    with report_user_errors():
        main()
