"""--tracker: the figures that wandb, SwanLab and TensorBoard get are those of metrics.jsonl."""

import json
import sys
from collections import defaultdict
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from interruptions import SHAPE, write_texts
from test_samples import samples

from training.resume import TrainState

WORDS = [*SHAPE, "--max_seq_len", 64, "--batch_size", 4, "--val_ratio", 0.2, "--max_steps", 6]
WORDS += ["--eval_interval", 3, "--save_interval", 3, "--log_interval", 2]

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "train.jsonl", 20)


class FakeService(SimpleNamespace):
    """Stands for wandb or swanlab, which are used alike: records its calls."""

    errors = SimpleNamespace(Error=OSError)

    def __init__(self, name):
        super().__init__(__name__=name, id="abc", begun=[], logged=[], finished=0)

    def init(self, **about):
        self.begun.append(about)
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1

    def Table(self, columns, data):
        return [tuple(row) for row in data]

    def Text(self, text, caption):
        return caption, text


class FakeWriter:
    """Stands for TensorBoard's SummaryWriter."""

    made = []

    def __init__(self, folder, **options):
        self.folder, self.options, self.closed = folder, options, False
        self.scalars, self.texts = [], []
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((step, name, value))

    def add_text(self, name, text, step):
        self.texts.append((step, name, text))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.setattr(FakeWriter, "made", made := [])
    fake = SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return made


def recorded(out):
    """What metrics.jsonl has, step by step: names and values, without the clock."""
    lines = (out / "logs" / "pretrain_32" / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in lines.splitlines()]
    return [
        (line.pop("step"), {name: value for name, value in line.items() if name != "seconds"})
        for line in found
    ]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_gets_the_figures_and_the_run_continues(run, texts, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, fake := FakeService(name))
    words = [*WORDS, "--data_path", texts, "--out_dir", tmp_path, "--tracker", name]
    words += ["--wandb_project", "mine"]
    run(*words, "--sample_prompts", "red")
    figures = [(step, some) for step, some in fake.logged if "samples" not in some]
    assert figures == recorded(tmp_path) and len(figures) > 4
    shown = [(step, *row) for step, some in fake.logged for row in some.get("samples", ())]
    assert [(str(step), repr(prompt), repr(text)) for step, prompt, text in shown] == samples(
        tmp_path
    )
    (begun,) = fake.begun
    assert (begun["project"], begun["name"], begun["id"]) == ("mine", "pretrain_32", None)
    assert begun["config"]["batch_size"] == 4
    run(*words, "--resume", "--max_steps", 9)
    assert fake.begun[1]["id"] == "abc" and fake.begun[1]["resume"] == "allow"
    assert fake.finished == 2 and fake.logged[-1][0] == 9


def test_what_is_not_finite_is_left_out_for_swanlab(run, texts, tmp_path, monkeypatch):
    """Its parser reports None as an error; for wandb it is a gap."""
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "torch.nn.functional.cross_entropy", lambda *args, **how: loss(*args, **how) * torch.nan
    )
    for name in ("wandb", "swanlab"):
        monkeypatch.setitem(sys.modules, name, FakeService(name))
        out = tmp_path / name
        run(*WORDS, "--data_path", texts, "--out_dir", out, "--tracker", name, "--no-packing")
    figures = [[some for _, some in sys.modules[name].logged] for name in ("wandb", "swanlab")]
    assert any(None in some.values() for some in figures[0])
    wanted = [{k: v for k, v in some.items() if v is not None} for some in figures[0]]
    assert [some.keys() for some in figures[1]] == [some.keys() for some in wanted]


def test_tensorboard_gets_the_figures(run, texts, tmp_path, writers):
    words = [*WORDS, "--data_path", texts, "--out_dir", tmp_path, "--tracker", "tensorboard"]
    run(*words, "--sample_prompts", "red")
    (writer,) = writers
    assert writer.folder == str(tmp_path / "logs" / "pretrain_32" / "tensorboard")
    assert writer.options["purge_step"] is None and writer.closed
    wanted = [(step, *item) for step, some in recorded(tmp_path) for item in some.items()]
    assert writer.scalars == wanted
    (_, _, config), *shown = writer.texts
    assert '"batch_size": 4' in config
    found = [(str(step), *text.strip().split(" → ")) for step, _, text in shown]
    assert found == samples(tmp_path)
    run(*words, "--resume", "--max_steps", 9)
    assert writers[1].options["purge_step"] == 7
    assert {step for step, *_ in writers[1].scalars} == {8, 9}


def test_tensorboard_s_own_files(run, texts, tmp_path):
    """Read back by TensorBoard; those of an earlier run are moved with it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*WORDS, "--data_path", texts, "--out_dir", tmp_path, "--tracker", "tensorboard"]
    run(*words)
    run(*words)
    events = EventAccumulator(str(tmp_path / "logs" / "pretrain_32" / "tensorboard")).Reload()
    found = defaultdict(dict)
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found[event.step][name] = event.value
    wanted = defaultdict(dict)
    for step, some in recorded(tmp_path):
        wanted[step] |= some
    assert found.keys() == wanted.keys()
    for step, some in wanted.items():
        assert found[step] == pytest.approx(some, rel=1e-6)
    assert len(list(tmp_path.glob("**/events.out.tfevents.*"))) == 2


@pytest.mark.parametrize("name", ["wandb", "swanlab", "tensorboard"])
def test_a_package_that_is_missing_is_named(run, texts, tmp_path, monkeypatch, name):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    words = [*WORDS, "--data_path", texts, "--out_dir", tmp_path / "out", "--tracker", name]
    error = run(*words, code=2).stderr
    assert f"--tracker {name}: {name} is not installed; pip install {name}\n" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("**/metrics.jsonl")) and not list(tmp_path.glob("**/*.pth"))


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_that_cannot_be_had_is_named(run, texts, tmp_path, monkeypatch, name):
    def refuse(**about):
        raise OSError("no account.")

    fake = SimpleNamespace(__name__=name, init=refuse, errors=FakeService.errors)
    monkeypatch.setitem(sys.modules, name, fake)
    words = [*WORDS, "--data_path", texts, "--out_dir", tmp_path / "out", "--tracker", name]
    error = run(*words, code=2).stderr
    assert f"--tracker {name}: no account." in error and error.count("\n") == 1
    assert f"{name.upper()}_MODE=offline" in error


def test_two_trackers_are_refused(run, texts):
    words = [*WORDS, "--data_path", texts, "--use_wandb", "--tracker", "swanlab"]
    assert "--use_wandb and --tracker: give one of them" in run(*words, code=2).stderr


def test_without_the_flag_nothing_is_imported(run, texts, tmp_path, monkeypatch):
    for module in ("wandb", "swanlab", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    run(*WORDS, "--data_path", texts, "--out_dir", tmp_path)


def test_the_run_of_an_older_resume_file_continues():
    values = asdict(TrainState(run_id="r", rows_per_step=1))
    del values["tracker_ids"]
    assert TrainState.from_dict({**values, "wandb_id": "abc"}).tracker_ids == {"wandb": "abc"}
    assert TrainState.from_dict({**values, "wandb_id": None}).tracker_ids == {}
