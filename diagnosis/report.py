"""The report of a run: its key figures, what its curves show, and a picture of them."""

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from common import format_duration, write_atomically

from .curves import draw_curves
from .findings import Finding, general_findings
from .loss_findings import MIN_LINES, loss_findings
from .metrics import Metrics, best_evaluation, column, has_number, having, read_metrics
from .preference_findings import preference_findings


def find_all(
    metrics: Metrics, vocab_size: int | None = None, n_routed_experts: int = 0
) -> list[Finding]:
    """Everything that the metrics show, good or bad, what did harm first.

    `vocab_size` is None for a run that began with trained weights; `n_routed_experts` 0 if dense.
    """
    if having(having(metrics, "loss"), "margin"):
        own = preference_findings(metrics)
    else:
        own = loss_findings(metrics, vocab_size)
    found = [*general_findings(metrics, n_routed_experts), *own]
    return sorted(filter(None, found), key=lambda finding: not finding.harmful)


def write_report(folder: Path) -> str:
    """Write report.md and, where matplotlib is installed, curves.png into a run's folder.

    The run may be finished or not. It has a metrics.jsonl; each key of config.json, which
    `training.record.write_config` writes, may be missing, as in a folder of an older release.

    Returns a line with the path of the report and the number of things that stand out. Raises
    OSError if a file cannot be read or written, ValueError if one that is read is damaged.
    """
    metrics = read_metrics(folder / "metrics.jsonl")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    flags = config.get("arguments", {})
    from_scratch = flags.get("from_weight") == "none"
    n_routed_experts = flags.get("n_routed_experts", 0) if flags.get("use_moe") else 0
    vocab_size = config.get("vocab_size") if from_scratch else None
    found = find_all(metrics, vocab_size, n_routed_experts)
    outstanding = [finding.text for finding in found if finding.stands_out]
    good = [finding.text for finding in found if not finding.stands_out]
    n_lines = len(having(metrics, "loss"))
    short = ""
    if n_lines < MIN_LINES and not having(metrics, "margin"):
        short = (
            f"\n\nThe course of the loss is judged from {MIN_LINES} training lines on; this run "
            f"has {n_lines}. A smaller --log_interval gives more."
        )
    text = f"""# {folder.name}

Ended: {config.get("ending", "not known; the run is going on, or was killed")}.

{_table(_key_figures(metrics))}

## What stands out

{_bullets(outstanding) or "Nothing stands out."}{short}

## What is as it should be

{_bullets(good) or "Nothing could be judged."}

## Curves

{_picture(folder, metrics)}
{_by_validation_set(metrics)}{_start(config)}"""
    path = folder / "report.md"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))
    count = {0: "nothing stands out", 1: "one thing stands out"}
    return f"{path}: {count.get(len(outstanding), f'{len(outstanding)} things stand out')}"


def _bullets(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _table(rows: list[tuple[str, str]]) -> str:
    """A Markdown table whose first row is its head."""
    head, *body = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in (head, "--- | ---", *body))


def _scores(line: dict[str, Any], kind: str, name: str = "") -> str:
    """The scores of a line, as far as it holds them."""
    texts = {
        "loss": "{:.4f}",
        "perplexity": "perplexity {:,.2f}",
        "bits_per_byte": "bits per byte {:.4f}",
        "accuracy": "accuracy {:.1%}",
        "margin": "margin {:.3f}",
    }
    values = {text: f"{kind}_{score}{name}" for score, text in texts.items()}
    return ", ".join(
        text.format(line[key]) for text, key in values.items() if has_number(line, key)
    )


def _key_figures(metrics: Metrics) -> list[tuple[str, str]]:
    rows = [("", "")]
    lines, evaluations = having(metrics, "loss"), having(metrics, "val_loss")
    if lines:
        first, last = lines[0], lines[-1]
        rows += [
            ("optimizer steps", f"{last['step']:,}"),
            ("target tokens", f"{last['tokens']:,}"),
            ("training time", format_duration(last["seconds"])),
            ("tokens per second", f"{last['tokens'] / (max(last['seconds'], 1e-3)):,.0f}"),
            ("first loss", f"{first['loss']:.4f} (up to step {first['step']:,})"),
            ("last loss", f"{last['loss']:.4f}"),
        ]
        if mfu := column(lines, "mfu"):
            rows.append(("MFU", f"{statistics.median(mfu):.1%}"))
        if memory := column(lines, "memory_gb"):
            rows.append(("memory", f"{max(memory):.2f} GB"))
    if evaluations:
        best, last = best_evaluation(evaluations), evaluations[-1]
        rows.append(("best validation", f"{_scores(best, 'val')} (step {best['step']:,})"))
        if last is not best:
            rows.append(("last validation", f"{_scores(last, 'val')} (step {last['step']:,})"))
    rows += [("test", _scores(line, "test")) for line in having(metrics, "test_loss")]
    return rows


def _picture(folder: Path, metrics: Metrics) -> str:
    """Draw the curves; returns the Markdown that shows them, or how to install what is missing."""
    try:
        draw_curves({folder.name: metrics}, folder / "curves.png")
    except ImportError:
        command = shlex.join(["python", "scripts/report_run.py", folder.as_posix()])
        return (
            "Drawing them needs matplotlib, which is not installed:\n\n"
            f"```bash\npip install -r scripts/plot_requirements.txt\n{command}\n```"
        )
    return "![loss, validation loss, learning rate and gradient norm](curves.png)"


def _by_validation_set(metrics: Metrics) -> str:
    """A table of the validation sets at the best evaluation; nothing if there is only one set."""
    evaluations = having(metrics, "val_loss")
    best = best_evaluation(evaluations) if evaluations else {}
    names = [key.removeprefix("val_loss") for key in best if key.startswith("val_loss/")]
    if not names:
        return ""
    rows = [("validation set", f"at step {best['step']:,}")]
    rows += [(name.removeprefix("/"), _scores(best, "val", name)) for name in names]
    return f"\n## By validation set\n\n{_table(rows)}\n"


def _start(config: dict[str, Any]) -> str:
    """The command that started the run, and the versions it ran with."""
    if "command" not in config:
        return ""
    versions = ", ".join(" ".join(item) for item in config.get("versions", {}).items())
    command = shlex.join([*config.get("launcher", ["python"]), *config["command"]])
    return (
        f"\n## How it was started\n\nWith {versions}; commit {config.get('commit') or 'unknown'}."
        f"\n\n```bash\n{command}\n```\n"
    )
