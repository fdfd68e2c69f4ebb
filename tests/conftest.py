"""Fixtures that several test files share."""

import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from interruptions import FLOAT32
from transformers import AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
# Texts are compared in English, also where the machine's locale is Chinese; processes inherit it.
os.environ["LC_ALL"] = "C.UTF-8"
STAGES = {path.name for path in ROOT.glob("train_*.py")}

# Tiny tensors gain nothing from threads, and waiting threads cost much on a busy machine.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and golden vectors kept beside the project; tests that need them skip without."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real data and golden vectors)")
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """The folder of the tokenizer that ships with the project."""
    return ROOT / "model" / "minimind_tokenizer"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> PreTrainedTokenizerBase:
    """The tokenizer that ships with the project."""
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory) -> Path:
    """The sample world's files, written by the script that users call."""
    folder = tmp_path_factory.mktemp("sample")
    script = ROOT / "scripts" / "make_sample_data.py"
    subprocess.run([sys.executable, script, "--out_dir", folder], check=True)
    return folder


@pytest.fixture(autouse=True)
def threads():
    """As many threads as OMP_NUM_THREADS says, by default one."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def unwatched():
    """No thread watches other programs: tests replace the clock, and it would read that too."""
    with mock.patch("model.threads.watch_others", lambda: None):
        yield


@pytest.fixture(scope="module")
def quick():
    """No plots, which take most of a small run's time; few threads for what fixtures run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(sys.modules, "matplotlib.figure", None)
        yield
    torch.set_num_threads(before)


class Done(NamedTuple):
    """What a script printed."""

    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def run(root) -> Callable[..., Done]:
    """Run a script of the project as `python script words…` would and check its exit status.

    It runs inside the test process, which has PyTorch loaded already; with `fresh` in a process of
    its own, with `processes` above 1 under torchrun. Relative paths start at the root.
    """

    def start(*words, script="train_pretrain.py", code=0, typed=b"", processes=1, fresh=False):
        words = in_float32(script, [str(word) for word in words])
        if processes == 1 and not fresh:
            status, done = run_here(root, script, words, typed)
        else:
            status, done = run_apart(root, script, words, processes)
        assert status == code, done.stderr
        return done

    return start


def in_float32(script: str | Path, words: list[str]) -> list[str]:
    """The words, and for a stage script the dtype that results are compared in."""
    return [*words, *FLOAT32] if script in STAGES and "--dtype" not in words else words


def run_here(root: Path, script: str, words: list[str], typed: bytes) -> tuple[int, Done]:
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    before, status = Path.cwd(), 0
    os.chdir(root)
    try:
        with (
            redirect_stdout(stdout),
            redirect_stderr(stderr),
            mock.patch.object(sys, "stdin", stdin),
            mock.patch.object(sys, "argv", [script, *words]),
        ):
            runpy.run_path(str(root / script), run_name="__main__")
    except SystemExit as exit_:
        status = exit_.code
    finally:
        os.chdir(before)
    texts = []
    for stream in (stdout, stderr):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))
    return status, Done(*texts)


def run_apart(root: Path, script: str, words: list[str], processes: int) -> tuple[int, Done]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, str(root / script), *words],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    return done.returncode, Done(done.stdout, done.stderr)
