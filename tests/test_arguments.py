import pytest

from training import add_stage_arguments, flag, make_parser


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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learning_rat", "1"], "--learning_rate?"),
        (["--batch_size", "0"], "--batch_size"),
        (["--batch_size", "x"], "--batch_size"),
        (["--learning_rate", "-1"], "--learning_rate"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--dropout", "1"], "--dropout"),
        (["--use_moe", "maybe"], "--use_moe"),
        (["--no-use_moe", "True"], "--no-use_moe"),
        (["--dtype", "int8"], "--dtype"),
        (["--epochs"], "--epochs"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        stage_parser().parse_args(words)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert named in error
    assert error.count("\n") == 1


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


def test_help_shows_both_spellings_of_a_switch(capsys):
    parser = make_parser("")
    parser.add_argument("--thing", action=flag, default=True, help="does it")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--thing" in (shown := capsys.readouterr().out)
    assert "--no-thing" in shown
