"""The curves and the report of a run, from metrics made by hand."""

import argparse
import json
import math
import os
import random
import shlex
import struct
import subprocess
import sys

import pytest

from common import Text
from diagnosis.curves import draw_curves
from diagnosis.metrics import read_metrics
from diagnosis.report import find_all, write_report
from training.record import add_ending, write_config

VOCAB = 6400  # ln(6,400) = 8.764
LN_VOCAB = 8.764


def training_lines(losses, **columns):
    """Lines ten steps and 1,000 tokens apart; a column is a value, or a list of one per line."""
    usual = {"lr": 5e-4, "grad_norm": 0.5, "skipped": 0, "spikes": 0, "epoch": 0}
    lines = []
    for i, loss in enumerate(losses):
        line = {"step": 10 * (i + 1), "tokens": 1000 * (i + 1), "seconds": 2.0 * (i + 1)}
        line |= {"loss": loss, "tokens_per_second": 500, "memory_gb": 1.5}
        for name, value in (usual | columns).items():
            line[name] = value[i] if isinstance(value, list) else value
        lines.append(line)
    return lines


def evaluation(step, loss, **more):
    scores = {"val_loss": loss, "val_perplexity": math.exp(loss), "val_bits_per_byte": loss / 2}
    return {"step": step, "epoch": 0, "tokens": 100 * step, "seconds": step / 5} | scores | more


def learning(n=60, first=8.5, end=3.0, scatter=0.0):
    """A loss that falls as a power of the step from `first` to `end`, ±`scatter` of itself."""
    dice = random.Random(7)
    power = math.log(first / end) / math.log(n)
    return [first * (i + 1) ** -power * (1 + dice.uniform(-scatter, scatter)) for i in range(n)]


def cosine(n):
    """A learning rate that falls from 5e-4 to 5e-5."""
    return [5e-5 + 2.25e-4 * (1 + math.cos(math.pi * i / n)) for i in range(n)]


def late(fall, n=30):
    """A loss that is down at 4 after two thirds of the run and falls evenly by `fall` after that.

    The straight line's fall is a share of its mean.
    """
    early = [8 - 4 * i / (2 * n // 3) for i in range(2 * n // 3)]
    third = n // 3
    middle = 4 / (1 + fall / 2)
    return early + [middle * (1 + fall * (0.5 - i / (third - 1))) for i in range(third)]


def waves(climb, times, n=60):
    """A falling loss on which `times` teeth stand, each `climb` of it high and two lines wide."""
    losses = [6 - 2 * i / n for i in range(n)]
    for tooth in range(times):
        for i in (10 + 8 * tooth, 11 + 8 * tooth):
            losses[i] *= 1 + climb
    return losses


def validated(train_end, validation):
    """A run of 40 lines that falls from 6 to `train_end`, evaluated every ten lines."""
    lines = training_lines([6 + (train_end - 6) * i / 39 for i in range(40)])
    return lines + [evaluation(100 * (i + 1), loss) for i, loss in enumerate(validation)]


def by_set(*losses):
    """A healthy run and the losses of one of its validation sets, evenly over its steps."""
    together = validated(4.0, [5.0 - 0.5 * i for i in range(len(losses))])
    scores = iter(losses)
    return [m | {"val_loss/zh": next(scores)} if "val_loss" in m else m for m in together]


def counted(name, value, n=60):
    """A healthy run of ten steps a line in which a count ends at `value`."""
    return training_lines(learning(n), **{name: [0] * (n // 2) + [value] * (n - n // 2)})


def experts(share, n=60):
    """A healthy mixture of four experts, uneven at first; the rarest one's share at the end."""
    load = [0.001] * 20 + [share] * (n - 20)
    return training_lines(learning(n), expert_load_min=load, expert_load_max=0.4)


HEALTHY = [
    *training_lines(learning(scatter=0.015), lr=cosine(60)),
    *(evaluation(step, 1.01 * learning()[step // 10 - 1]) for step in (200, 400, 600)),
]

# What is found in one word, metrics that show it, and metrics that just do not.
CASES = {
    "far above": (
        "far above",
        training_lines([LN_VOCAB + 1.1, 7]),
        training_lines([LN_VOCAB + 0.9, 7]),
    ),
    "far below after the first step": (
        "far below",
        [training_lines([LN_VOCAB - 1.1])[0] | {"step": 1}],
        [training_lines([LN_VOCAB - 0.9])[0] | {"step": 1}],
    ),
    "far below after ten steps": (
        "far below",
        training_lines([0.49 * LN_VOCAB]),
        training_lines([0.51 * LN_VOCAB]),
    ),
    "far below, but after more steps": (
        "far below",
        [training_lines([3.0])[0] | {"step": 20}],
        [training_lines([3.0])[0] | {"step": 21}],
    ),
    "nothing learnt": (
        "Nothing was learnt",
        training_lines([8.8, 8.75] * 10),
        training_lines([8.8 - 0.012 * i for i in range(20)]),
    ),
    "hardly anything learnt": (  # the third is about 7.89, nine tenths of ln(6,400)
        "Hardly anything was learnt",
        training_lines(learning(30, first=8.7, end=7.91)),
        training_lines(learning(30, first=8.7, end=7.8)),
    ),
    "hardly anything learnt, of few lines": (
        "Hardly anything was learnt",
        training_lines([8.76, 8.6, 8.49]),
        training_lines([8.76, 8.6, 7.8]),
    ),
    "hardly anything learnt in twelve steps": (
        "Hardly anything was learnt: the loss ends at 8.49; uniform guessing gives 8.76. 12 optimi",
        [*training_lines([8.7]), training_lines([8.49])[0] | {"step": 12, "tokens": 1200}],
        [*training_lines([8.7]), training_lines([7.8])[0] | {"step": 12, "tokens": 1200}],
    ),
    "hardly anything learnt, of one line": (
        "Hardly anything was learnt",
        [{"step": 100, "tokens": 9, "loss": 8.7}, evaluation(100, 7.9)],
        [{"step": 100, "tokens": 9, "loss": 8.7}, evaluation(100, 7.8)],
    ),
    "nothing learnt, too short to judge": (
        "Nothing was learnt",
        training_lines([8.8, 8.75] * 6),
        training_lines([8.8, 8.75] * 5 + [8.8]),
    ),
    "plateau": ("Plateau", training_lines(late(0.008)), training_lines(late(0.012))),
    "plateau, flat at the end of the schedule": (
        "Plateau",
        training_lines(late(0.0), lr=[5e-4] * 29 + [1.3e-4]),  # 26 % of the peak
        training_lines(late(0.0), lr=[5e-4] * 29 + [1.2e-4]),
    ),
    "plateau, hidden by scatter": (
        "Plateau",
        training_lines([*late(0.0)[:20], *[4.0, 4.02] * 5]),
        training_lines([*late(0.0)[:20], *[4.0, 4.4] * 5]),
    ),
    "sawtooth": ("climbed", training_lines(waves(0.13, 3)), training_lines(waves(0.09, 3))),
    "sawtooth, but twice": (
        "climbed",
        training_lines(waves(0.13, 4)),
        training_lines(waves(0.13, 2)),
    ),
    "sawtooth, but of spikes": (
        "climbed",
        training_lines(waves(0.13, 3), spikes=2),
        training_lines(waves(0.13, 3), spikes=3),
    ),
    "divergence": (
        "diverges",
        training_lines(learning(40, end=4) + [4.6] * 10),
        training_lines(learning(40, end=4) + [4.3] * 10, lr=cosine(50)),
    ),
    "divergence, but of an epoch's last step": (
        "diverges",
        training_lines([*learning(40, end=4), 6.0, 6.0, 6.0]),
        [*training_lines(learning(40, end=4)), training_lines([6.0])[0] | {"tokens": 40_100}],
    ),
    "divergence, of few lines": (
        "diverges",
        training_lines([8.5, 7.0, 7.5, 8.41]),
        training_lines([8.5, 7.0, 7.5, 8.39]),
    ),
    "worse validation": (
        "The run made the model worse",
        [*training_lines([2.0, 2.0]), evaluation(0, 2.0), evaluation(20, 2.021)],
        [*training_lines([2.0, 2.0]), evaluation(0, 2.0), evaluation(20, 2.019)],
    ),
    "validation rises again, and training does not fall": (
        "The validation loss rose again",
        [*validated(6.1, [6.9, 6.0, 6.3, 6.61]), *training_lines([6.1])],
        [*validated(6.1, [6.9, 6.0, 6.3, 6.59]), *training_lines([6.1])],
    ),
    "a validation set that gets worse": (
        "zh from 3.000 to 3.310",
        by_set(3.0, 3.31),
        by_set(3.0, 3.29),
    ),
    "not a number": (
        "The validation loss is not finite at step 400",
        [*validated(4.0, [5.0, 4.5, 4.2]), {"step": 400, "val_loss": None}],
        validated(4.0, [5.0, 4.5, 4.2, 4.1]),
    ),
    "a test that is not a number": (
        "The test loss is not finite",
        [*validated(4.0, [5.0, 4.5, 4.2]), {"step": 400, "test_loss": None}],
        [*validated(4.0, [5.0, 4.5, 4.2]), {"step": 400, "test_loss": 4.2}],
    ),
    "test": (
        "The test loss is 4.630, the best validation loss 4.200, far from it",
        [*validated(4.0, [5.0, 4.5, 4.2]), {"step": 400, "test_loss": 4.63}],
        [*validated(4.0, [5.0, 4.5, 4.2]), {"step": 400, "test_loss": 4.61}],
    ),
    "most updates skipped": ("most of the run", counted("skipped", 301), counted("skipped", 300)),
    "over-fitting": (
        "Over-fitting",
        validated(3.9, [5.0, 4.0, 4.03, 4.05]),
        validated(3.9, [5.0, 4.0, 4.03, 4.03]),
    ),
    "over-fitting, but training does not fall": (
        "Over-fitting",
        validated(5.9, [6.3, 6.2, 6.25, 6.3]),
        validated(6.1, [6.3, 6.2, 6.25, 6.3]),
    ),
    "gap": (
        "a gap of",  # the training loss at step 400 is a mean of three lines, 4.051
        validated(4.0, [5.8, 5.3, 4.9, 4.50]),
        validated(4.0, [5.8, 5.3, 4.9, 4.42]),
    ),
    "gradient too small": (
        "below 0.01",
        training_lines(learning(), grad_norm=0.009),
        training_lines(learning(), grad_norm=0.011),
    ),
    "gradient huge": (
        "above 10",
        training_lines(learning(), grad_norm=11.0),
        training_lines(learning(), grad_norm=[158.0] * 5 + [0.9] * 55),
    ),
    "skipped": ("were skipped", counted("skipped", 1), counted("skipped", 0)),
    "spikes": ("The loss spiked", counted("spikes", 2), counted("spikes", 1)),
    "spikes, but in many steps": (
        "The loss spiked",
        counted("spikes", 7, n=600),
        counted("spikes", 6, n=600),
    ),
    "dead expert": ("Dead expert", experts(0.0024), experts(0.0026)),
    "starved expert": ("Starved expert", experts(0.06), experts(0.064)),
}


def findings(metrics, vocab_size=None, n_routed_experts=0):
    """The texts of what stands out."""
    found = find_all(metrics, vocab_size, n_routed_experts)
    return [finding.text for finding in found if finding.stands_out]


@pytest.mark.parametrize("case", CASES)
def test_what_stands_out_is_found_and_what_nearly_does_is_not(case):
    words, shown, near_miss = CASES[case]
    found = findings(shown, VOCAB, n_routed_experts=4)
    assert sum(words in text for text in found) == 1, found
    nearly = findings(near_miss, VOCAB, n_routed_experts=4)
    assert not any(words in text for text in nearly), nearly


TUNED_BADLY = [*training_lines([1.9, 2.0, 2.2, 2.5]), evaluation(0, 2.0), evaluation(40, 2.6)]
PRETRAINED_BADLY = [
    *training_lines([8.76 - 0.27 * i / 29 for i in range(30)], grad_norm=12.0, skipped=1),
    *(evaluation(step, loss) for step, loss in ((0, 8.78), (300, 8.49))),
]


@pytest.mark.parametrize(
    ("metrics", "from_scratch", "words"),
    [
        (TUNED_BADLY, False, ("worse", "2.600", "2.000")),
        # A student's loss holds its teacher's part; what it makes of the data is another figure.
        ([m | {"kl": 0.5, "cross_entropy": 2.0} if "loss" in m else m for m in TUNED_BADLY],
         False, ("worse", "2.600", "2.000")),
        ([*TUNED_BADLY[:5], evaluation(20, 1.8), TUNED_BADLY[5]], False,
         ("worse", "2.600", "2.000", "of step 20 with 1.800")),
        (training_lines([2.0, 2.2, 2.5, 2.6], grad_norm=12.0), False, ("2.60", "2.00")),
        (PRETRAINED_BADLY, True, ("8.5", "8.76")),
        (PRETRAINED_BADLY[:30:4], True, ("8.5", "8.76")),
        (counted("skipped", 500), True, ("500 of 600 updates",)),
        ([*HEALTHY, {"step": 601, "val_loss": None}], True, ("validation", "not finite")),
    ],
    ids=["tuning", "distillation", "best before", "no validation", "pretraining", "few lines",
         "skipped", "not finite"],
)  # fmt: skip
def test_what_did_harm_comes_first(tmp_path, no_picture, metrics, from_scratch, words):
    first, *others = findings(metrics, VOCAB if from_scratch else None)
    assert all(word in first for word in words), first
    assert not any(all(word in other for word in words) for other in others)
    folder = write_metrics(tmp_path, metrics)
    text = report(folder, from_weight="none" if from_scratch else "pretrain")[1]
    assert section(text, "What stands out").splitlines()[0] == f"- {first}"


def test_tuning_that_helps_a_little_or_much_has_no_finding():
    for end in (0.0, 0.5, 1.6, 1.99, 2.0, 2.01):
        lines = training_lines([2.0 + (end - 2.0) * i / 5 for i in range(6)])
        metrics = [*lines, evaluation(0, 2.0), evaluation(60, end)]
        metrics += [evaluation(60, end + 0.002)] if end < 1 else []  # next to nothing
        assert findings(metrics) == []


def test_few_lines_of_small_batches_scatter_without_a_finding():
    for seed in range(200):
        dice = random.Random(seed)
        lines = training_lines([2.0 * dice.gauss(1, 0.04) for _ in range(dice.choice([2, 5, 11]))])
        assert findings(lines) == [], seed


def test_in_a_healthy_run_nothing_stands_out():
    assert findings(HEALTHY, VOCAB) == []
    balanced = [line | {"expert_load_min": 0.2, "expert_load_max": 0.3} for line in HEALTHY]
    assert findings(balanced, VOCAB, n_routed_experts=4) == []


def test_scatter_alone_is_no_finding():
    for seed in range(50):
        dice = random.Random(seed)
        n = dice.choice([4, 7, 11, 12, 30, 120, 1000])
        losses = [loss * dice.gauss(1, 0.01) for loss in learning(n)]
        epoch = [2 * i // n for i in range(n)]
        lines = training_lines(losses, epoch=epoch, lr=cosine(n))
        assert findings(lines, VOCAB) == [], (seed, n)


def test_continued_training_is_not_held_against_an_untrained_model():
    lines = training_lines([9.8, *learning(59, first=3.4, end=2.8)])
    assert not any("first loss" in text for text in findings(lines))
    assert any("first loss" in text for text in findings(lines, VOCAB))


@pytest.mark.parametrize("metrics", [[], [{"test_loss": 3.0}], [evaluation(10, 5.0)]])
def test_metrics_without_training_lines_say_nothing(metrics):
    assert findings(metrics, VOCAB, n_routed_experts=4) == []


def test_figures_that_were_not_finite_are_passed_over():
    lines = training_lines(learning())
    lines[30] |= {"loss": None, "grad_norm": None, "skipped": 10}
    lines[31:] = [line | {"skipped": 10} for line in lines[31:]]
    found = findings(lines, VOCAB)
    assert len(found) == 1 and found[0].startswith("10 of 600 updates were skipped")


def write_metrics(folder, metrics):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_cut_off_last_line_is_left_out(tmp_path):
    lines = training_lines([8.0, 7.0, 6.0])
    path = write_metrics(tmp_path, lines) / "metrics.jsonl"
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for length in range(start, len(whole) + 1):
        path.write_bytes(whole[:length])
        complete = length >= len(whole) - 1  # all but the newline is enough
        assert read_metrics(path) == (lines if complete else lines[:2])
    path.write_bytes(whole[: start + 20] + b"\0" * 40)  # as a power cut may leave it
    assert read_metrics(path) == lines[:2]


@pytest.mark.parametrize("bad", [b'{"step": 1', b"", b"3", b"[1]", b"\xff"])
def test_a_damaged_line_elsewhere_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    with pytest.raises(ValueError) as error:
        read_metrics(path)
    assert str(error.value) == f"{path}:2: not a JSON object"


def png_size(path):
    """Width and height that a PNG file states (https://www.w3.org/TR/png/#11IHDR)."""
    contents = path.read_bytes()
    assert contents[:8] == b"\x89PNG\r\n\x1a\n" and contents[12:16] == b"IHDR"
    assert contents[-8:-4] == b"IEND"
    return struct.unpack(">II", contents[16:24])


@pytest.fixture
def figures(monkeypatch):
    """The figures that the test draws; to make a PNG of each would take long."""
    drawn = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    return drawn


@pytest.fixture
def no_picture(monkeypatch):
    """Reports are written as without matplotlib, which takes less time."""

    def absent(*args):
        raise ImportError

    monkeypatch.setattr("diagnosis.report.draw_curves", absent)


def points(line):
    return list(zip(*(axis.tolist() for axis in line.get_data()), strict=True))


def test_the_four_panels_show_the_figures(tmp_path, figures):
    metrics = training_lines([8.0, 7.0, 6.5], lr=[1e-4, 2e-4, 3e-4], grad_norm=[4.0, 0.0, None])
    metrics.insert(2, evaluation(20, 6.9))
    draw_curves({"run": metrics}, tmp_path / "curves.png")
    loss, validation, lr, grad_norm = figures[0].axes
    assert points(loss.lines[0]) == [(1, 8.0), (2, 7.0), (3, 6.5)]  # thousand tokens
    assert points(validation.lines[0]) == [(2, 6.9)]
    assert points(lr.lines[0]) == [(1, 1e-4), (2, 2e-4), (3, 3e-4)]
    assert points(grad_norm.lines[0]) == [(1, 4.0), (2, 0.0)]
    assert lr.get_xlabel() == "thousand tokens"
    assert figures[0].legends == []


def test_different_runs_give_different_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = []
    for losses in ([8.0, 7.0], [8.0, 6.0], []):
        draw_curves({"run": training_lines(losses)}, tmp_path / "curves.png")
        assert png_size(tmp_path / "curves.png") == (1000, 700)
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert len(set(pictures)) == 3


def test_runs_with_other_tokenizers_are_compared_in_bits_per_byte(tmp_path, figures):
    one = [*training_lines([8, 7]), evaluation(20, 6.0)]
    other = [*training_lines([8, 7]), evaluation(20, 6.0, val_bits_per_byte=3.5)]
    draw_curves({"one": one, "two": one}, tmp_path / "same.png")
    draw_curves({"one": one, "two": other}, tmp_path / "other.png")
    same, different = (figure.axes[1] for figure in figures)
    assert [points(line) for line in same.lines] == [[(2, 6.0)], [(2, 6.0)]]
    assert "nats" in same.get_title()
    assert [points(line) for line in different.lines] == [[(2, 3.0)], [(2, 3.5)]]
    assert "bits per byte" in different.get_title()


def test_validation_sets_are_drawn_one_by_one(tmp_path, figures):
    by_set = {"val_loss/prose": 5.0, "val_loss/_code": 7.0}
    metrics = [*training_lines([8, 7]), evaluation(20, 6.0, **by_set)]
    draw_curves({"run": metrics}, tmp_path / "curves.png")
    panel = figures[0].axes[1]
    assert [points(line) for line in panel.lines] == [[(2, 6.0)], [(2, 7.0)], [(2, 5.0)]]
    legend = [text.get_text().strip() for text in panel.get_legend().get_texts()]
    assert legend == ["all together", "_code", "prose"]


def test_a_peak_does_not_flatten_the_loss(tmp_path, figures):
    losses = learning()
    draw_curves({"run": training_lines(losses)}, tmp_path / "curves.png")
    losses[40] = 400.0
    draw_curves({"run": training_lines(losses)}, tmp_path / "curves.png")
    without, with_peak = (figure.axes[0] for figure in figures)
    assert "peaks" not in without.get_title() and without.get_ylim()[1] > 8.5
    low, high = with_peak.get_ylim()
    assert "peaks up to 400" in with_peak.get_title() and 2 < low < 3 and 8.5 < high < 20


def test_a_picture_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure

    def full_disk(self, file, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    (tmp_path / "curves.png").write_bytes(b"older")
    with pytest.raises(OSError, match="No space left"):
        draw_curves({"run": HEALTHY}, tmp_path / "curves.png")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("curves.png", b"older")
    ]


def report(folder, ending="finished", from_weight="none"):
    """Write the report of a run; the line that is printed, and the report's text."""
    config = folder / "config.json"
    if not config.exists():
        flags = {"from_weight": from_weight}
        contents = {"arguments": flags, "vocab_size": VOCAB, "ending": ending}
        config.write_text(json.dumps(contents), encoding="utf-8")
    line = write_report(folder)
    return line, (folder / "report.md").read_bytes().decode("utf-8")


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip()


def rows(text):
    """The cells of a report's key figures."""
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return dict(line.strip("| ").split(" | ", 1) for line in lines[2:])


def test_the_report_of_a_healthy_run(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = [*HEALTHY, {"test_loss": 3.2, "test_perplexity": 24.53, "test_bits_per_byte": 1.6}]
    folder = write_metrics(tmp_path / "pretrain_512", metrics)
    line, text = report(folder, "finished")
    assert line == f"{folder / 'report.md'}: nothing stands out"
    assert text.startswith("# pretrain_512\n\nEnded: finished.\n")
    assert section(text, "What stands out") == "Nothing stands out."
    assert "0.5" in section(text, "What is as it should be")
    best = 1.01 * learning()[-1]
    assert rows(text) == {
        "optimizer steps": "600",
        "target tokens": "60,000",
        "training time": "0:02:00",
        "tokens per second": "500",
        "first loss": f"{HEALTHY[0]['loss']:.4f} (up to step 10)",
        "last loss": f"{HEALTHY[59]['loss']:.4f}",
        "memory": "1.50 GB",
        "best validation": f"{best:.4f}, perplexity {math.exp(best):.2f},"
        f" bits per byte {best / 2:.4f} (step 600)",
        "test": "3.2000, perplexity 24.53, bits per byte 1.6000",
    }
    assert "](curves.png)" in text and png_size(folder / "curves.png") == (1000, 700)
    names = {"config.json", "metrics.jsonl", "report.md", "curves.png"}
    assert {file.name for file in folder.iterdir()} == names


def test_the_report_of_a_run_that_went_wrong(tmp_path, no_picture):
    metrics = validated(3.9, [5.0, 4.0, 4.2, 4.6])
    metrics = [line | {"skipped": 3} if "loss" in line else line for line in metrics]
    folder = write_metrics(tmp_path / "pretrain_64_moe", metrics)
    line, text = report(folder, "stopped by SIGTERM at step 400 of 500; --resume continues it")
    assert line == f"{folder / 'report.md'}: 3 things stand out"
    assert "Ended: stopped by SIGTERM at step 400 of 500; --resume continues it." in text
    found = findings(metrics, VOCAB)
    assert section(text, "What stands out").splitlines() == [f"- {finding}" for finding in found]
    assert rows(text)["best validation"].endswith("(step 200)")
    assert rows(text)["last validation"].startswith("4.6000, perplexity 99.48")


@pytest.mark.parametrize("n", [0, 1, 2, 11])
def test_the_report_of_a_short_run(tmp_path, n, no_picture):
    folder = write_metrics(tmp_path / "run", training_lines([7.6 - 0.1 * i for i in range(n)]))
    line, text = report(folder, "stopped by Ctrl-C")
    assert line.endswith("nothing stands out")
    assert f"from 12 training lines on; this run has {n}." in section(text, "What stands out")
    assert rows(text).get("optimizer steps") == (str(10 * n) if n else None)
    assert not {"nan", "inf", "None"} & set(text.replace(",", " ").split())


def test_the_report_by_validation_set(tmp_path, no_picture):
    by_set = {"val_loss/prose": 5.0, "val_perplexity/prose": 148.413, "val_bits_per_byte/prose": 2}
    metrics = [*training_lines([8, 7]), evaluation(20, 6.0, **by_set, **{"val_loss/a|b": 7.0})]
    text = report(write_metrics(tmp_path, metrics))[1]
    assert section(text, "By validation set").splitlines() == [
        "| validation set | at step 20 |",
        "| --- | --- |",
        "| prose | 5.0000, perplexity 148.41, bits per byte 2.0000 |",
        "| a\\|b | 7.0000 |",
    ]


def started(text):
    """The command under "How it was started"."""
    return section(text, "How it was started").partition("```bash\n")[2].removesuffix("\n```")


AWKWARD = ["--val_data_path", "prose=my $prose.jsonl", "it's.jsonl", "--use_moe", "--no-packing"]
AWKWARD += ["--learning_rate=1e-3", "--out_dir", "out; ls", "--num_workers", "2", "--epochs", "3"]


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, ["python"]),
        (
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "4"},
            ["torchrun", "--nproc_per_node", "4"],
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"},
            ["torchrun", "--nnodes", "2", "--nproc_per_node", "8"],
        ),
    ],
    ids=["one", "torchrun", "two hosts"],
)
def test_the_report_tells_the_command_as_a_shell_takes_it(
    tmp_path, no_picture, monkeypatch, environment, launcher
):
    """The flags that were given and no others; a shell splits them as they were."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", *AWKWARD])
    write_metrics(tmp_path, HEALTHY)
    arguments = argparse.Namespace(batch_size=32, dtype="bfloat16", min_lr=1e-4)
    write_config(tmp_path / "config.json", arguments, "run", VOCAB)
    text = report(tmp_path)[1]
    assert "Ended: not known; " in text
    add_ending(tmp_path / "config.json", Text("stopped early"))
    text = report(tmp_path)[1]
    assert "Ended: stopped early." in text
    assert "\nWith python 3." in text and "--batch_size" not in text
    assert shlex.split(started(text)) == [*launcher, "train_pretrain.py", *AWKWARD]
    if os.name == "posix":
        show = 'for word do printf "%s\\0" "$word"; done'
        command = f"set -- {started(text)}\n{show}"
        words = subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout
        assert words.decode().split("\0")[:-1] == [*launcher, "train_pretrain.py", *AWKWARD]


def test_without_matplotlib_the_report_says_how_to_get_its_plots(tmp_path, monkeypatch, run):
    folder = write_metrics(tmp_path / "my run", HEALTHY)
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "matplotlib", None)
        curves = section(report(folder)[1], "Curves")
        done = run(folder, "--out", tmp_path / "x.png", script="scripts/report_run.py", code=2)
    assert "pip install -r scripts/requirements.txt" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (
        "pip install -r scripts/plot_requirements.txt\n" in curves and "](curves.png)" not in curves
    )
    assert {file.name for file in folder.iterdir()} == {"config.json", "metrics.jsonl", "report.md"}

    pytest.importorskip("matplotlib")
    python, script, *words = shlex.split(curves.splitlines()[-2])
    assert python == "python"
    assert run(*words, script=script).stdout == f"{folder / 'report.md'}: nothing stands out\n"
    assert png_size(folder / "curves.png") == (1000, 700)


def test_runs_are_drawn_together(tmp_path, run, figures):
    for parent, end in (("a", 3), ("b", 4), ("c", 5)):
        name = "pretrain_512" if parent != "c" else "pretrain_64"
        write_metrics(tmp_path / parent / name, training_lines(learning(end=end)))
    folders = [tmp_path / "a" / "pretrain_512", tmp_path / "b" / "pretrain_512"]
    folders.append(tmp_path / "c" / "pretrain_64")
    out = tmp_path / "new folder" / "curves.png"
    done = run(*folders, "--out", out, script="scripts/report_run.py")
    assert done.stdout == f"{out}\n" and out.is_file()
    run(*folders[1:], "--out", out, script="scripts/report_run.py")
    ends = [points(line)[-1] for line in figures[0].axes[0].lines[:3]]
    assert ends == [(60, pytest.approx(end)) for end in (3, 4, 5)]
    shown = [
        [text.get_text().strip() for text in figure.legends[0].get_texts()] for figure in figures
    ]
    assert shown == [[folder.as_posix() for folder in folders], ["pretrain_512", "pretrain_64"]]


@pytest.mark.parametrize(
    ("tokenizer", "scores", "losses", "unit"),
    [
        ("other", {"val_bits_per_byte": 3.0}, [4.0, 3.5], "bits per byte"),
        ("other", {"val_bits_per_byte": 1.5}, [2.0, 1.75], "bits per byte"),
        ("other", {"val_bits_per_byte": None}, [8, 7], "nats per token of different tokenizers"),
        ("own", {"val_bits_per_byte": 1.5}, [8, 7], "(nats per token)"),
    ],
)
def test_runs_with_other_tokenizers_train_in_bits_per_byte(
    tmp_path, run, figures, tokenizer, scores, losses, unit
):
    """By the ratio of bits per byte and nats per token in the run's validation: half, here."""
    folders = []
    for name, more in (("own", {}), (tokenizer, scores)):
        folder = tmp_path / str(len(folders)) / "pretrain_512"
        folders.append(
            write_metrics(folder, [*training_lines([8, 7]), evaluation(20, 6.0, **more)])
        )
        config = {"vocab_size": VOCAB, "arguments": {"tokenizer_path": name}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run(*folders, "--out", tmp_path / "curves.png", script="scripts/report_run.py")
    panel = figures[0].axes[0]
    assert [[y for _, y in points(line)] for line in panel.lines[1:2]] == [losses]
    assert unit in panel.get_title()


def test_a_folder_of_an_older_release_has_a_report(tmp_path, no_picture):
    """Its config.json lacks what is newer than the release; or there is none."""
    folder = write_metrics(tmp_path / "run", training_lines([12.0, *learning(40)]))
    for config in (None, {"arguments": {"from_weight": "none"}}):
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert write_report(folder).endswith("nothing stands out")
        assert "## How it was started" not in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("run_name", "out", "place", "reason"),
    [
        ("nowhere", "x.png", "nowhere/metrics.jsonl", "No such file"),
        ("damaged", "x.png", "damaged/metrics.jsonl:1", "not a JSON object"),
        ("empty", "x.png", "empty/metrics.jsonl", "holds no training line yet"),
        ("good", "x.pdf", "--out x.pdf", "must end in .png"),
        ("good", "folder.png", "--out folder.png", ""),
        ("good", "damaged/metrics.jsonl/x.png", "--out damaged/metrics.jsonl/x.png", ""),
    ],
)
def test_report_run_names_mistakes_in_one_line(tmp_path, run, run_name, out, place, reason):
    pytest.importorskip("matplotlib")
    for name, contents in {
        "damaged": "{\n",
        "empty": "",
        "good": '{"loss": 1, "tokens": 1}\n',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(contents, encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = [tmp_path / run_name, "--out", tmp_path / out]
    done = run(*words, script="scripts/report_run.py", code=2)
    flag, path = ("--out ", place[6:]) if place.startswith("--out ") else ("", place)
    assert done.stderr.startswith(f"report_run.py: error: {flag}{tmp_path / path}: {reason}")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
