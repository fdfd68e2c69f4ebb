"""Useful tokens per second of instruction tuning: packed rows beside padded ones, in one run.

    python benchmarks/packing.py --data_path my_chats.jsonl

All contenders take whole optimizer steps on the same data, as many rows each, in turns. Tokens of
conversations are useful; padding is not.
"""

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from common import ROOT, make_parser, user_path
from dataset import PackedRows, PaddedRows, SFTDataset, collate
from model import load_tokenizer
from sample_world import SAMPLE, ensure_sample


def main() -> None:
    """Measure and print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=user_path, default=SAMPLE / "sft.jsonl")
    args = harness.parse_flags(parser, dim=512, n_layers=8, batch_size=8, max_seq_len=512, rounds=7)
    world, autocast = harness.find_device(args)
    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    dataset = SFTDataset(ensure_sample(args.data_path), tokenizer, args.max_seq_len + 1)
    packed, padded = PackedRows(dataset, args.max_seq_len), PaddedRows(dataset)
    print(
        f"{len(dataset):,} conversations; real tokens among the positions: "
        f"packed {packed.fill:.1%}, padded to {args.max_seq_len} {padded.fill:.1%}\n"
        f"{harness.describe(args, world.device, autocast.fast_dtype)}"
    )

    def draw(rows: PackedRows | PaddedRows, length: int) -> dict[str, Tensor]:
        """Random rows, padded to the longest one and to at least `length` positions."""
        chosen = torch.randint(len(rows), (args.batch_size,)).tolist()
        batch = collate([rows[i] for i in chosen])
        missing = max(0, length - batch["input_ids"].shape[1])
        return {key: F.pad(v, (0, missing)).to(world.device) for key, v in batch.items()}

    peer = f"padded to {args.max_seq_len}"
    batches = {
        name: [draw(rows, length) for _ in range(harness.WARM_UP + args.rounds)]
        for name, rows, length in (
            ("packed", packed, 0),
            ("padded to the longest of a batch", padded, 0),
            (peer, padded, args.max_seq_len),
        )
    }
    step = harness.make_step(harness.make_model(args, world), harness.mean_loss(autocast))
    contenders = {name: lambda i, own=own: step(own[i]) for name, own in batches.items()}
    tokens = {name: [int(b["attention_mask"].sum()) for b in own] for name, own in batches.items()}
    harness.compare_speeds(contenders, tokens, "tokens/s", peer)


if __name__ == "__main__":
    main()
