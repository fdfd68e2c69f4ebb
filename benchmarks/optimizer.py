"""The share of a training step that is its optimizer's, with Muon and with AdamW.

    python benchmarks/optimizer.py [--dim 512 --n_layers 8 --batch_size 8]

Forward, backward and clipping of a batch, and the step of each optimizer on these gradients, are
timed in turns. An optimizer's time does not depend on the batch: its share falls as that grows.
"""

import argparse
from statistics import median

import harness
from torch import nn

from common import make_parser
from training import make_optimizer

KINDS = ("adamw", "muon")


def main() -> None:
    """Measure and print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    args = harness.parse_flags(parser, dim=512, n_layers=8, batch_size=8, max_seq_len=512, rounds=7)
    world, autocast = harness.find_device(args)
    model, batch = harness.make_model(args, world), harness.make_batch(args, world)
    loss_of = harness.mean_loss(autocast)

    def compute_gradients(_: int) -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    flags = {"learning_rate": 5e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
    flags |= {"lr_scale": [], "weight_decay_for": []}
    contenders = {"gradients": compute_gradients}
    for kind in KINDS:
        own = argparse.Namespace(**flags, optimizer=kind)
        optimizer = make_optimizer(model, own, autocast.fast_dtype)
        contenders[kind] = lambda _, optimizer=optimizer: optimizer.step()
    seconds = harness.time_in_turns(contenders, args.rounds)
    times = {name: median(found) for name, found in seconds.items()}

    print(harness.describe(args, world.device, autocast.fast_dtype))
    print(f"\n{'':12}{'ms':>10}{'share of a step':>18}")
    print(f"{'gradients':12}{1e3 * times['gradients']:10.1f}")
    for kind in KINDS:
        share = times[kind] / (times["gradients"] + times[kind])
        print(f"{kind:12}{1e3 * times[kind]:10.1f}{share:18.1%}")


if __name__ == "__main__":
    main()
