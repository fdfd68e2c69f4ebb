"""A stage as somebody might add it: next-token prediction that keeps the logits small (z-loss)."""

import common.interrupt  # for Ctrl-C during the imports below

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import training
from dataset import PackedRows, PretrainDataset


def z_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy plus 1e-4 · log² of the softmax's denominator (PaLM), weighted: (B, T)."""
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return (losses.view_as(batch["loss_mask"]) + 1e-4 * logits.logsumexp(-1) ** 2) * batch[
        "loss_mask"
    ]


def score(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What validation sums over the data."""
    return {"loss": z_losses(model, batch), "targets": batch["loss_mask"]}


def train_epoch(run: training.Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take the steps that are left of the epoch."""
    model.train()
    for batches in run.accumulations(model):
        weights, tokens, _ = training.count_targets(batches, run.world)
        lr = training.get_lr(*run.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals = training.StepTotals(run.world)
        for batch in batches:
            losses = z_losses(model, batch)
            (losses.sum() / weights).backward()
            totals.add(losses, torch.zeros(()), None)
        sums = totals.add_up()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.args.grad_clip).item()
        if math.isfinite(sums["loss"] + grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        run.add_step(batches, totals, targets=weights, tokens=tokens, lr=lr, grad_norm=grad_norm)


def main() -> int:
    """What every stage does around its step."""
    parser = training.make_stage_parser(
        "A toy.",
        data_path=None,
        from_weight="none",
        optimizer="muon",
        learning_rate=3e-3,
        weight_decay=0.1,
        epochs=2,
        batch_size=2,
        grad_clip=1.0,
        max_seq_len=32,
    )
    args = training.parse_stage_arguments(parser)
    setup = training.prepare(args, training.Stage("toy", {"muon": ((math.inf, 0, 3e-3, 1),)}))
    with training.lock_run(setup.path, setup.world, args.dry_run):
        training.find_resume(setup)
        data = training.open_splits(
            setup,
            lambda path: path,
            partial(PretrainDataset, tokenizer=setup.tokenizer, max_length=33),
            make_rows=lambda dataset: PackedRows(dataset, 32),
        )
        with training.open_process_group(setup.world), training.StopSignal(setup.world) as stop:
            model = setup.raw_model.to(setup.world.device)
            optimizer = training.make_optimizer(model, args)
            scaler = torch.amp.GradScaler(setup.world.device.type, enabled=False)
            run = training.start_run(setup, data, stop, optimizer, scaler, score)
            if run is None:
                return 0
            run.validate_if_due(model)
            while run.going_on:
                train_epoch(run, model, optimizer)
            return run.finish()


if __name__ == "__main__":
    with common.report_user_errors():
        sys.exit(main())
