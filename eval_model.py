"""Let a trained model write.

python eval_model.py --weight pretrain                      (type a beginning, read on)
python eval_model.py --weight pretrain --prompt "春天来了"
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from dataset import tokenizer_hash
from model import LMConfig, MiniMindLM
from training import (
    ROOT,
    UserError,
    count,
    find_processes,
    flag,
    fraction_or_one,
    load_model,
    load_tokenizer,
    make_parser,
    positive_or_zero,
    report_user_errors,
    resolve_weights,
    seed,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Continue text with a trained MiniMind.")
    parser.add_argument("--weight", default="pretrain", help="a stage's name, or a .pth file")
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="where weights are")
    parser.add_argument("--dim", type=count, default=512, help="of the weights to load")
    parser.add_argument("--n_layers", type=count, default=8, help="of weights without a .json")
    parser.add_argument("--use_moe", action=flag, default=False, help="load a mixture of experts")
    parser.add_argument("--prompt", help="continue this text and end; default: ask for texts")
    parser.add_argument("--max_new_tokens", type=count, default=200)
    parser.add_argument(
        "--temperature", type=positive_or_zero, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument(
        "--top_p",
        type=fraction_or_one,
        default=0.9,
        help="draw among the likeliest tokens that reach this probability together",
    )
    parser.add_argument("--seed", type=seed, help="default: another text every time")
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    parser.add_argument(
        "--tokenizer_path", type=Path, default=ROOT / "model" / "minimind_tokenizer", help="folder"
    )
    return parser.parse_args()


def continue_text(
    model: MiniMindLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> Iterator[str]:
    """Continue a text, piece by piece.

    Yields:
        Whole characters: a piece is held back while the last character lacks bytes.

    Raises:
        ValueError: if the text leaves no room in the model's context.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokens = model.generate(
        torch.tensor([[tokenizer.bos_token_id, *ids]], device=model.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature,
        top_p=args.top_p,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generator=generator,
        stream=True,
    )
    decoder = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        piece = decoder.step(tokenizer.backend_tokenizer, token.item())
        if piece:
            yield piece


def main() -> None:
    """Write one continuation, or one for every text that is typed."""
    args = parse_args()
    device = find_processes(args.device, ddp=False).device
    tokenizer = load_tokenizer(args.tokenizer_path)
    try:
        shape = LMConfig(
            dim=args.dim,
            n_layers=args.n_layers,
            use_moe=args.use_moe,
            vocab_size=len(tokenizer),
        )
    except ValueError as error:
        raise UserError(f"--dim {args.dim}: {error}") from None
    path = resolve_weights("--weight", args.weight, args.out_dir, shape)
    model = load_model(path, shape, tokenizer_hash(tokenizer)).to(device).eval()
    generator = torch.Generator(device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)

    def write(text: str) -> None:
        text = text.encode("utf-8", "replace").decode("utf-8")  # stray bytes of a terminal
        print(text, end="", flush=True)
        try:
            for piece in continue_text(model, tokenizer, text, args, generator):
                print(piece, end="", flush=True)
        except ValueError as error:
            raise UserError(f"the text is not usable: {error}") from None
        print()

    if args.prompt is not None:
        write(args.prompt)
        return
    print(f"{path.name}: type a beginning and press Enter; an empty line ends.")
    while text := ask():
        try:
            write(text)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(error)


def ask() -> str:
    """The line that the user types; empty at the end of input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


if __name__ == "__main__":
    with report_user_errors():
        main()
