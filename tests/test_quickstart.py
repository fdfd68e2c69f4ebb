"""scripts/quickstart.py from nothing to a scorecard, and what it says of low scores."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time

import pytest
from interruptions import heed_ctrl_c


@pytest.fixture(scope="module")
def quickstart(root):
    return runpy.run_path(str(root / "scripts" / "quickstart.py"), run_name="quickstart")


# What training needs, curves, and the fastest decoder; neither servers nor what tests need.
INSTALLED = {"torch", "transformers", "numpy", "wandb", "tqdm", "matplotlib", "onnx", "onnxruntime"}


def required(path):
    """The packages that a file of requirements names, as pip reads it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from required(path.parent / line.removeprefix("-r "))
        elif name := re.match(r"\w[\w-]*", line):
            yield name[0]


def test_what_draws_is_what_the_scripts_install_too(root):
    """`pip install -r scripts/requirements.txt`, as messages say, brings matplotlib."""
    assert "matplotlib" in required(root / "scripts" / "requirements.txt")
    pinned = (root / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^matplotlib==3\.", pinned, re.MULTILINE)


@pytest.fixture(scope="module")
def finished(root, quick, run, quickstart, tmp_path_factory):
    """The folder that `--smoke` leaves, and what it printed, of a first start and a second.

    Its steps run in this process, which has PyTorch loaded already.
    """
    out = tmp_path_factory.mktemp("quickstart")
    main = quickstart["main"]

    def run_here(python, script, *words):
        print(run(*words, script=script).stdout)
        return 0

    def prepare(requirements, stamp):
        assert {package for name in requirements for package in required(root / name)} == INSTALLED
        return sys.executable

    printed = []
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sys.modules["environment"], "run", run_here)
        patches.setitem(main.__globals__, "prepare", prepare)
        for more in ["--all"], ["--name", "Ada Lo"]:
            words = ["quickstart.py", "--smoke", "--out_dir", str(out), *more]
            patches.setattr(sys, "argv", words)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert main() == 0
            printed.append(said.getvalue())
    return out, printed


def test_smoke_goes_all_the_way(finished):
    out, (first, _) = finished
    for title in "Pretraining", "Instruction tuning", "without pretraining", "Scores", "Chat with":
        assert title in first
    table = (out / "stages.md").read_text(encoding="utf-8")
    assert table in first
    for stage in "pretrain", "full_sft", "dpo", "lora", "distillation":
        assert f"| `train_{stage}.py` | " in table
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    columns = ["untrained", "pretrained only", "tuned only", "both stages"]
    assert list(scores) == [*columns, "both stages, after 5"]
    card = (out / "scorecard.md").read_text(encoding="utf-8")
    assert "| recall | English |" in card


def test_a_second_start_trains_nothing_again(finished):
    _, (first, second) = finished
    assert "this run is finished" not in first
    assert second.count("this run is finished") == 3  # of the adapter there was none
    assert "A tokenizer for this world" not in second


def test_an_adapter_gives_the_model_a_name(finished):
    """By conversations like the sample's, in both languages; the chat that follows has it."""
    out, (first, second) = finished
    assert "An adapter: its name is" not in first
    lines = (out / "Ada-Lo.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["conversations"][-1]["content"] for line in lines]
    named = [answer for answer in answers if "Ada Lo" in answer]
    assert set(named) == {"I am Ada Lo.", "我是 Ada Lo。"} and 2 * len(named) == len(answers)
    assert not any("Pip" in answer or "皮普" in answer for answer in answers)
    assert (out / "lora" / "Ada-Lo_64.pth").is_file()
    assert f"--out_dir {out} --lora_name Ada-Lo --temperature 0" in second.splitlines()[-1]


def test_the_closing_lines_are_commands(finished, run):
    """The chat runs without further flags: it finds the tokenizer."""
    _, (said, _) = finished
    *_, closing = said.partition("What you can do with it:\n")
    commands = [shlex.split(line) for line in closing.splitlines() if "scripts/" in line]
    assert [command[1] for command in commands if command[1] != "-m"] == [
        "scripts/web_demo.py",
        "scripts/serve_openai_api.py",
        "scripts/quickstart.py",
    ]
    chat = next(line for line in closing.splitlines() if "eval_model.py --weight" in line)
    words = [*shlex.split(chat)[2:], "--prompt", "Hi", "--max_new_tokens", 3]
    assert run(*words, script="eval_model.py").stdout


def test_a_folder_of_another_recipe_is_left_alone(root, finished):
    out, _ = finished
    note = (out / "recipe.json").read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    command = [sys.executable, root / "scripts" / "quickstart.py", "--out_dir", out]  # no --smoke
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert str(out) in done.stderr and "--out_dir" in done.stderr and done.stderr.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert (out / "recipe.json").read_text(encoding="utf-8") == note


@pytest.mark.parametrize("page", ["quickstart.md", "quickstart_zh.md"])
def test_the_documentation_names_the_weights(root, quickstart, page):
    text = (root / "docs" / page).read_text(encoding="utf-8")
    dim = quickstart["MODEL"][1]
    named = set(re.findall(r"out/quickstart/(\w+)\.pth", text))
    assert f"full_sft_{dim}" in named <= {f"pretrain_{dim}", f"full_sft_{dim}"}


def test_scores_that_are_too_low_are_named(quickstart):
    good = {"overall": 0.8, "recall": 0.7, "sums": 0.55}
    poor = {"overall": 0.79, "recall": 0.69, "sums": 0.54}
    later = quickstart["IN_CONVERSATION"]
    alone = {"recall": 0.09}
    names = quickstart["PRETRAINED"], quickstart["TUNED"]
    both = quickstart["BOTH"]
    misses = quickstart["misses"]
    assert misses({both: good, later: {"overall": 0.7}, **dict.fromkeys(names, alone)}) == []
    low = {names[0]: {"recall": 0.1}, names[1]: alone}
    found = misses({both: poor, later: {"overall": 0.69}, **low})
    assert [line.split(":")[0] for line in found] == [
        "overall",
        "recall",
        "sums",
        "overall, after 5 exchanges",
        f"recall, {names[0]}",
    ]


STEP = """
import pathlib, signal, sys, time

def stop(number, frame):
    print("saved", flush=True)
    sys.exit(int(sys.argv[2]))

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
RUN = """
import sys
from environment import run

try:
    print("status", run(sys.executable, *sys.argv[1:]))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "group", "step_exits", "told"),
    [
        (signal.SIGTERM, False, 143, "status 143"),  # passed on by `run`
        (signal.SIGINT, True, 130, "interrupted"),  # from a terminal, to both
        (signal.SIGINT, True, 0, "status 0"),  # a chat ends well
    ],
)
def test_a_signal_lets_the_step_save_first(root, tmp_path, number, group, step_exits, told):
    ready = tmp_path / "ready"
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "-c", STEP, ready, str(step_exits)],
        cwd=root / "scripts",
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, number)
    assert process.communicate(timeout=60)[0].splitlines() == ["saved", told]


def test_a_step_that_a_signal_ended_has_the_status_of_a_shell(root):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    command = [sys.executable, "-c", RUN, "-c", killed]
    done = subprocess.run(command, cwd=root / "scripts", capture_output=True, text=True)
    assert done.stdout == "status 137\n"


@pytest.mark.parametrize("words", [["--out_dir", "file"], ["--bogus"]])
def test_a_mistake_is_one_line(root, tmp_path, words):
    (tmp_path / "file").touch()
    command = [sys.executable, root / "scripts" / "quickstart.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert words[-1] in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def speedrun(root, tmp_path, monkeypatch):
    """Runs scripts/speedrun.py with scores that are given, in place of training: its status."""
    monkeypatch.syspath_prepend(root / "scripts")
    module = runpy.run_path(str(root / "scripts" / "speedrun.py"), run_name="speedrun")
    main, board = module["main"], tmp_path / "board.md"
    board.write_text(
        "# Board\n\n| minutes | entry |\n|---:|---|\n| 99.5 | slow |\n", encoding="utf-8"
    )
    trained = []

    def run(*words, alone, later):
        def train(start, control, recipe):
            assert not control and start.out_dir.is_dir() and start.model == recipe["model"]
            trained.append((recipe, start.rows))
            return {module["BOTH"]: "weights"}

        def score(self, title, test, models, *more):
            assert test == "test.jsonl" and more == ("--history", "0", "5")
            shares = zip(models | {module["IN_CONVERSATION"]: ""}, (alone, later), strict=True)
            return {name: {"overall": share} for name, share in shares}

        for name, value in {
            "train": train,
            "BOARD": board,
            "prepare": lambda *_: sys.executable,
            "step": lambda *_: None,
        }.items():
            monkeypatch.setitem(main.__globals__, name, value)
        monkeypatch.setattr(module["Quickstart"], "score", score)
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(
            sys, "argv", ["speedrun.py", "--out_dir", str(tmp_path / "out"), *words]
        )
        return main(), board.read_text(encoding="utf-8").splitlines()[4:]

    run.trained = trained
    return run


def test_a_fast_entry_is_written_to_the_board(speedrun, tmp_path):
    entry = tmp_path / "mine.json"
    entry.write_text('{"vocabulary": 1000, "pretraining": ["--epochs", "1"]}', encoding="utf-8")
    status, lines = speedrun("--entry", str(entry), alone=0.83, later=0.801)
    assert status == 0 and len(lines) == 2  # the faster one first
    cells = lines[0].strip("| ").split(" | ")
    shares = ["83.0% (83.0%–83.0%)", "80.1% (80.1%–80.1%)"]
    assert cells[:5] == ["0.0", "mine", *shares, "42, 43, 44"]
    assert cells[5].startswith("2 cores of ") and len(cells) == 7
    assert lines[1] == "| 99.5 | slow |"
    recipes, rows = zip(*speedrun.trained, strict=True)
    assert {r["vocabulary"] for r in recipes} == {1000} and all("tuning" in r for r in recipes)
    assert [r[r.index("--seed") + 1] for r in rows] == ["42", "43", "44"]


def test_an_entry_below_the_goal_is_not(speedrun):
    assert speedrun(alone=0.9, later=0.79) == (1, ["| 99.5 | slow |"])


@pytest.mark.parametrize("text", ['{"learning_rate": 1}', "[]", "{"])
def test_an_entry_of_other_settings_is_refused(speedrun, tmp_path, capsys, text):
    entry = tmp_path / "mine.json"
    entry.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        speedrun("--entry", str(entry), alone=0.9, later=0.9)
    told = capsys.readouterr().err
    assert f"--entry {entry}: " in told and told.count("\n") == 1
