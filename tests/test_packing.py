import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dataset import PackedRows, PaddedRows, PretrainDataset, RowBatches, collate
from dataset.packing import best_fit

KEYS = ["input_ids", "targets", "loss_mask", "position_ids", "attention_mask"]


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    """About 5,000 items of 2 to 32 positions, more than one window of the packing."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in generator.integers(1, 60, 4000):
            text = "".join(map(str, generator.integers(0, 10, n)))
            file.write(json.dumps({"text": text}) + "\n")
    return PretrainDataset(path, tokenizer, 33)


@pytest.fixture(scope="module")
def packed(dataset):
    return PackedRows(dataset, 32)


# ---- rows


def pieces(row):
    """The items in a row, cut where positions restart, as (X, Y, mask); and the padding."""
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    found, padding = [], 0
    for start, end in zip(starts, [*starts[1:], len(row["position_ids"])], strict=True):
        assert row["position_ids"][start:end].tolist() == list(range(end - start))
        x, y, mask, _, keep = (row[key][start:end].tolist() for key in KEYS)
        if keep == [0] * (end - start):
            assert end == len(row["position_ids"])
            assert x == y == keep
            assert mask == [0.0] * len(x)
            padding = len(x)
        else:
            assert keep == [1] * len(x)
            found.append((tuple(x), tuple(y), tuple(mask)))
    return found, padding


def items(dataset):
    return [tuple(tuple(part.tolist()) for part in dataset[i]) for i in range(len(dataset))]


def test_rows_hold_every_item_once_and_whole(dataset, packed):
    expected = items(dataset)
    found = Counter()
    padding = 0
    for r in range(len(packed)):
        row = packed[r]
        assert all(row[key].shape == (32,) for key in KEYS)
        assert [row[key].dtype for key in KEYS] == [torch.int64] * 2 + [torch.float32] + [
            torch.int64
        ] * 2
        in_row, empty = pieces(row)
        found.update(in_row)
        padding += empty
        assert in_row[0] == expected[row["sample"]]
        assert in_row == [expected[i] for i in packed.items(r)]
    assert found == Counter(expected)
    assert packed.fill == pytest.approx(1 - padding / (32 * len(packed)))
    assert packed.fill > 0.97


def test_rows_are_in_the_order_of_their_first_items_and_stay_local(packed):
    for r in range(len(packed)):
        row = packed.items(r)
        assert row == sorted(row)
        assert row[0] // 2048 == row[-1] // 2048
    firsts = [packed.items(r)[0] for r in range(len(packed))]
    assert firsts == sorted(firsts)


def test_rows_longer_than_the_items(dataset):
    rows = PackedRows(dataset, 100)
    assert Counter(p for r in range(len(rows)) for p in pieces(rows[r])[0]) == Counter(
        items(dataset)
    )
    with pytest.raises(ValueError, match="32"):
        PackedRows(dataset, 31)


def test_the_plan_is_kept(dataset, packed, monkeypatch):
    monkeypatch.setattr("dataset.packing.best_fit", None)
    again = PackedRows(dataset, 32)
    assert [again.items(r) for r in range(len(again))] == [
        packed.items(r) for r in range(len(packed))
    ]


@given(st.data())
@settings(max_examples=200)
def test_no_row_is_overfull_and_no_two_rows_fit_into_one(data):
    row_length = data.draw(st.integers(1, 70))
    lengths = np.array(data.draw(st.lists(st.integers(1, row_length), min_size=1, max_size=60)))
    rows = best_fit(lengths, row_length)
    fill = Counter()
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        fill[row] += length
    assert sorted(fill) == list(range(len(fill)))
    assert max(fill.values()) <= row_length
    two_emptiest = sorted(fill.values())[:2]
    assert len(fill) == 1 or sum(two_emptiest) > row_length
    firsts = [rows.tolist().index(row) for row in range(len(fill))]
    assert firsts == sorted(firsts)


def test_real_text_fills_rows(shared_dir, tokenizer, tmp_path):
    path = shared_dir / "data" / "pretrain_real.jsonl"
    part = tmp_path / "part.jsonl"
    with path.open("rb") as source, part.open("wb") as target:
        target.writelines(line for n, line in enumerate(source) if n % 8 == 0)
    dataset = PretrainDataset(part, tokenizer, 513)
    rows = PackedRows(dataset, 512)
    real = targets = 0
    for r in range(len(rows)):
        row = rows[r]
        real += int(row["attention_mask"].sum())
        targets += int((row["loss_mask"] > 0).sum())
    assert real / (512 * len(rows)) >= 0.97
    assert targets == dataset.n_tokens  # test_pretrain_dataset counts these independently


# ---- batches


def test_one_item_a_row_is_padded_to_the_longest_of_the_batch(dataset):
    rows = PaddedRows(dataset)
    assert len(rows) == len(dataset)
    assert rows.fill == pytest.approx(sum(len(x) for x, _, _ in items(dataset)) / len(rows) / 32)
    chosen = [3, 1, 7]
    batch = collate([rows[i] for i in chosen])
    longest = max(len(dataset[i][0]) for i in chosen)
    assert all(batch[key].shape == (3, longest) for key in KEYS)
    assert batch["sample"].tolist() == chosen
    for b, i in enumerate(chosen):
        found, padding = pieces({key: batch[key][b] for key in KEYS})
        assert found == [items(dataset)[i]]
        assert padding == longest - len(dataset[i][0])


def test_no_rows_give_a_blank_batch(packed):
    blank, full = collate([]), collate([packed[0], packed[1]])
    assert blank.keys() == full.keys()
    for key, values in blank.items():
        assert values.dtype == full[key].dtype
    assert blank["input_ids"].shape == (1, 1)
    assert blank["loss_mask"].sum() == 0
    assert blank["attention_mask"].sum() == 0


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "spawn"), (2, "fork")])
def test_data_loader_gives_the_rows(packed, workers, context):
    if context and context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    batches = RowBatches(45, 4, seed=1, epoch=0, rank=1, world_size=10)  # the last share is empty
    loader = DataLoader(
        packed,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=context,
    )
    got = list(loader)
    assert len(got) == len(loader) == 2
    for batch, rows in zip(got, batches, strict=True):
        expected = collate([packed[r] for r in rows])
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    last = RowBatches(45, 4, seed=1, epoch=0, rank=9, world_size=10)
    assert [len(rows) for rows in last] == [4, 0]


# ---- order


def order(n_rows, batch_size, **options):
    """All rows, of all processes, in the order of the epoch."""
    world_size = options.pop("world_size", 1)
    per_rank = [
        list(RowBatches(n_rows, batch_size, rank=r, world_size=world_size, **options))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    return [row for together in zip(*per_rank, strict=True) for share in together for row in share]


@given(
    n_rows=st.integers(1, 80),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 4),
    start=st.integers(0, 80),
    epoch=st.integers(0, 3),
)
def test_processes_share_the_rest_of_one_permutation(n_rows, batch_size, world_size, start, epoch):
    start = min(start, n_rows)
    whole = order(n_rows, 1, seed=5, epoch=epoch)
    assert sorted(whole) == list(range(n_rows))
    split = {"seed": 5, "epoch": epoch, "world_size": world_size, "start": start}
    assert order(n_rows, batch_size, **split) == whole[start:]
    sizes = []
    for rank in range(world_size):
        batches = RowBatches(
            n_rows, batch_size, seed=5, epoch=epoch, rank=rank, world_size=world_size, start=start
        )
        listed = list(batches)
        assert len(listed) == len(batches)
        assert all(len(rows) == batch_size for rows in listed[:-1])
        sizes += [len(rows) for rows in listed[-1:]]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_a_step_holds_the_same_rows_however_it_is_split():
    def steps(batch_size, accumulation, world_size):
        ranks = [
            list(RowBatches(83, batch_size, seed=3, epoch=1, rank=r, world_size=world_size))
            for r in range(world_size)
        ]
        return [
            {row for batches in ranks for rows in batches[i : i + accumulation] for row in rows}
            for i in range(0, len(ranks[0]), accumulation)
        ]

    expected = steps(8, 1, 1)
    assert len(expected) == 11
    for split in [(4, 2, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (2, 1, 4)]:
        assert steps(*split) == expected


def test_order_follows_from_seed_and_epoch_alone():
    before = torch.get_rng_state()
    first = order(1000, 8, seed=1, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert order(1000, 8, seed=1, epoch=0) == first
    others = [order(1000, 8, seed=s, epoch=e) for s, e in [(1, 1), (0, 1), (2, 0), (0, 0)]]
    for other in [list(range(1000)), *others]:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 20
    assert others[0] != others[1]
    assert order(1000, 8, seed=1, epoch=0, shuffle=False) == list(range(1000))
