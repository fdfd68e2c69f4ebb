"""Talk to a trained model, or let a pretrained one write.

    python eval_model.py                                 (chat with out/full_sft_512.pth)
    python eval_model.py --prompt "你是谁？"
    python eval_model.py --weight pretrain               (type a beginning, read on)
    python eval_model.py --lora_name identity            (with out/lora/identity_512.pth on it)

Weights of the stage "pretrain" continue what is typed; all others answer it, and remember what was
said before.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from dataset import ChatEncoder, render_chat, tokenizer_hash
from model import LMConfig, MiniMindLM
from training import (
    ROOT,
    UserError,
    count,
    find_processes,
    flag,
    fraction_or_one,
    load_adapter,
    load_model,
    load_tokenizer,
    make_parser,
    positive_or_zero,
    read_about,
    report_user_errors,
    resolve_weights,
    seed,
    weights_path,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser("Talk to a trained MiniMind.")
    parser.add_argument(
        "--weight", help="a stage's name, or a .pth file; default: full_sft if there, else pretrain"
    )
    parser.add_argument("--lora_name", help="an adapter's name, or its .pth file: use it as well")
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="where weights are")
    parser.add_argument("--dim", type=count, default=512, help="of the weights to load")
    parser.add_argument("--n_layers", type=count, default=8, help="of weights without a .json")
    parser.add_argument("--use_moe", action=flag, default=False, help="load a mixture of experts")
    parser.add_argument("--prompt", help="answer or continue this text and end")
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


def write(
    model: MiniMindLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    args: argparse.Namespace,
    generator: torch.Generator,
) -> Iterator[str]:
    """What the model writes after a prompt, piece by piece.

    Args:
        model: in eval mode.
        tokenizer: of the ids.
        ids: of the prompt.
        args: the flags.
        generator: source of randomness.

    Yields:
        Whole characters: a piece is held back while the last character lacks bytes.

    Raises:
        ValueError: if the prompt leaves no room in the model's context.
    """
    tokens = model.generate(
        torch.tensor([ids], device=model.device),
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


def chat_ids(encoder: ChatEncoder, messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a conversation, up to where the assistant's next answer begins."""
    return encoder.encode([render_chat(messages, add_generation_prompt=True)]).ids.tolist()


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of the beginning of a document."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [tokenizer.bos_token_id, *ids]


def main() -> None:
    """Answer or continue one text, or each that is typed."""
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
    weight = args.weight
    if weight is None:
        tuned = weights_path(args.out_dir, "full_sft", shape).is_file()
        weight = "full_sft" if tuned else "pretrain"
    path = resolve_weights("--weight", weight, args.out_dir, shape)
    model = load_model(path, shape, tokenizer_hash(tokenizer))
    about = read_about(path)
    chats = not path.name.startswith("pretrain") if about is None else about["stage"] != "pretrain"
    if args.lora_name is not None:
        folder = args.out_dir / "lora"
        load_adapter(resolve_weights("--lora_name", args.lora_name, folder, model.config), model)
        chats = True  # adapters are trained on conversations
    model.to(device).eval()
    encoder = ChatEncoder(tokenizer) if chats else None
    messages: list[dict[str, str]] = []  # of the conversation so far
    generator = torch.Generator(device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)

    def respond(text: str) -> None:
        text = text.encode("utf-8", "replace").decode("utf-8")  # stray bytes of a terminal
        if encoder is None:
            ids = text_ids(tokenizer, text)
            print(text, end="", flush=True)
        else:
            question = {"role": "user", "content": text}
            ids = chat_ids(encoder, [*messages, question])
            while messages and len(ids) >= model.config.max_seq_len:
                del messages[:2]  # the oldest exchange makes room
                ids = chat_ids(encoder, [*messages, question])
        answer = ""
        try:
            for piece in write(model, tokenizer, ids, args, generator):
                answer += piece
                print(piece, end="", flush=True)
        except ValueError as error:
            raise UserError(f"the text is not usable: {error}") from None
        print()
        if encoder is not None:
            messages.extend([question, {"role": "assistant", "content": answer}])

    if args.prompt is not None:
        respond(args.prompt)
        return
    what = "say something" if chats else "type a beginning"
    print(f"{path.name}: {what} and press Enter; an empty line ends.")
    while text := ask():
        try:
            respond(text)
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
