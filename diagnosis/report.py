"""The report of a run: its key figures, what its curves show, and a picture of them."""

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from common import Text, format_duration, translate, write_atomically

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


def write_report(folder: Path, language: str = "en") -> Text:
    """Write report.md and, where matplotlib is installed, curves.png into a run's folder.

    The report is in a `language` of `translate`, the picture in English.

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
    parts = [
        f"# {folder.name}",
        Text("Ended: {ending}.", ending=_ending(config)),
        _table(_key_figures(metrics), language),
        Text("## What stands out"),
        _bullets(outstanding, language) or Text("Nothing stands out."),
    ]
    if n_lines < MIN_LINES and not having(metrics, "margin"):
        short = Text(
            "The course of the loss is judged from {least} training lines on; this run has "
            "{lines}. A smaller --log_interval gives more.",
            least=MIN_LINES,
            lines=n_lines,
        )
        parts.append(short)
    parts += [
        Text("## What is as it should be"),
        _bullets(good, language) or Text("Nothing could be judged."),
        Text("## Curves"),
        _picture(folder, metrics),
    ]
    if sets := _by_validation_set(metrics):
        parts += [Text("## By validation set"), _table(sets, language)]
    parts += _start(config)
    text = "\n\n".join(translate(part, language) for part in parts) + "\n"
    path = folder / "report.md"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))
    things = {0: Text("nothing stands out"), 1: Text("one thing stands out")}
    n = len(outstanding)
    return Text("{path}: {n}", path=path, n=things.get(n, Text("{n} things stand out", n=n)))


def _ending(config: dict[str, Any]) -> Text:
    """How the run ended, as `training.record.add_ending` noted it."""
    if "ending_text" in config:
        template, values = config["ending_text"]
        return Text(template, **values)
    return config.get("ending", Text("not known; the run is going on, or was killed"))


def _bullets(texts: list[Text], language: str) -> str:
    return "\n".join(f"- {translate(text, language)}" for text in texts)


def _table(rows: list[tuple[str, str]], language: str) -> str:
    """A Markdown table whose first row is its head."""
    lines = [[translate(cell, language).replace("|", r"\|") for cell in row] for row in rows]
    head, *body = map(" | ".join, lines)
    return "\n".join(f"| {line} |" for line in (head, "--- | ---", *body))


def _scores(line: dict[str, Any], kind: str, name: str = "") -> Text:
    """The scores of a line, as far as it holds them."""
    figures = (
        ("loss", Text(""), ".4f"),
        ("perplexity", Text("perplexity "), ",.2f"),
        ("bits_per_byte", Text("bits per byte "), ".4f"),
        ("accuracy", Text("accuracy "), ".1%"),
        ("margin", Text("margin "), ".3f"),
    )
    scores = [
        Text("{label}{value}", label=label, value=format(line[f"{kind}_{score}{name}"], form))
        for score, label, form in figures
        if has_number(line, f"{kind}_{score}{name}")
    ]
    return Text("{scores}", scores=scores)


def _key_figures(metrics: Metrics) -> list[tuple[str, str]]:
    rows = [("", "")]
    lines, evaluations = having(metrics, "loss"), having(metrics, "val_loss")
    if lines:
        first, last = lines[0], lines[-1]
        rows += [
            (Text("optimizer steps"), f"{last['step']:,}"),
            (Text("target tokens"), f"{last['tokens']:,}"),
            (Text("training time"), format_duration(last["seconds"])),
            (Text("tokens per second"), f"{last['tokens'] / (max(last['seconds'], 1e-3)):,.0f}"),
            (
                Text("first loss"),
                Text("{loss:.4f} (up to step {step:,})", loss=first["loss"], step=first["step"]),
            ),
            (Text("last loss"), f"{last['loss']:.4f}"),
        ]
        if mfu := column(lines, "mfu"):
            rows.append(("MFU", f"{statistics.median(mfu):.1%}"))
        if memory := column(lines, "memory_gb"):
            rows.append((Text("memory"), f"{max(memory):.2f} GB"))
    if evaluations:
        best, last = best_evaluation(evaluations), evaluations[-1]
        named = [(Text("best validation"), best)]
        if last is not best:
            named.append((Text("last validation"), last))
        for name, line in named:
            scores, step = _scores(line, "val"), line["step"]
            rows.append((name, Text("{scores} (step {step:,})", scores=scores, step=step)))
    rows += [(Text("test"), _scores(line, "test")) for line in having(metrics, "test_loss")]
    return rows


def _picture(folder: Path, metrics: Metrics) -> Text:
    """Draw the curves; returns the Markdown that shows them, or how to install what is missing."""
    try:
        draw_curves({folder.name: metrics}, folder / "curves.png")
    except ImportError:
        command = shlex.join(["python", "scripts/report_run.py", folder.as_posix()])
        return Text(
            "Drawing them needs matplotlib, which is not installed:\n\n"
            "```bash\npip install -r scripts/plot_requirements.txt\n{command}\n```",
            command=command,
        )
    return Text("![loss, validation loss, learning rate and gradient norm](curves.png)")


def _by_validation_set(metrics: Metrics) -> list[tuple[str, str]]:
    """The rows of a table of validation sets at the best evaluation; none if there is one set."""
    evaluations = having(metrics, "val_loss")
    best = best_evaluation(evaluations) if evaluations else {}
    names = [key.removeprefix("val_loss") for key in best if key.startswith("val_loss/")]
    if not names:
        return []
    rows = [(Text("validation set"), Text("at step {step:,}", step=best["step"]))]
    return rows + [(name.removeprefix("/"), _scores(best, "val", name)) for name in names]


def _start(config: dict[str, Any]) -> list[str]:
    """The command that started the run, and the versions it ran with, a paragraph each."""
    if "command" not in config:
        return []
    versions = [" ".join(item) for item in config.get("versions", {}).items()]
    command = shlex.join([*config.get("launcher", ["python"]), *config["command"]])
    commit = config.get("commit") or Text("unknown")
    return [
        Text("## How it was started"),
        Text("With {versions}; commit {commit}.", versions=versions, commit=commit),
        f"```bash\n{command}\n```",
    ]
