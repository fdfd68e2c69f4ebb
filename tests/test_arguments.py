from pathlib import Path

import pytest

from training import add_stage_arguments, flag, make_parser
from training.arguments import named_path


def stage_parser():
    parser = make_parser("A stage.")
    add_stage_arguments(
        parser,
        data_path="data.jsonl",
        from_weight="none",
        learning_rate=5e-4,
        weight_decay=0.1,
        epochs=1,
        batch_size=32,
        grad_clip=1.0,
        max_seq_len=512,
    )
    return parser


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
        (["--skip_bad_lines", "True"], 0.1),
        (["--skip_bad_lines=yes"], 0.1),
        (["--skip_bad_lines", "false"], 0),
        (["--skip_bad_lines", "0.5", "--no-skip_bad_lines"], 0),
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
    parser.add_argument("--thing", action=flag, default=True, help="does it")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--thing" in (shown := capsys.readouterr().out)
    assert "--no-thing" in shown
