import json
import sys

import pytest

from training.schedule import get_lr, warmup_steps


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (500, 2.5e-4), (1_000, 5e-4), (13_000, 2.55e-4), (25_000, 1e-5)],
)
def test_warmup_then_cosine(step, expected):
    """Worked out by hand: half-way down the cosine lies the mean of lr and min_lr."""
    lr = get_lr(step, total_steps=25_000, lr=5e-4, warmup_iters=1_000, min_lr=1e-5)
    assert lr == pytest.approx(expected, abs=1e-12)


# From 1e-3 to 1e-5, 100 steps of warm-up and 1,000 after it.
BY_HAND = {
    "cosine": [
        (350, 1e-5 + 9.9e-4 * (2 + 2**0.5) / 4),  # cos(45°) = √2 / 2
        (600, 5.05e-4),
        (850, 1e-5 + 9.9e-4 * (2 - 2**0.5) / 4),
    ],
    "linear": [(101, 9.9901e-4), (350, 7.525e-4), (600, 5.05e-4), (1_099, 1.099e-5)],
    "step": [(599, 1e-3), (600, 1e-4), (849, 1e-4), (850, 1e-5), (1_099, 1e-5)],
    "constant": [(101, 1e-3), (600, 1e-3), (1_100, 1e-3), (9_000, 1e-3)],
    "wsd": [(600, 1e-3), (900, 1e-3), (901, 9.9505e-4), (1_000, 5.05e-4), (1_050, 2.575e-4)],
}


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [(decay, *pair) for decay, pairs in BY_HAND.items() for pair in pairs],
)
def test_every_decay_by_hand(decay, step, expected):
    assert get_lr(step, 1_100, 1e-3, 100, 1e-5, decay) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("decay", BY_HAND)
def test_every_decay_warms_up_from_0_to_the_peak_and_falls_to_the_end(decay):
    rates = [get_lr(step, 1_100, 1e-3, 100, 1e-6, decay) for step in range(1_200)]
    assert rates[:101] == pytest.approx([1e-5 * step for step in range(101)])
    assert max(rates) == rates[100] == 1e-3
    assert rates[100:] == sorted(rates[100:], reverse=True)
    end = 1e-3 if decay == "constant" else 1e-6
    assert rates[1_100:] == pytest.approx([end] * 100)


def test_steps_do_not_fall_below_the_end():
    rates = [get_lr(step, 100, 1e-3, 0, 5e-4, "step") for step in range(110)]
    assert rates == [1e-3] * 50 + [5e-4] * 60


def test_no_warmup_starts_at_the_peak():
    for decay in BY_HAND:
        assert get_lr(0, 10, 1e-3, 0, 1e-4, decay) == 1e-3


def test_a_run_shorter_than_its_warmup_only_warms_up():
    for decay in BY_HAND:
        rates = [get_lr(step, 10, 1e-3, 20, 1e-4, decay) for step in range(10)]
        assert rates == pytest.approx([step * 5e-5 for step in range(10)])


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="'exponential' is none of cosine, linear"):
        get_lr(0, 10, 1e-3, 0, 1e-4, "exponential")


def test_warmup_in_steps_or_as_a_share_of_the_run():
    assert warmup_steps(None, None, 1_000) == 30
    assert warmup_steps(None, 0.1, 1_000) == 100
    assert warmup_steps(None, 0.0, 1_000) == 0
    assert warmup_steps(0, None, 1_000) == 0
    assert warmup_steps(7, None, 1_000) == 7


@pytest.mark.parametrize("batch", [(4, 1), (2, 2), (1, 4)])
def test_the_schedule_counts_optimizer_steps(run, tmp_path, monkeypatch, batch):
    """22 texts, 4 a step, twice: 12 steps, of which 2 warm up; then straight to 0."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # drawing takes longest
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "1" * n}) + "\n" for n in range(1, 23)), "utf-8")
    run(
        "--dim", 32, "--n_layers", 1, "--device", "cpu", "--data_path", data, "--out_dir", tmp_path,
        "--max_seq_len", 32, "--no-packing", "--batch_size", batch[0], "--accumulation_steps",
        batch[1], "--epochs", 2, "--log_interval", 1, "--learning_rate", 1e-3, "--min_lr", 0,
        "--lr_decay", "linear", "--warmup_iters", 2,
    )  # fmt: skip
    lines = (tmp_path / "logs" / "pretrain_32" / "metrics.jsonl").read_text("utf-8").splitlines()
    rates = [json.loads(line)["lr"] for line in lines]
    assert rates == pytest.approx([0, 5e-4, *(1e-3 - n * 1e-4 for n in range(10))], abs=1e-12)
