"""What a script imports before it does anything, and what Ctrl-C does meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from interruptions import heed_ctrl_c

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")])
    if "import common.interrupt" in path.read_text(encoding="utf-8")
]
HELP = """
import contextlib, io, runpy, sys
sys.path.insert(0, "scripts")
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    printed = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    printed.flush()
    assert b"usage" in printed.buffer.getvalue(), script
    slow = {"transformers", "matplotlib", "wandb", "onnx", "onnxruntime", "fastapi", "streamlit"}
    print(script, *slow & set(sys.modules), sep=": ")
"""


def test_every_script_that_imports_torch_is_among_them():
    needing = {f"train_{stage}.py" for stage in ("pretrain", "full_sft", "dpo", "lora")}
    assert {*needing, "eval_model.py", "scripts/serve_openai_api.py"} < set(SCRIPTS)


def test_help_imports_nothing_that_takes_seconds():
    done = subprocess.run(
        [sys.executable, "-c", HELP, *SCRIPTS], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.splitlines() == SCRIPTS, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_imports_shows_no_traceback(tmp_path, script):
    """A module in torch's place stands still, as torch's import does for seconds."""
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(slow, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, ROOT / script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        preexec_fn=heed_ctrl_c,
    ) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert stderr == b""
    assert process.returncode in (-signal.SIGINT, 130)
