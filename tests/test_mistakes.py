"""What users get wrong: one line on stderr that names it, exit status 2, nothing overwritten."""

import gzip
import json
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from model import LMConfig, MiniMindLM, load_weights, save_weights

SHAPE = ["--dim", "32", "--n_layers", "2", "--device", "cpu", "--max_seq_len", "32"]
SMALL = LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=40, multiple_of=8)


@pytest.fixture(autouse=True, scope="module")
def no_matplotlib():
    """Runs do without it, and drawing takes longer than everything else in a small one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib.figure", None)
        yield


class Place(NamedTuple):
    """Where a user stands: a folder of their own, good data, and the folder of an earlier run."""

    folder: Path
    data: Path
    out: Path

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    def weights(self) -> bytes:
        """What the earlier run saved."""
        return (self.out / "pretrain_32.pth").read_bytes()


def lines_of(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def earlier(run, tmp_path_factory):
    """Data, and a run that was trained on it and has left all the files that a run leaves."""
    folder = tmp_path_factory.mktemp("earlier")
    data = folder / "train.jsonl"
    data.write_text(lines_of(*(f"text number {i}, " * 5 for i in range(20))), encoding="utf-8")
    run(
        *SHAPE, "--data_path", data, "--out_dir", folder / "out", "--val_ratio", 0.2, "--save_best",
        "--batch_size", 2, "--save_interval", 2, "--save_total_limit", 1, "--log_interval", 1,
    )  # fmt: skip
    return Place(folder, data, folder / "out")


@pytest.fixture
def place(earlier, tmp_path):
    """A copy of the earlier run's folder, of its own."""
    return Place(tmp_path, earlier.data, shutil.copytree(earlier.out, tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_earlier_run_left_something_to_lose(earlier):
    names = set(contents(earlier.out))
    assert names > {
        "pretrain_32.pth",
        "pretrain_32.json",
        "pretrain_32_best.pth",
        "pretrain_32_resume.pth",
        "pretrain_32_resume.prev.pth",
        "logs/pretrain_32/metrics.jsonl",
        "logs/pretrain_32/training_log.txt",
        "logs/pretrain_32/config.json",
        "logs/pretrain_32/report.md",
    }
    assert any("_step" in name for name in names)


# Files that are not what they should be.


def data_that_holds(content: bytes | str) -> Callable[[Place], list]:
    return lambda place: ["--data_path", place.file("my.jsonl", content)]


def weights_that_hold(content: Callable[[bytes], bytes]) -> Callable[[Place], list]:
    return lambda place: ["--from_weight", place.file("my.pth", content(place.weights()))]


def with_one_bit_of_a_tensor_changed(whole: bytes) -> bytes:
    """One bit of one number is another; all lengths and names stay."""
    at = whole.index(b"data/0") + 4096  # the first tensor, the embedding, has 819,200 bytes
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


class MakesAFolder:
    """Something that does harm when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def a_pickle_that_runs_code(place: Place) -> list:
    torch.save({"norm.weight": MakesAFolder(place.folder / "harm")}, place.folder / "my.pth")
    return ["--from_weight", place.folder / "my.pth"]


def an_old_pickle_that_runs_code(place: Place) -> list:
    harmful = pickle.dumps({"norm.weight": MakesAFolder(place.folder / "harm")})
    return ["--from_weight", place.file("my.pth", harmful)]


def weights_of_another_size(place: Place) -> list:
    save_weights(place.folder / "my.pth", MiniMindLM(SMALL), SMALL, "pretrain", "?")
    (place.folder / "my.json").unlink()
    return ["--from_weight", place.folder / "my.pth"]


def weights_of_another_tokenizer(place: Place) -> list:
    shape = LMConfig(dim=32, n_layers=2)
    save_weights(place.folder / "my.pth", MiniMindLM(shape), shape, "pretrain", "?")
    return ["--from_weight", place.folder / "my.pth"]


def damaged_weights_in_out_dir(place: Place) -> list:
    (place.out / "pretrain_32.pth").write_bytes(place.weights()[:50_000])
    return []


def damaged_description_in_out_dir(place: Place) -> list:
    (place.out / "pretrain_32.json").write_text("{", encoding="utf-8")
    return []


def best_weights_of_another_size_in_out_dir(place: Place) -> list:
    """What `pretrain_32.pth holds another model: move it` leads to if only that one is moved."""
    (place.out / "pretrain_32.pth").unlink()
    (place.out / "pretrain_32.json").unlink()
    return ["--n_layers", "3", "--val_ratio", "0.2", "--save_best"]


def a_file_for_a_folder(name: str) -> Callable[[Place], list]:
    def words(place: Place) -> list:
        return [name, place.file("file", "text")]

    return words


def below_a_file(name: str) -> Callable[[Place], list]:
    def words(place: Place) -> list:
        return [name, place.file("file", "text") / "below"]

    return words


def a_file_in_place_of_the_logs(place: Place) -> list:
    shutil.rmtree(place.out / "logs")
    (place.out / "logs").write_text("mine", encoding="utf-8")
    return []


def a_file_in_place_of_the_logs_of_a_run_to_resume(place: Place) -> list:
    return [*a_file_in_place_of_the_logs(place), "--val_ratio", 0.2, "--resume", "--epochs", 3]


def another_width_than_the_unfinished_run_has(place: Place) -> list:
    path = place.out / "pretrain_32_resume.pth"
    contents = torch.load(path, weights_only=True)
    contents["arguments"]["epochs"] = 9
    torch.save(contents, path)
    return ["--resume", "--dim", "64"]


def a_tokenizer_whose(name: str, content: str | None) -> Callable[[Place], list]:
    def words(place: Place) -> list:
        folder = shutil.copytree(
            Path(__file__).parent.parent / "model" / "minimind_tokenizer", place.folder / "tok"
        )
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content, encoding="utf-8")
        return ["--tokenizer_path", folder]

    return words


def one_document_to_split(place: Place) -> list:
    return ["--data_path", place.file("my.jsonl", lines_of("one")), "--val_ratio", 0.5]


def two_validation_sets_of_one_name(place: Place) -> list:
    (place.folder / "a").mkdir()
    return ["--val_data_path", place.data, place.folder / "a" / place.data.name]


def an_empty_validation_set(place: Place) -> list:
    return ["--val_data_path", place.data, place.file("my.jsonl", "")]


GOOD, BAD = '{"text": "good"}\n', '{"txet": "bad"}\n'
UNKNOWN = 'no text: its fields are "txet"; nearest: text ("text")'
ARRAY = json.dumps([{"text": "one"}, {"text": "two"}], indent=1)
VALIDATION = "--val_data_path or --val_ratio"

# id, words after the good ones (or what makes them), what the line names.
MISTAKES = [
    # data
    ("data missing", ["--data_path", "nowhere.jsonl"], "nowhere.jsonl"),
    ("data empty", data_that_holds(""), "my.jsonl: is empty"),
    (
        "data gzip",
        data_that_holds(gzip.compress(GOOD.encode())[:-9]),
        "my.jsonl: damaged or cut off",
    ),
    ("data Parquet", data_that_holds(b"PAR1\x15\x04PAR1"), "my.jsonl: broken Parquet"),
    ("data HTML", data_that_holds("<!DOCTYPE html>\n<html></html>"), "my.jsonl: is an HTML page"),
    ("data prose", data_that_holds("Once upon a time.\n"), "my.jsonl: is plain text"),
    ("data UTF-16", data_that_holds(GOOD.encode("utf-16-le")), "UTF-8"),
    (
        "data an array cut off",
        data_that_holds(ARRAY[:-9]),
        "my.jsonl:5: the array is broken or cut off",
    ),
    ("data arrays", data_that_holds('["one"]\n["two"]\n'), "my.jsonl:2: more follows the end"),
    ("data a table", data_that_holds("text,label\ngood,1\n"), "my.jsonl: is a table"),
    ("data without text", data_that_holds(2 * GOOD + BAD), f"my.jsonl:3: {UNKNOWN}"),
    ("data null", data_that_holds(GOOD + '{"text": null}\n'), 'my.jsonl:2: "text" is null'),
    ("data cut off", data_that_holds(GOOD + '{"text": "goo'), "my.jsonl:2: JSON ends too early"),
    (
        "data all bad",
        lambda place: [*data_that_holds(3 * BAD)(place), "--skip_bad_lines", 1],
        "not one good line",
    ),
    (
        "data too bad to skip",
        lambda place: [*data_that_holds(8 * GOOD + BAD)(place), "--skip_bad_lines"],
        "my.jsonl: 1 of 9 lines are bad; --skip_bad_lines 0.12 goes on without them",
    ),
    ("a share of bad lines", ["--skip_bad_lines", "1.5"], "--skip_bad_lines: must be at least 0"),
    ("data not to be split", one_document_to_split, "my.jsonl: one document"),
    ("cache below a file", below_a_file("--cache_dir"), "--cache_dir"),
    ("validation missing", ["--val_data_path", "nowhere.jsonl"], "nowhere.jsonl"),
    ("validation missing, named", ["--val_data_path", "web=nowhere.jsonl"], "nowhere.jsonl"),
    ("validation empty", an_empty_validation_set, "my.jsonl: is empty"),
    ("validation twice", two_validation_sets_of_one_name, "--val_data_path"),
    ("test missing", ["--test_data_path", "nowhere.jsonl"], "nowhere.jsonl"),
    # weights
    ("weights missing", ["--from_weight", "nowhere.pth"], "--from_weight nowhere.pth"),
    ("weights of no stage", ["--from_weight", "full_sft"], "--from_weight full_sft"),
    ("weights a folder", lambda place: ["--from_weight", place.folder], "--from_weight"),
    ("weights cut off", weights_that_hold(lambda whole: whole[:-1000]), "my.pth: "),
    ("weights cut in half", weights_that_hold(lambda whole: whole[: len(whole) // 2]), "my.pth: "),
    ("weights empty", weights_that_hold(lambda whole: b""), "my.pth: "),
    ("weights noise", weights_that_hold(lambda w: random.Random(0).randbytes(9000)), "my.pth: "),
    (
        "weights with a byte changed",
        weights_that_hold(with_one_bit_of_a_tensor_changed),
        "my.pth: dam",
    ),
    ("weights text", weights_that_hold(lambda whole: b"a letter\n"), "my.pth: "),
    ("weights that run code", a_pickle_that_runs_code, "my.pth: refused"),
    ("weights that run code, old", an_old_pickle_that_runs_code, "my.pth: refused"),
    ("weights of another size", weights_of_another_size, "tok_embeddings.weight is (40, 16)"),
    ("weights of another tokenizer", weights_of_another_tokenizer, "--tokenizer_path"),
    # the folder that is written to
    ("out_dir has another size", ["--n_layers", "3"], "pretrain_32.pth"),
    ("out_dir has the best of another size", best_weights_of_another_size_in_out_dir, "_best.pth"),
    ("out_dir has damaged weights", damaged_weights_in_out_dir, "pretrain_32.pth: "),
    ("out_dir has a damaged file", damaged_description_in_out_dir, "pretrain_32.json: "),
    ("out_dir a file", a_file_for_a_folder("--out_dir"), "--out_dir"),
    ("out_dir below a file", below_a_file("--out_dir"), "--out_dir"),
    ("logs a file", a_file_in_place_of_the_logs, "logs"),
    ("logs a file, resumed", a_file_in_place_of_the_logs_of_a_run_to_resume, "logs"),
    ("resume of another size", ["--resume", "--n_layers", "3"], "--n_layers 3"),
    ("resume of another width", another_width_than_the_unfinished_run_has, "--dim"),
    ("resume with another seed", ["--resume", "--seed", "1"], "--seed 1"),
    (
        "resume with other data",
        lambda place: [*data_that_holds(GOOD)(place), "--resume"],
        "--data_path",
    ),
    # device
    ("no GPU", ["--device", "cuda"], "--device cuda"),
    ("not so many GPUs", ["--device", "cuda:99"], "--device cuda:99"),
    ("no such device", ["--device", "nonsense"], "--device nonsense"),
    ("a device that computes nothing", ["--device", "meta"], "--device meta"),
    ("fp16 on a CPU", ["--dtype", "float16"], "--dtype float16"),
    ("no such dtype", ["--dtype", "int8"], "--dtype"),
    ("ddp without torchrun", ["--ddp"], "--ddp"),
    # the tokenizer
    ("tokenizer missing", ["--tokenizer_path", "nowhere"], "--tokenizer_path nowhere"),
    ("tokenizer cut off", a_tokenizer_whose("tokenizer.json", '{"version": "1.0"'), "--tokenizer"),
    ("tokenizer empty", a_tokenizer_whose("tokenizer.json", "{}"), "--tokenizer_path"),
    ("tokenizer's file gone", a_tokenizer_whose("tokenizer.json", None), "--tokenizer_path"),
    ("tokenizer unnamed", a_tokenizer_whose("tokenizer_config.json", "{}"), "--tokenizer_path"),
    ("tokenizer misnamed", a_tokenizer_whose("tokenizer_config.json", "{"), "--tokenizer_path"),
    # shapes
    ("dim not divisible", ["--dim", "100"], "--dim 100"),
    ("dim of odd heads", ["--dim", "24"], "--dim 24"),
    ("n_layers 0", ["--n_layers", "0"], "--n_layers"),
    ("dim beyond all memory", ["--dim", "8000000000000"], "memory"),
    ("max_seq_len above the model's", ["--max_seq_len", "9000"], "--max_seq_len 9000"),
    ("max_seq_len 1", ["--max_seq_len", "1"], "--max_seq_len"),
    ("dropout 1", ["--dropout", "1"], "--dropout"),
    # numbers
    ("batch_size 0", ["--batch_size", "0"], "--batch_size"),
    ("batch_size a word", ["--batch_size", "many"], "--batch_size"),
    ("accumulation_steps 0", ["--accumulation_steps", "0"], "--accumulation_steps"),
    ("epochs 0", ["--epochs", "0"], "--epochs"),
    ("epochs negative", ["--epochs", "-0.5"], "--epochs"),
    ("no steps", ["--max_steps", "0"], "--max_steps"),
    ("half a step", ["--max_steps", "1.5"], "--max_steps"),
    ("no tokens", ["--max_tokens", "0"], "--max_tokens"),
    ("negative time", ["--max_minutes", "-1"], "--max_minutes"),
    ("endless time", ["--max_minutes", "inf"], "--max_minutes"),
    ("no tokens per parameter", ["--tokens_per_parameter", "0"], "--tokens_per_parameter"),
    ("steps for the warm-up alone", ["--max_steps", "9", "--warmup_iters", "9"], "--max_steps"),
    ("less time than it takes to begin", ["--max_minutes", "1e-6"], "--max_minutes"),
    ("an unknown size", ["--size", "7b"], "--size"),
    ("size and depth", ["--size", "5m", "--depth", "4"], "--depth"),
    ("depth 0", ["--depth", "0"], "--depth"),
    (
        "prompts in a file that is not there",
        ["--val_ratio", "0.1", "--sample_prompts", "no.txt"],
        "--sample_prompts",
    ),
    ("an empty prompt", ["--val_ratio", "0.1", "--sample_prompts", " "], "--sample_prompts"),
    ("prompts without validation", ["--sample_prompts", "red"], "--sample_prompts"),
    (
        "a prompt that fills the context",
        ["--val_ratio", "0.1", "--sample_prompts", "red " * 9000],
        "--sample_prompts",
    ),
    ("learning_rate nan", ["--learning_rate", "nan"], "--learning_rate"),
    ("learning_rate negative", ["--learning_rate", "-1e-4"], "--learning_rate"),
    ("learning_rate 0", ["--learning_rate", "0"], "--learning_rate"),
    ("learning_rate inf", ["--learning_rate", "inf"], "--learning_rate"),
    ("min_lr above", ["--min_lr", "1"], "--min_lr 1 "),
    ("warmup_ratio 1", ["--warmup_ratio", "1"], "--warmup_ratio"),
    ("weight_decay negative", ["--weight_decay", "-0.1"], "--weight_decay"),
    ("grad_clip 0", ["--grad_clip", "0"], "--grad_clip"),
    ("seed too large", ["--seed", "99999999999999999999999"], "--seed"),
    ("seed negative", ["--seed", "-1"], "--seed"),
    ("val_ratio 0", ["--val_ratio", "0"], "--val_ratio"),
    ("val_ratio 1", ["--val_ratio", "1"], "--val_ratio"),
    ("val_ratio in percent", ["--val_ratio", "5"], "--val_ratio"),
    ("log_interval 0", ["--log_interval", "0"], "--log_interval"),
    ("save_interval 0", ["--save_interval", "0"], "--save_interval"),
    ("max_bad_steps 0", ["--max_bad_steps", "0"], "--max_bad_steps"),
    ("gpu_price negative", ["--gpu_price", "-2"], "--gpu_price"),
    # flags
    ("a typo", ["--batch_sise", "4"], "--batch_size?"),
    ("a flag shortened", ["--batch", "4"], "--batch"),
    ("a stray word", ["stray"], "stray"),
    ("a value left out", ["--epochs"], "--epochs"),
    ("a switch with a strange word", ["--use_moe", "maybe"], "--use_moe"),
    ("a negation with a word", ["--no-use_moe", "True"], "--no-use_moe"),
    ("no such decay", ["--lr_decay", "exponential"], "--lr_decay"),
    # flags that need, or exclude, each other
    ("two warm-ups", ["--warmup_iters", "5", "--warmup_ratio", "0.1"], "--warmup_iters"),
    (
        "two ways to validate",
        lambda place: ["--val_ratio", "0.1", "--val_data_path", place.data],
        "--val_ratio and --val_data_path",
    ),
    ("best of nothing", ["--save_best"], VALIDATION),
    ("stop by nothing", ["--early_stopping_patience", "2"], VALIDATION),
    ("evaluate nothing", ["--eval_interval", "2"], VALIDATION),
]


@pytest.mark.parametrize(
    ("words", "named"), [pytest.param(words, named, id=id) for id, words, named in MISTAKES]
)
def test_mistake(run, place, monkeypatch, words, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = words(place) if callable(words) else words
    before = contents(place.out)
    done = run(*SHAPE, "--data_path", place.data, "--out_dir", place.out, *words, code=2)
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("train_pretrain.py: error: ")
    # Bad lines of data, and flags that --resume cannot change, have a line each, and one that
    # says what to do.
    several = "--skip_bad_lines" in done.stderr or "--resume needs the same" in done.stderr
    assert done.stderr.count("\n") == 1 or several, done.stderr
    assert contents(place.out) == before
    assert not (place.folder / "harm").exists()


def test_at_least_25_mistakes_have_an_id_of_their_own():
    ids = [id for id, _, _ in MISTAKES]
    assert len(set(ids)) == len(ids) > 25


@pytest.mark.parametrize("trap", [a_pickle_that_runs_code, an_old_pickle_that_runs_code])
def test_the_code_in_the_pickles_would_run(place, trap):
    """Else the table would prove nothing."""
    _, path = trap(place)
    with suppress(RuntimeError):  # the older kind is found out to be none after it has run
        torch.load(path, weights_only=False)
    assert (place.folder / "harm").is_dir()


def test_a_resume_file_that_would_run_code_is_refused(run, place):
    resume, previous = (
        place.out / "pretrain_32_resume.pth",
        place.out / "pretrain_32_resume.prev.pth",
    )
    torch.save({"format": 1, "state": MakesAFolder(place.folder / "harm")}, resume)
    torch.save({"format": 1, "state": MakesAFolder(place.folder / "harm")}, previous)
    done = run(
        *SHAPE, "--data_path", place.data, "--out_dir", place.out, "--val_ratio", 0.2, "--resume",
        "--dry_run",
    )  # fmt: skip
    assert f"{resume}: refused" in done.stdout
    assert f"{previous}: refused" in done.stdout
    assert "a new run starts" in done.stdout
    assert not (place.folder / "harm").exists()


def test_each_bad_line_is_named_up_to_ten(run, place):
    path = place.file("my.jsonl", GOOD + 12 * BAD + GOOD)
    done = run(*SHAPE, "--data_path", path, "--out_dir", place.out, code=2)
    first, *others, last = done.stderr.splitlines()
    assert first.endswith(f"{path}:2: {UNKNOWN}")
    assert others == [f"{path}:{n}: {UNKNOWN}" for n in range(3, 12)]
    hint = "scripts/check_data.py shows what it holds"
    assert last == f"{path}: 12 of 14 lines are bad, most of the file; {hint}"
    new = ["--data_path", path, "--out_dir", place.folder / "new"]
    assert run(*SHAPE, *new, "--skip_bad_lines", code=2).stderr == done.stderr
    done = run(*SHAPE, *new, "--skip_bad_lines", 0.9)
    assert "12 bad lines" in done.stdout
    assert (place.folder / "new" / "pretrain_32.pth").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("resume", [[], ["--resume", "--epochs", 3]], ids=["new", "resumed"])
def test_a_disk_that_is_full_from_the_start(run, place, resume):
    """The limit makes every write fail, as a full disk does, where making a file still works."""
    import resource

    before = contents(place.out)
    words = [*SHAPE, "--data_path", place.data, "--out_dir", place.out, "--val_ratio", 0.2, *resume]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        done = run(*words, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "--out_dir" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(place.out) == before


def test_wandb_that_is_not_installed(run, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = contents(place.out)
    words = ["--data_path", place.data, "--out_dir", place.out, "--use_wandb"]
    done = run(*SHAPE, *words, code=2)
    assert "--use_wandb" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(place.out) == before


def test_under_torchrun_one_process_speaks(run, place):
    """It is the only one that looked at the weights; the other waits, and torchrun ends it."""
    words = ["--from_weight", place.file("my.pth", "a letter\n")]
    before = contents(place.out)
    done = run(
        *SHAPE, "--data_path", place.data, "--out_dir", place.out, *words, processes=2, code=1
    )
    lines = [line for line in done.stderr.splitlines() if "train_pretrain.py: error" in line]
    assert len(lines) == 1
    assert "my.pth: " in lines[0]
    assert 'train_pretrain.py", line' not in done.stderr  # the only traceback is torchrun's own
    assert contents(place.out) == before


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.manual_seed(0)
    save_weights(path, MiniMindLM(SMALL), SMALL, "pretrain", "abc")
    return path


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_weights_with_any_bit_changed(small_weights, data):
    """They are refused with a reason, or the bit was one that means nothing."""
    whole = small_weights.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path = small_weights.with_name("changed.pth")
    path.write_bytes(changed)
    model, expected = MiniMindLM(SMALL), torch.load(small_weights, weights_only=True)
    try:
        load_weights(path, model, "abc")
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
    else:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
