"""Several sources by weight: shares, order, repeats, changes of weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.mixture import Mixture
from training import Run
from training.distributed import find_processes


class Data:
    """Items of which each has so many targets."""

    def __init__(self, name, size, tokens):
        self.size, self.n_tokens = size, size * tokens
        self.content = self.name = name

    def __len__(self):
        return self.size

    def place(self, item):
        return f"{self.name}:{item}"


class Rows:
    """Rows of one item each."""

    def __init__(self, *data):
        self.dataset = Data(*data)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return {"row": (self.dataset.name, index), "sample": index}


SIZES, TOKENS, WEIGHTS = (300, 50, 1000), (100, 400, 50), [0.5, 0.3, 0.2]


def mixture(weights=WEIGHTS, seed=1, **options):
    parts = {name: Rows(name, *x) for name, *x in zip("abc", SIZES, TOKENS, strict=True)}
    return Mixture(parts, weights, seed, **options)


def drawn(mixed, epochs):
    """Name and number of each row, in order."""
    return [mixed[i]["row"] for epoch in range(epochs) for i in mixed.order(epoch).tolist()]


def tokens(rows):
    """Tokens given by each source after each row: (rows, sources)."""
    each = dict(zip("abc", TOKENS, strict=True))
    return np.cumsum([[each[n] * (name == n) for name in "abc"] for n, _ in rows], axis=0)


@pytest.mark.parametrize("weights", [WEIGHTS, [5, 3, 2], [0.98, 0.01, 0.01]])
def test_shares_are_exact_at_every_row(weights):
    given = tokens(drawn(mixture(weights), 3))
    expected = given.sum(1, keepdims=True) * np.array(weights) / np.sum(weights)
    assert len(given) == 3 * sum(SIZES)
    assert np.abs(given - expected).max() < 2 * max(TOKENS)


def test_a_source_is_read_to_its_end_before_it_is_repeated():
    rows = drawn(mixture(), 2)
    for name, size in zip("abc", SIZES, strict=True):
        own = [number for n, number in rows if n == name]
        passes = [own[i : i + size] for i in range(0, len(own), size)]
        for numbers in passes[:-1]:
            assert sorted(numbers) == list(range(size))
        assert len(set(passes[-1])) == len(passes[-1])
        if len(passes) > 2:
            assert passes[0] != passes[1]  # each in an order of its own
    assert len([n for n, _ in rows if n == "b"]) > 2 * SIZES[1]


def test_the_order_follows_from_the_seed():
    one, same, other = mixture(), mixture(), mixture(seed=2)
    assert one.order(1).tolist() == same.order(1).tolist()
    assert one.order(1).tolist() != one.order(0).tolist()
    assert one.order(0).tolist() != other.order(0).tolist()


def test_sources_that_stop_are_read_once_an_epoch():
    mixed = mixture(source_end="stop")
    for epoch in range(2):
        assert sorted(mixed.order(epoch).tolist()) == list(range(sum(SIZES)))
    rows = drawn(mixed, 1)
    last = max(i for i, (name, _) in enumerate(rows) if name == "b")
    given = tokens(rows)[last]
    assert given / given.sum() == pytest.approx(np.array(WEIGHTS), abs=0.05)
    assert mixed.n_tokens == sum(s * t for s, t in zip(SIZES, TOKENS, strict=True))


def test_weights_that_change_over_the_run():
    """By the integral of a straight line: after half of it, three quarters of the way count."""
    mixed = mixture([1, 0, 0], final_weights=[0, 0, 1])
    total = 60_000
    mixed.set_total(total)
    given = tokens(drawn(mixed, 1))
    for share in (0.25, 0.5, 1.0):
        row = int(np.searchsorted(given.sum(1), share * total))
        expected = np.array([share - share**2 / 2, 0, share**2 / 2]) * total
        assert np.abs(given[row] - expected).max() < 3 * max(TOKENS)


def test_rows_know_where_they_come_from():
    mixed = mixture()
    assert mixed[299]["row"] == ("a", 299) and mixed[300]["row"] == ("b", 0)
    assert mixed[355]["sample"] == 355
    assert [mixed.place(i) for i in (0, 299, 300, 349, 350)] == [
        "a:0",
        "a:299",
        "b:0",
        "b:49",
        "c:0",
    ]
    assert mixed.sources(np.array([0, 299, 300, 1349])).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("per_sample", "targets", "wanted"),
    [
        (1, [5, 2, 7], {"a": 5, "b": 2, "c": 7}),
        (2, [5, 2, 7, 1, 3, 4], {"a": 6, "b": 5, "c": 11}),  # all chosen, then all rejected
        (1, [5, 1, 2, 3, 7, 4], {"a": 6, "b": 5, "c": 11}),  # each row cut in two
    ],
)
def test_targets_are_counted_for_their_source(per_sample, targets, wanted):
    stage = SimpleNamespace(sequences_per_row=per_sample)
    run = SimpleNamespace(
        data=SimpleNamespace(train=mixture()),
        setup=SimpleNamespace(stage=stage),
        world=find_processes("cpu", ddp=False),
    )
    mask = (torch.arange(8) < torch.tensor(targets)[:, None]).float()
    batch = {"sample": torch.tensor([3, 300, 400]), "loss_mask": mask}
    assert Run._drawn(run, [batch]) == wanted


def test_other_weights_are_another_content():
    contents = {mixture(w).content for w in (WEIGHTS, [5, 3, 2], [1, 1, 1])}
    assert len(contents) == 2  # the first two are the same shares
    assert mixture(source_end="stop").content not in contents
