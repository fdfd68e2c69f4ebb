import pytest

from training import get_lr, warmup_steps


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (500, 2.5e-4), (1_000, 5e-4), (13_000, 2.55e-4), (25_000, 1e-5)],
)
def test_warmup_then_cosine(step, expected):
    """Worked out by hand: half-way down the cosine lies the mean of lr and min_lr."""
    lr = get_lr(step, total_steps=25_000, lr=5e-4, warmup_iters=1_000, min_lr=1e-5)
    assert lr == pytest.approx(expected, abs=1e-12)


def test_never_above_the_peak_and_falling_after_it():
    rates = [get_lr(step, 300, 5e-4, 9, 5e-5) for step in range(301)]
    assert max(rates) == 5e-4
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_stays_at_the_end_value_beyond_the_run():
    assert get_lr(400, 300, 5e-4, 9, 5e-5) == pytest.approx(5e-5)


def test_no_warmup_starts_at_the_peak():
    assert get_lr(0, 10, 1e-3, 0, 1e-4) == 1e-3


def test_default_warmup_is_three_percent():
    assert warmup_steps(None, 1_000) == 30
    assert warmup_steps(0, 1_000) == 0
    assert warmup_steps(7, 1_000) == 7
