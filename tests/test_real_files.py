"""Files as people bring them, from the container to a step: check_data and the stage they are for.

They are beside the project, in ../shared/data; without it these tests are skipped.
"""

import math
import re

import pytest
from interruptions import SHAPE
from tiny_models import random_model, save_tuned

from dataset import RLAIFDataset

PRETRAIN, SFT, DPO = "train_pretrain.py", "train_full_sft.py", "train_dpo.py"
STAGES = {
    "array_indented.json": PRETRAIN,
    "array_lines.json": PRETRAIN,
    "blank_lines.jsonl": PRETRAIN,
    "bom_crlf.jsonl": PRETRAIN,
    "plain.txt": PRETRAIN,
    "text.csv": PRETRAIN,
    "text.jsonl.gz": PRETRAIN,
    "text.jsonl.zst": PRETRAIN,
    "text.parquet": PRETRAIN,
    "utf16.jsonl": PRETRAIN,
    "chat.parquet": SFT,
    "content_parts.jsonl": SFT,
    "learn_flags.jsonl": SFT,
    "odd_turns.jsonl": SFT,
    "other_roles.jsonl": SFT,
    "prompt_completion.jsonl": SFT,
    "question_answer.jsonl": SFT,
    "sharegpt_tools.jsonl": SFT,
    "think_inline.jsonl": SFT,
    "tool_strings.jsonl": SFT,
    "hh.jsonl": DPO,
    "kto.jsonl": DPO,
    "ultrafeedback.jsonl": DPO,
    "alpaca_en_demo.json": SFT,
    "alpaca_zh_demo.json": SFT,
    "glaive_toolcall_zh_demo.json": SFT,
    "dpo_zh_demo.json": DPO,
    "kto_en_demo.json": DPO,
}
PROMPTS = {"agent.jsonl": 1, "rlaif.jsonl": 2}  # for reinforcement learning, and how many
# What is refused of a file: the lines and why; which share it is, as a flag.
REFUSED = {
    "content_parts.jsonl": ({2: 'a part of kind "image_url"'}, 0.5),
    "odd_turns.jsonl": ({4: "role system cannot come after user"}, 0.2),
    "glaive_toolcall_zh_demo.json": (dict.fromkeys((5819, 8763), "a tool message"), 0.01),
}
LENGTH = 128

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def data(shared_dir):
    """The files by name."""
    folders = (shared_dir / "data" / "raw", shared_dir / "data" / "formats")
    return {path.name: path for folder in folders for path in folder.iterdir()}


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    return save_tuned(random_model(), tmp_path_factory.mktemp("start"), tokenizer)


def test_no_file_is_forgotten(data):
    assert sorted(data) == sorted([*STAGES, *PROMPTS])


@pytest.mark.parametrize("name", STAGES)
def test_a_file_goes_through_check_data_and_its_stage(run, data, start, tmp_path, name):
    if name.endswith((".parquet", ".zst")):
        pytest.importorskip("pyarrow" if name.endswith(".parquet") else "zstandard")
    path, stage = data[name], STAGES[name]
    words = ["--max_seq_len", LENGTH, "--cache_dir", tmp_path / "cache"]
    shown = run(path, *words, script="scripts/check_data.py")
    assert shown.stderr == "" and f"\nfor {stage}" in shown.stdout and "⟦" in shown.stdout
    words += [*SHAPE, "--batch_size", 2, "--max_steps", 2, "--out_dir", tmp_path]
    words += ["--data_path", path, *(["--from_weight", start] if stage != PRETRAIN else [])]
    if name in REFUSED:
        reasons, share = REFUSED[name]
        *bad, last = run(*words, script=stage, code=2).stderr.splitlines()
        for (line, reason), error in zip(reasons.items(), bad, strict=True):
            assert f"{path}:{line}: " in error and reason in error
            assert f"{path}:{line}: " in shown.stdout
        assert f"{path}: {len(bad)} of " in last and f"--skip_bad_lines {share} goes on" in last
        words += ["--skip_bad_lines", share]
    done = run(*words, script=stage)
    (loss,) = re.findall(r"^step 2/2 .*?loss (\S+)", done.stdout, re.MULTILINE)
    assert math.isfinite(float(loss)) and float(loss) > 0


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_read(run, data, tokenizer, tmp_path, name):
    """Answers that are empty are none to learn: a file of these alone is refused, in one line."""
    words = ["--max_seq_len", 256, "--cache_dir", tmp_path]
    shown = run(data[name], *words, script="scripts/check_data.py")
    prompts = RLAIFDataset(data[name], tokenizer, 256, cache_dir=tmp_path)
    assert len(prompts) == PROMPTS[name]
    assert all(item["prompt"].endswith("<s>assistant\n") for item in prompts)
    if name == "agent.jsonl":
        assert "prompts for reinforcement learning" in shown.stdout
        words += [*SHAPE, "--from_weight", "none", "--out_dir", tmp_path]
        done = run(*words, "--data_path", data[name], script=SFT, code=2)
        assert done.stderr.count("\n") == 1
        assert f"{data[name]}: nothing to learn" in done.stderr
