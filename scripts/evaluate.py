"""Score a model on tasks of lm-evaluation-harness, by default on two about the sample world.

    python scripts/evaluate.py --apply_chat_template
    python scripts/evaluate.py --weight pretrain --tasks piqa arc_easy --limit 200 --out out/scores
    python scripts/evaluate.py --tasks my_tasks/ other/task.yaml

The names are those that `lm_eval ls tasks` lists; their data is downloaded. The default and task
files that read local data need no network.
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import difflib
import json
import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    ROOT,
    BooleanFlag,
    UserError,
    make_parser,
    name_or_path,
    non_negative_int,
    positive_int,
    report_os_errors,
    report_user_errors,
    user_path,
    write_atomically,
)
from inference import add_weight_arguments, load_chat_model, named_weights
from model import choose_device

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASKS = ROOT / "sample_world" / "tasks"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__.splitlines()[0])
    add_weight_arguments(parser)
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=name_or_path,
        default=["sample_world"],
        help="names of tasks, groups or tags, task files (.yaml), or folders of them",
    )
    parser.add_argument("--limit", type=positive_int, help="questions of each task; default: all")
    parser.add_argument(
        "--num_fewshot", type=non_negative_int, help="examples in a prompt; default: the task's"
    )
    parser.add_argument(
        "--apply_chat_template",
        action=BooleanFlag,
        default=False,
        help="ask as in a conversation; else prompts are plain text",
    )
    parser.add_argument("--batch_size", type=positive_int, default=16, help="rows at a time")
    parser.add_argument("--out", type=user_path, help="write OUT.json and OUT.md")
    return parser.parse_args()


def find_tasks(words: Sequence[str]) -> tuple[list[str], "TaskManager"]:
    """The tasks that --tasks names, and lm_eval's index of tasks, which has them.

    Raises:
        UserError: for a word that is neither a task nor a file or folder of tasks.
    """
    from lm_eval.tasks import TaskManager

    def find(word: str, manager: TaskManager) -> list[str]:
        """A file's tasks or group, a folder's tasks, or what has that name."""
        path, tasks = Path(word).resolve(), manager.all_subtasks
        files = [(n, e.yaml_path) for n, e in manager.task_index.items() if e.yaml_path]
        here = [n for n, p in files if p == path or (path in p.parents and n in tasks)]
        return here or manager.match_tasks([word])

    paths = [Path(word).resolve() for word in words if Path(word).exists()]
    folders = [TASKS, *(path if path.is_dir() else path.parent for path in paths)]
    for defaults in (False, True):  # over ten thousand files, which take seconds to read
        manager = TaskManager(include_path=folders, include_defaults=defaults)
        found = {word: find(word, manager) for word in words}
        if all(found.values()):
            return list(dict.fromkeys(name for names in found.values() for name in names)), manager
    word = next(word for word in words if not found[word])
    if Path(word).exists():
        raise UserError(f"--tasks {word}: holds no task that lm_eval can read")
    near = difflib.get_close_matches(word, manager.all_tasks, n=1)
    hint = f"{near[0]}?" if near else "`lm_eval ls tasks` lists all"
    raise UserError(f"--tasks {word}: no task, and no file or folder of tasks; {hint}")


def leaves(results: Mapping[str, Any], name: str) -> list[str]:
    """The tasks in a group; a task is its only one."""
    members = results["group_subtasks"].get(name)
    return [leaf for member in members for leaf in leaves(results, member)] if members else [name]


def chance_level(results: Mapping[str, Any], name: str) -> float | None:
    """The mean share that guessing gets right in a task or group; None where that is not known.

    It is 1 / choices; a question without choices may have a "chance" field.
    """
    shares = []
    for task in leaves(results, name):
        is_choice = results["configs"][task].get("output_type") == "multiple_choice"
        for sample in results["samples"][task]:
            if is_choice:  # acc_mutual_info has every choice scored twice
                twice = "acc_mutual_info" in sample["metrics"]
                shares.append((1 + twice) / len(sample["arguments"]))
            elif isinstance(sample["doc"], Mapping) and "chance" in sample["doc"]:
                shares.append(sample["doc"]["chance"])
            else:
                return None
    return sum(shares) / len(shares)


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What lm_eval measured, one entry for each metric of each task and group."""
    rows = []
    for name, values in results["results"].items():
        chance = chance_level(results, name)
        sizes = [results["n-samples"][task]["effective"] for task in leaves(results, name)]
        for key, value in values.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_}")
            rows.append(
                {
                    "task": name,
                    "num_fewshot": results["n-shot"].get(name),
                    "questions": sum(sizes),
                    "metric": metric if filter_ == "none" else f"{metric} ({filter_})",
                    "score": value,
                    "standard_error": error if isinstance(error, float) else None,
                    "chance": chance if metric.startswith("acc") else None,
                }
            )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The entries of `summarise` as a table in Markdown."""

    def shown(value: object) -> str:
        return f"{value:.4f}" if isinstance(value, float) else "–" if value is None else str(value)

    lines = [[name.replace("_", " ") for name in rows[0]]]
    lines += [["---", "---:", "---:", "---", "---:", "---:", "---:"]]
    lines += [[shown(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Score the model, and print and write what was asked for."""
    args = parse_args()
    outputs = [] if args.out is None else [Path(f"{args.out}.{end}") for end in ("json", "md")]
    for path in outputs:
        if path.exists():
            raise UserError(f"--out {args.out}: {path} exists")
    try:
        import lm_eval
        from jinja2 import UndefinedError

        from inference.harness import HarnessModel
    except ImportError as error:
        raise UserError(
            f"needs {error.name}: pip install -r scripts/requirements-eval.txt"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names, manager = find_tasks(args.tasks)
    chat_model = load_chat_model(
        named_weights(args), choose_device(args.device), rows=args.batch_size
    )
    try:
        results = lm_eval.simple_evaluate(
            HarnessModel(chat_model),
            tasks=names,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            task_manager=manager,
        )
    except (OSError, LookupError, TypeError, ValueError, UndefinedError) as error:
        # What a mistake in a task's file or data makes lm_eval raise.
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"--tasks {' '.join(args.tasks)}: {reason}") from None
    scores = summarise(results)
    about = {
        "model": chat_model.name,
        "apply_chat_template": args.apply_chat_template,
        "lm_eval": lm_eval.__version__,
    }
    table = ", ".join(f"{name} {value}" for name, value in about.items())
    table = f"{table}\n\n{format_table(scores)}"
    print(table, end="")
    contents = json.dumps({**about, "scores": scores}, indent=2, ensure_ascii=False), table
    if args.out is not None:
        for path, text in zip(outputs, contents, strict=True):
            with report_os_errors(f"--out {path}"):
                write_atomically(path, lambda file, text=text: file.write(text.encode("utf-8")))


if __name__ == "__main__":
    with report_user_errors():
        main()
