import argparse
import contextlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from interruptions import SHAPE, killed, read_metrics, write_texts

from common import BooleanFlag, make_parser, named_path
from model import LMConfig
from training import Run, find_processes, make_stage_parser
from training.arguments import MOE_DEFAULTS, parse_stage_arguments
from training.shape import settle_shape

ROOT = Path(__file__).resolve().parent.parent


def stage_parser():
    return make_stage_parser(
        "A stage.",
        data_path=Path("data.jsonl"),
        from_weight="none",
        learning_rate=5e-4,
        weight_decay=0.1,
        epochs=1,
        batch_size=32,
        grad_clip=1.0,
        max_seq_len=512,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--use_moe"], True),
        (["--no-use_moe"], False),
        (["--use_moe", "True"], True),
        (["--use_moe", "false"], False),
        (["--use_moe=1"], True),
        (["--use_moe", "--no-use_moe"], False),
        (["--use_moe", "--dim", "64"], True),
    ],
)
def test_switches_are_understood_as_users_write_them(words, expected):
    assert stage_parser().parse_args(words).use_moe is expected


def test_a_switch_that_is_on_can_be_turned_off():
    assert stage_parser().parse_args([]).flash_attn is True
    assert stage_parser().parse_args(["--no-flash_attn"]).flash_attn is False


def test_only_rank_0_prints_a_mistake(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_:
        stage_parser().parse_args(["--epochs", "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == ""


def test_the_defaults_of_pretraining():
    """The figures of the design's table."""
    args = stage_parser().parse_args([])
    assert (args.epochs, args.batch_size, args.accumulation_steps) == (1, 32, 1)
    assert (args.learning_rate, args.weight_decay, args.grad_clip) == (5e-4, 0.1, 1.0)
    assert (args.beta1, args.beta2, args.dropout) == (0.9, 0.95, 0.0)
    assert (args.dim, args.n_layers, args.max_seq_len) == (512, 8, 512)
    assert (args.log_interval, args.save_interval) == (10, 100)
    assert (args.dtype, args.save_dtype, str(args.out_dir)) == ("bfloat16", "float32", "out")


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    args = parse_stage_arguments(stage_parser())
    settle_shape(args, "pretrain", find_processes("cpu", False))
    return args


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        ([], (512, 8, 8, 2, False)),
        (["--size", "26m"], (512, 8, 8, 2, False)),
        (["--depth", "8"], (512, 8, 8, 2, False)),
        (["--size", "2m"], (192, 3, 6, 2, False)),
        (["--size", "104m"], (768, 16, 8, 2, False)),
        (["--size", "moe"], (640, 8, 8, 2, True)),
        # A flag given beside it counts, its default too.
        (["--size", "moe", "--no-use_moe", "--dim", "512"], (512, 8, 8, 2, False)),
        (["--n_heads", "4", "--size", "5m"], (256, 4, 4, 2, False)),
        (["--depth", "12", "--n_kv_heads", "4", "--n_layers", "2"], (768, 2, 8, 4, False)),
    ],
    ids=str,
)
def test_size_and_depth_are_shapes_whose_fields_flags_replace(monkeypatch, words, shape):
    args = parsed(monkeypatch, *words)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe")
    assert tuple(getattr(args, name) for name in names) == shape
    assert args.aux_loss_alpha == (0.1 if args.use_moe else None)


def test_every_depth_is_a_model_whose_heads_are_wide_enough(monkeypatch):
    for depth in range(1, 25):
        args = parsed(monkeypatch, "--depth", str(depth))
        shape = {name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads")}
        config = LMConfig(**shape)
        assert (config.dim, config.n_layers) == (64 * depth, depth) and config.head_dim >= 32


def test_a_budget_takes_the_place_of_the_default_of_epochs(monkeypatch):
    assert parsed(monkeypatch).epochs == 1
    for flag in ("max_steps", "max_tokens", "max_minutes", "tokens_per_parameter"):
        assert parsed(monkeypatch, f"--{flag}", "3").epochs is None
        assert parsed(monkeypatch, f"--{flag}", "3", "--epochs", "0.5").epochs == 0.5


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("news.jsonl", "news", "news.jsonl"),
        ("web/news.jsonl", "news", "web/news.jsonl"),
        ("en=web/news.jsonl", "en", "web/news.jsonl"),
        ("en=a=b.jsonl", "en", "a=b.jsonl"),
        ("web/lr=1/news.jsonl", "news", "web/lr=1/news.jsonl"),
        ("=news.jsonl", "=news", "=news.jsonl"),
        ("en=", "en=", "en="),
    ],
)
def test_validation_sets_are_named_by_hand_or_by_their_file(text, name, path):
    assert named_path(text) == (name, Path(path))


def test_a_file_whose_name_has_an_equals_sign_is_no_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("en=news.jsonl").touch()
    assert named_path("en=news.jsonl") == ("en=news", Path("en=news.jsonl"))


def test_flags_with_a_figure_of_their_own():
    """Without the flag there is no such thing; the flag alone means 3; a number means that."""
    for name in ("early_stopping_patience", "save_total_limit"):
        for words, expected in [([], None), ([f"--{name}"], 3), ([f"--{name}", "5"], 5)]:
            assert getattr(stage_parser().parse_args(words), name) == expected
    assert stage_parser().parse_args([]).early_stopping_min_delta == 1e-4


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ([], 0),
        (["--skip_bad_lines"], 0.1),
        (["--skip_bad_lines", "0"], 0),
        (["--skip_bad_lines", "0.5"], 0.5),
        (["--skip_bad_lines", "1"], 1),
    ],
)
def test_the_share_of_bad_lines_in_every_form(words, share):
    assert stage_parser().parse_args(words).skip_bad_lines == share


@pytest.mark.parametrize("share", ["-0.1", "1.1", "some", "nan", "data.jsonl"])
def test_what_is_no_share_of_bad_lines(share, capsys):
    with pytest.raises(SystemExit):
        stage_parser().parse_args(["--skip_bad_lines", share])
    assert "--skip_bad_lines" in capsys.readouterr().err


def test_several_validation_sets_in_one_flag_or_more():
    for words in (["a=x", "b=y"], ["a=x", "--val_data_path", "b=y"]):
        args = stage_parser().parse_args(["--val_data_path", *words])
        assert args.val_data_path == [("a", Path("x")), ("b", Path("y"))]


def test_help_shows_both_spellings_of_a_switch(capsys):
    parser = make_parser("")
    parser.add_argument("--thing", action=BooleanFlag, default=True, help="does it")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--thing" in (shown := capsys.readouterr().out)
    assert "--no-thing" in shown


# Paths

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (ROOT, ROOT / "scripts", ROOT / "benchmarks")
    for path in folder.glob("*.py")
    if re.search(
        r"(ArgumentParser|make_parser|make_stage_parser)\(", path.read_text(encoding="utf-8")
    )
)
# Flags whose text is no path.
TEXTS = {
    *(
        "--wandb_project",
        "--text_column",
        "--text_template",
        "--separator",
        "--sample_prompts",
        "--device",
        "--host",
        "--endpoint",
        "--api_key",
        "--cors_origin",
    ),
    *("--prompt", "--system", "--text_column", "--text_template", "--separator", "--name"),
    "--vary",  # its values go on to the script
}


class Parsers(Exception):
    """The parser of a script, instead of what it would do with its arguments."""


@pytest.fixture
def parser_of(monkeypatch):
    def stop(parser, *_):
        raise Parsers(parser)

    def get(script):
        path = list(sys.path)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        monkeypatch.setattr(sys, "argv", [script])
        monkeypatch.syspath_prepend((ROOT / script).parent)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except Parsers as found:
            return found.args[0]
        except SystemExit as exit_:
            pytest.skip(f"{script}: {exit_}")
        finally:
            sys.path[:] = path
        raise AssertionError(f"{script} reads no command line")

    return get


def test_scripts_are_found():
    assert {"train_lora.py", "scripts/quickstart.py", "benchmarks/packing.py"} <= set(SCRIPTS)
    assert len(SCRIPTS) > 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tilde_means_home_in_every_path(parser_of, script, monkeypatch):
    """Any flag that takes `~/x` takes it as a file of the home folder, or as text of its own."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    home, names, paths = str(Path("/home/someone/x")), [], []
    for action in parser_of(script)._actions:
        name = action.option_strings[0] if action.option_strings else action.dest
        if action.nargs == 0 or action.choices or name in TEXTS or isinstance(action, BooleanFlag):
            continue
        names.append(name)
        kind = action.type or str
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            parts = kind("~/x")
            parts = parts if isinstance(parts, tuple) else (parts,)
            assert home in map(str, parts), name
            paths.append(name)
    named = re.findall(r"--\w+(?:_dir|_path|_file|_weight)\b|--weight\b", " ".join(names))
    assert set(named) <= set(paths)


def test_a_tilde_after_a_name_and_one_of_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert named_path("en=~/x.jsonl") == ("en", tmp_path / "x.jsonl")
    (tmp_path / "a=b.jsonl").touch()
    assert named_path("~/a=b.jsonl") == ("a=b", tmp_path / "a=b.jsonl")
    args = stage_parser().parse_args(["--from_weight=~/x.pth", "--data_path=~nobody-here/x"])
    assert args.from_weight == str(tmp_path / "x.pth")
    assert args.data_path == [(Path("~nobody-here/x"), None)]
    assert stage_parser().parse_args(["--from_weight", "full_sft"]).from_weight == "full_sft"


def test_a_run_in_the_home_folder(run, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_texts(tmp_path / "train.jsonl", 8)
    words = [*SHAPE, "--max_seq_len", 32, "--data_path=~/train.jsonl", "--out_dir=~/out"]
    run(*words, "--val_data_path", "mine=~/train.jsonl")
    run(*words, "--from_weight=~/out/pretrain_32.pth", "--run_name", "b")
    assert (tmp_path / "out" / "pretrain_32_b.pth").is_file()
    assert not (ROOT / "~").exists()


# Experts

EXPERTS = {"n_routed_experts": 3, "n_shared_experts": 0, "num_experts_per_tok": 1}


def test_the_defaults_are_those_of_the_model():
    assert {name: getattr(LMConfig(), name) for name in MOE_DEFAULTS} == MOE_DEFAULTS


@pytest.fixture(scope="module")
def experts(run, quick, tmp_path_factory):
    """A folder with data, and words of a run with other experts than usual there."""
    folder = tmp_path_factory.mktemp("experts")
    data = write_texts(folder / "train.jsonl", 20)
    words = [*SHAPE, "--max_seq_len", 32, "--batch_size", 4, "--log_interval", 1, "--use_moe"]
    words += ["--data_path", data, "--save_interval", 2, "--out_dir", folder]
    words += [word for name, value in EXPERTS.items() for word in (f"--{name}", value)]
    with killed(4, Run, "add_step"):
        run(*words, "--aux_loss_alpha", 0.2)
    return folder, words


def test_experts_are_as_the_flags_say(run, experts, tmp_path):
    folder, words = experts
    about = json.loads((folder / "pretrain_32_moe.json").read_text(encoding="utf-8"))["config"]
    assert {name: about[name] for name in EXPERTS} == EXPERTS
    names = torch.load(folder / "pretrain_32_moe.pth", weights_only=True).keys()
    numbers = {name.split(".")[4] for name in names if ".experts." in name}
    assert numbers == {"0", "1", "2"} and not any("shared" in name for name in names)
    run(*words, "--aux_loss_alpha", 0.1, "--out_dir", tmp_path)
    half, whole = (read_metrics(out, "pretrain_32_moe")[0] for out in (tmp_path, folder))
    assert 2 * half["aux_loss"] == pytest.approx(whole["aux_loss"], rel=1e-5)
    assert whole["aux_loss"] > 0.1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--n_routed_experts", 4], "--n_routed_experts 4: 3 in the run to resume"),
        (["--n_shared_experts", 1], "--n_shared_experts 1: 0 in the run to resume"),
        (["--num_experts_per_tok", 2], "--num_experts_per_tok 2: 1 in the run to resume"),
    ],
)
def test_experts_of_a_run_stay_its_own(run, experts, more, said):
    assert said in run(*experts[1], "--resume", *more, code=2).stderr
    flag, value = more
    start = ["--from_weight", experts[0] / "pretrain_32_moe.pth", "--run_name", "b"]
    error = run(*experts[1], *start, *more, code=2).stderr
    weights = experts[0] / "pretrain_32_moe.pth"
    assert f"{flag} {value}: {weights} has {EXPERTS[flag[2:]]}; without the flag" in error


def test_the_weight_of_the_balance_may_change(run, experts):
    done = run(*experts[1], "--resume", "--aux_loss_alpha", 0.3, "--dry_run")
    assert "--aux_loss_alpha 0.3 (was 0.2)" in done.stdout


def test_a_run_from_before_these_flags_goes_on(run, experts, tmp_path):
    words = [*experts[1], "--out_dir", tmp_path]
    for name in EXPERTS:
        place = words.index(f"--{name}")
        del words[place : place + 2]
    with killed(4, Run, "add_step"):
        run(*words)
    path = tmp_path / "pretrain_32_moe_resume.pth"
    contents = torch.load(path, weights_only=True)
    for name in (*MOE_DEFAULTS, "run_name", "overwrite"):
        del contents["arguments"][name]
        contents["identity"].pop(f"--{name}", None)
    torch.save(contents, path)
    assert "going on after step 2" in run(*words, "--resume").stdout


@pytest.mark.parametrize("name", MOE_DEFAULTS)
def test_experts_need_a_mixture(run, tmp_path, name):
    error = run(*SHAPE, "--out_dir", tmp_path, f"--{name}", 2, code=2).stderr
    assert error == f"train_pretrain.py: error: --{name} needs --use_moe\n"


def test_more_experts_for_a_token_than_there_are(run, tmp_path):
    words = ["--use_moe", "--num_experts_per_tok", 5, "--out_dir", tmp_path]
    error = run(*SHAPE, *words, code=2).stderr
    assert "--num_experts_per_tok 5" in error and error.count("\n") == 1
