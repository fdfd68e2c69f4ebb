"""Preference training with the reference's log-probabilities stored, beside asking it every step.

    python benchmarks/dpo_reference.py --data_path my_pairs.jsonl

Both take whole optimizer steps with the loss of train_dpo.py on the same batches, in turns. The one
pass that fills the store is timed apart.
"""

import time

import harness
import torch
from torch import Tensor, nn

from common import ROOT, make_parser, user_path
from dataset import DPODataset, PairRows, RowBatches, collate_pairs
from model import load_tokenizer
from sample_world import SAMPLE, ensure_sample
from train_dpo import preference_losses, reply_logps


def main() -> None:
    """Measure and print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=user_path, default=SAMPLE / "dpo.jsonl")
    args = harness.parse_flags(
        parser, dim=512, n_layers=8, batch_size=8, max_seq_len=1024, rounds=15
    )
    world, autocast = harness.find_device(args)
    tokenizer = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
    half = args.max_seq_len // 2
    rows = PairRows(DPODataset(ensure_sample(args.data_path), tokenizer, half, half))
    order = list(RowBatches(len(rows), args.batch_size, seed=0, epoch=0, lengths=rows.lengths))
    batches = [
        world.to_device(collate_pairs([rows[i] for i in order[round_ % len(order)]]))
        for round_ in range(harness.WARM_UP + args.rounds)
    ]
    reference = harness.make_model(args, world).eval()

    @torch.no_grad()
    def ask(batch: dict[str, Tensor]) -> Tensor:
        with autocast:
            return reply_logps(reference, batch)[0]

    started = time.perf_counter()
    stored = [ask(batch).cpu() for batch in batches]
    seconds = time.perf_counter() - started
    pairs = [len(batch["sample"]) for batch in batches]
    print(harness.describe(args, world.device, autocast.fast_dtype))
    print(f"the pass that fills the store: {sum(pairs) / seconds:.1f} pairs/s")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with autocast:
            logps, *_ = reply_logps(model, batch)
        lengths = batch["loss_mask"].sum(1)
        return preference_losses(logps, batch["asked"], lengths, "sigmoid_norm", 0.5)[0].mean()

    step, peer_step = (harness.make_step(harness.make_model(args, world), loss) for _ in range(2))
    peer = "reference asked at every step"
    contenders = {
        "reference kept beside the data": lambda i: step(
            {**batches[i], "asked": stored[i].to(world.device)}
        ),
        peer: lambda i: peer_step({**batches[i], "asked": ask(batches[i])}),
    }
    amounts = dict.fromkeys(contenders, pairs)
    harness.compare_speeds(contenders, amounts, "pairs/s", peer)


if __name__ == "__main__":
    main()
