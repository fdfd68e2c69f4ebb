"""The languages of training's output: every English text has its Chinese, and a run shows it."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from string import Formatter

import pytest
from interruptions import SHAPE, write_texts
from test_report import CASES, VOCAB

from common import Text, format_number, translate
from common.language import CATALOGUE
from dataset import SFTDataset
from dataset.preference import DPODataset
from diagnosis.report import find_all
from training.record import add_ending

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "dataset", "diagnosis", "training")
PATHS = [*ROOT.glob("train_*.py"), *(p for name in PACKAGES for p in (ROOT / name).glob("*.py"))]
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
# In these files every English sentence is a Text, errors and docstrings aside.
PROSE = ("findings", "loss_findings", "preference_findings", "plan", "report", "settings")
CHINESE = json.loads(CATALOGUE.read_text(encoding="utf-8"))
HAN = "\u4e00-\u9fff"

pytestmark = pytest.mark.usefixtures("quick")


def is_call(node, *names):
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names


def is_text(node, path):
    return is_call(node, "Text") and path.name != "tracking.py"  # which has that of a tracker


def written_templates():
    """The templates in the code, and the names of the values that each one is given."""
    found = {}
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if is_text(node, path) and isinstance(node.args[0], ast.Constant):
                names = {keyword.arg for keyword in node.keywords}
                found.setdefault(node.args[0].value, []).append((path.name, names))
    return found


def reasons():
    """Why data are left out: Texts by name, or noted as they are read."""
    noted = [
        node.args[0].value
        for tree in FILES.values()
        for node in ast.walk(tree)
        if is_call(node, "LeftOut", "leave_out") and isinstance(node.args[0], ast.Constant)
    ]
    kinds = (kind._REASONS.values() for kind in (SFTDataset, DPODataset))
    return {*noted, *chain(*kinds), "bad lines of the file left out"}


def fields(template):
    """The placeholders of a template, each with its format and conversion."""
    return Counter(field[1:] for field in Formatter().parse(template) if field[1] is not None)


def between(template):
    return "".join(text for text, *_ in Formatter().parse(template))


def test_every_text_has_a_translation_and_every_translation_a_text():
    written = {template for template in written_templates() if between(template)}
    assert len(written) > 150
    assert CHINESE.keys() == written | reasons()


def test_every_text_gets_the_values_that_it_shows():
    for template, uses in written_templates().items():
        shown = {name for name, *_ in fields(template)}
        for name, values in uses:
            assert values == shown or (None in values and values - {None} <= shown), (
                name,
                template,
            )


def test_only_texts_by_name_are_no_literals():
    others = [
        (path.name, ast.unparse(node))
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if is_text(node, path) and not isinstance(node.args[0], ast.Constant)
    ]
    assert others == [
        ("stored.py", "Text(reason)"),
        ("report.py", "Text(template, **values)"),  # how the run ended, as it was noted
    ]


@pytest.mark.parametrize("name", PROSE)
def test_no_sentence_is_only_in_english(name):
    ((path, tree),) = (item for item in FILES.items() if item[0].stem == name)
    fit = {
        id(inner)
        for node in ast.walk(tree)
        if is_text(node, path) or isinstance(node, ast.Raise) or is_call(node, "compile")
        for inner in ast.walk(node)
    }
    fit |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    bare = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in fit
        if re.search("[A-Za-z] [A-Za-z]", node.value) and not node.value.startswith("pip install")
    ]
    assert bare == []


def test_translations_have_the_same_placeholders_and_chinese_punctuation():
    for english, chinese in CHINESE.items():
        assert fields(english) == fields(chinese), english
        assert not re.search(f"[{HAN}][,;:!?()]|[,;:!?()][{HAN}]", chinese.replace("![", "")), (
            chinese
        )
        assert not re.search(r"(\d|%}) %", chinese), chinese
        assert not re.search("[A-Za-z]{2,} [a-z]{2,} [a-z]{2,}", chinese), chinese
        assert chinese == english or re.search(f"[{HAN}：。，；]|}}{{unit}}|^{{here}}", chinese), (
            chinese
        )


def test_values_are_translated_as_deep_as_they_lie():
    high = Text("high")
    text = Text("warning: {warning}", warning=Text("{n} tokens per parameter", n=[high, "x{y}"]))
    assert text == "warning: high, x{y} tokens per parameter"
    assert translate(text, "en") == text
    assert translate(text, "zh") == "警告：每个参数 偏高，x{y} 个 token"
    assert translate("warning: high", "zh") == "warning: high"  # no Text: as it is
    assert [translate(format_number(25_829_888), lang) for lang in ("en", "zh")] == [
        "25.83 M",
        "25.83M",
    ]


def test_english_needs_no_catalogue(monkeypatch):
    monkeypatch.setattr(importlib.import_module("common.language"), "CATALOGUE", Path("nowhere"))
    assert translate(Text("high"), "en") == "high"
    with pytest.raises(FileNotFoundError):
        translate(Text("high"), "zh")


def without_figures(line):
    """A line without what is the same in both languages: paths, commands, samples, flags."""
    line = re.sub(r"'.*?' → '.*'|python \S+\.py.*|pip install.*|/\S+|--\w+( [\d.]+)?", "", line)
    return "" if re.match(r"step \d+/\d+  ", line) else line


@pytest.mark.parametrize("name", CASES)
def test_findings_are_in_chinese_throughout(name):
    for metrics in CASES[name][1:]:
        for finding in find_all(metrics, VOCAB, 4):
            shown = translate(finding.text, "zh")
            assert re.search(f"[{HAN}]", shown) and shown.endswith("。"), shown
            assert not re.search("[A-Za-z]+ [a-z]+ ", without_figures(shown)), shown


@pytest.fixture(scope="module")
def chinese_run(root, tmp_path_factory):
    """A run in a process of its own, its output, and the folder of its record."""
    folder = tmp_path_factory.mktemp("zh")
    texts = write_texts(folder / "texts.jsonl", 40)
    words = [*SHAPE, "--data_path", texts, "--val_ratio", 0.2, "--max_seq_len", 32, "--lang", "zh"]
    words += ["--dtype", "float32", "--out_dir", folder, "--max_steps", 14, "--log_interval", 1]
    words += ["--batch_size", 1, "--warmup_iters", 0, "--weight_decay", 0.5, "--n_heads", 2]
    done = subprocess.run(
        [sys.executable, "train_pretrain.py", *map(str, words)],
        cwd=root,
        env={**os.environ, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, folder, folder / "logs" / "pretrain_32", words


def test_a_run_and_its_report_are_in_chinese(chinese_run):
    printed, _, record, _ = chinese_run
    report = (record / "report.md").read_text(encoding="utf-8")
    for text in (
        "参数量：",
        "步数：14",
        "警告：--warmup_iters 0",
        "自动选择：",
        "已保存",
        "下一步：",
    ):
        assert text in printed, text
    for text in ("结束方式：训练完成。", "## 值得注意的问题", "困惑度", "| 优化器步数 | 14 |"):
        assert text in report, text
    prose = report.partition("## 启动方式")[0].replace("# pretrain_32", "")
    for line in (*printed.splitlines(), *prose.splitlines()):
        assert not re.search("[A-Za-z]+ [a-z]+ [a-z]+", without_figures(line)), line
        assert not re.search(r"\d %", line), line


def test_what_a_machine_reads_stays_english(chinese_run):
    printed, _, record, _ = chinese_run
    assert re.search(r"^step 14/14  loss [\d.]+  lr ", printed, re.MULTILINE)
    config = (record / "config.json").read_text(encoding="utf-8")
    assert json.loads(config)["ending"] == "finished" and not re.search(f"[{HAN}]", config)
    assert not re.search(f"[{HAN}]", (record / "metrics.jsonl").read_text(encoding="utf-8"))


def test_the_report_can_be_written_again_in_either_language(chinese_run, run):
    _, _, record, _ = chinese_run
    first = (record / "report.md").read_text(encoding="utf-8")
    done = run(record, "--lang", "en", script="scripts/report_run.py")
    english = (record / "report.md").read_text(encoding="utf-8")
    assert "Ended: finished." in english and not re.search(f"[{HAN}]", english + done.stdout)
    run(record, "--lang", "zh", script="scripts/report_run.py")
    again = (record / "report.md").read_text(encoding="utf-8")
    assert (
        again.partition("## 曲线")[0] == first.partition("## 曲线")[0]
    )  # drawn without matplotlib
    stopped = Text("stopped by {name} at step {step}; --resume goes on", name="SIGTERM", step=3)
    add_ending(record / "config.json", stopped)
    run(record, "--lang", "zh", script="scripts/report_run.py")
    again = (record / "report.md").read_text(encoding="utf-8")
    assert "结束方式：收到 SIGTERM，在第 3 步停止；用 --resume 续训。" in again


def test_a_resumed_run_may_have_another_language(chinese_run, run):
    words = chinese_run[3]
    done = run(*words, "--resume", "--lang", "en")
    assert "this run is finished, at step 14; nothing to do" in done.stdout


@pytest.mark.parametrize(
    ("variables", "words", "is_chinese"),
    [
        ({"LANG": "zh_CN.UTF-8"}, [], True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, [], False),
        ({"LANG": "zh_CN.UTF-8"}, ["--lang", "en"], False),
        ({"LANG": "de_DE.UTF-8"}, ["--lang", "zh"], True),
    ],
)
def test_the_plan_is_in_the_language_of_locale_or_flag(
    chinese_run, run, monkeypatch, variables, words, is_chinese
):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    flags = [*SHAPE, "--data_path", chinese_run[1] / "texts.jsonl", "--max_seq_len", 32]
    said = run(*flags, "--dry_run", "--out_dir", chinese_run[1] / "other", *words).stdout
    assert ("参数量：" in said, "parameters: " in said) == (is_chinese, not is_chinese)


def test_errors_are_in_english(run, tmp_path):
    done = run("--data_path", tmp_path / "none.jsonl", *SHAPE, "--lang", "zh", code=2)
    assert "error: " in done.stderr and not re.search(f"[{HAN}]", done.stderr + done.stdout)
