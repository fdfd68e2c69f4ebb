"""Tokens per second of a whole optimizer step, beside transformers' model of the same shape.

    python benchmarks/train_throughput.py                 (26 M beside Llama)
    python benchmarks/train_throughput.py --compile
    python benchmarks/train_throughput.py --size moe      (145 M beside GraniteMoeShared)

Both models take the same batches and the same optimizer, in turns. On a GPU, matrix products are in
bf16, as in training; on a CPU everything is in fp32.
"""

import torch
import torch.nn.functional as F
from harness import WARM_UP, compare_speeds, describe, make_peer, make_step, parse_flags
from torch import Tensor, nn

from common import BooleanFlag, make_parser, positive_int
from model import LMConfig, MiniMindLM, choose_device

BATCH = {"26m": 8, "104m": 2, "moe": 4}


def own_loss(model: nn.Module, ids: Tensor, **rows: Tensor) -> Tensor:
    """The same computation as the peer's: each row is one document."""
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
        output = model(ids[:, :-1], **rows)
    loss = F.cross_entropy(output.logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    return loss + output.aux_loss


def own_packed_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """What train_pretrain.py computes: four documents to a row, isolated from each other."""
    positions = torch.arange(ids.shape[1] - 1, device=ids.device) % (ids.shape[1] // 4)
    mask = torch.ones_like(ids[:, :-1])
    return own_loss(model, ids, position_ids=positions.expand(len(ids), -1), attention_mask=mask)


def peer_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """As transformers computes it, on the same targets."""
    targets = ids[:, 1:].contiguous()
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
        return model(ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss


def main() -> None:
    """Measure and print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--size", choices=BATCH, default="26m")
    parser.add_argument("--batch_size", type=positive_int, help=f"rows; default by size: {BATCH}")
    parser.add_argument("--compile", action=BooleanFlag, default=False, help="compiled models too")
    args = parse_flags(parser, seq_len=512, rounds=7)
    args.batch_size = args.batch_size or BATCH[args.size]
    device = choose_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    config = LMConfig.from_size(args.size)
    shape = (WARM_UP + args.rounds, args.batch_size, args.seq_len + 1)
    batches = torch.randint(config.vocab_size, shape, device=device)
    peer = "transformers GraniteMoeShared" if config.use_moe else "transformers Llama"

    contenders = {}
    for suffix in ("", ", compiled") if args.compile else ("",):
        own = MiniMindLM(config).to(device).train()
        theirs = make_peer(config).to(device).train()
        for name, model, loss_of in (
            ("MiniMind", own, own_loss),
            ("MiniMind, packed rows", own, own_packed_loss),
            (peer, theirs, peer_loss),
        ):
            step = make_step(torch.compile(model) if suffix else model, loss_of)
            contenders[name + suffix] = lambda i, step=step: step(batches[i])
    ours, their = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (own, theirs))
    print(f"{ours:.1f} M against {their:.1f} M parameters; {describe(args, device, dtype)}")
    tokens = dict.fromkeys(contenders, [args.batch_size * args.seq_len] * len(batches))
    compare_speeds(contenders, tokens, "tokens/s", peer)


if __name__ == "__main__":
    main()
