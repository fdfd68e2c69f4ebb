"""From nothing to a model that answers, in one command.

    python scripts/quickstart.py

It makes `.venv` and installs what training and its curves need, writes the sample world, trains a
tokenizer on it, pretrains, tunes, and scores the result on questions that no training file holds.
Then it starts a chat. With --all it runs the other stages too and shows what each one changed; with
--name Ada it ends with an adapter, a few seconds of training, that gives the model this name.
Every step is a command that is printed before it runs. A second start goes on where the first one
stopped.

The exit status is 1 if a score is below its goal.
"""

from __future__ import annotations  # an old Python must get as far as `require_python`

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from environment import ROOT, fail, prepare, require_python, shell_line, step, user_path
from further_stages import SETTINGS, Quickstart, copy_beginning, run_further_stages

REQUIREMENTS = [
    "requirements.txt",
    *("scripts/plot_requirements.txt", "scripts/onnx_requirements.txt"),
]
SAMPLE = ROOT / "dataset" / "sample"
NAMES = ("pretrain", "sft", "test", "dpo", "dpo_test", "lora", "lora_test")
FILES = [f"{name}.jsonl" for name in NAMES]
SMOKE_LINES, SMOKE_QUESTIONS = 150, 100  # of each file and each test, with --smoke

VOCABULARY, SMOKE_VOCABULARY = 3200, 600  # a small world needs few words, and learns them faster
MODEL = [
    *("--dim", "256", "--n_layers", "2", "--n_heads", "8", "--n_kv_heads", "8"),
    *("--rope_theta", "1e4"),  # rows are short
]
ROWS = ["--max_seq_len", "384", "--log_interval", "100", "--save_interval", "500"]
RECIPE = {  # what an entry of speedrun.py may have otherwise
    "vocabulary": VOCABULARY,
    "model": MODEL,
    "rows": ROWS,
    "pretraining": ["--batch_size", "4", "--learning_rate", "4e-3", "--epochs", "3"],
    "tuning": ["--batch_size", "4", "--learning_rate", "1e-3", "--epochs", "4"],
}
SMOKE_MODEL = ["--dim", "64", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "4"]

# An adapter that gives the model a name: so many conversations about it in each language, as many
# about other things, so that these stay.
NAMED = 30
NAMING = ["--learning_rate", "3e-3", "--epochs", "20", "--batch_size", "4"]
# What the sample's adapter file has the model say that it is, and its name in either language.
OTHER_SELVES = {"Pip, the lamp keeper of the lighthouse": "{}", "皮普，灯塔的守灯人": " {}"}

PRETRAINED, TUNED, BOTH = "pretrained only", "tuned only", "both stages"
EARLIER = 5  # exchanges before a question, when the model is scored in a conversation
IN_CONVERSATION = f"{BOTH}, after {EARLIER}"

# What the result must reach, as shares of right answers.
OVERALL, LATER, EACH_SKILL, RECALL, ONE_STAGE_ALONE = 0.80, 0.70, 0.55, 0.70, 0.10
HIGHER = {"recall": RECALL, "overall": OVERALL}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out_dir", type=user_path, help="default: out/quickstart")
    add("--smoke", action="store_true", help="the same path in a minute, with nothing learnt")
    add("--control", action="store_true", help="also tune a model that was not pretrained")
    add("--all", action="store_true", help="also preference, an adapter and distillation")
    add("--name", type=model_name, help="also train an adapter that gives the model this name")
    parser.error = fail  # one line, as for every other user error
    args = parser.parse_args()
    default = ROOT / "out" / ("quickstart_smoke" if args.smoke else "quickstart")
    args.out_dir = (args.out_dir or default).resolve()
    return args


def model_name(text: str) -> str:
    """An argparse type: a name of one line, with a letter or a digit in it."""
    if not re.search(r"\w", text) or not text.isprintable() or len(text) > 40:
        raise argparse.ArgumentTypeError(f"{text!r}: a name of up to 40 characters")
    return text.strip()


def write_naming(source: Path, target: Path, name: str) -> None:
    """Write conversations in which the model has a name, made of the sample's adapter file."""
    others, named = [], {other: [] for other in OTHER_SELVES}
    for line in source.read_text(encoding="utf-8").splitlines():
        other = next((other for other in OTHER_SELVES if other in line), None)
        if other is None:
            others.append(line)
        elif len(named[other]) < NAMED:
            own = json.dumps(OTHER_SELVES[other].format(name), ensure_ascii=False)[1:-1]
            named[other].append(line.replace(other, own))
    lines = [line for group in named.values() for line in group]
    lines += others[: len(lines)]
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")


def give_name(start: Quickstart, name: str) -> str:
    """Train an adapter that gives the tuned model a name: the adapter's name."""
    adapter = re.sub(r"[^\w-]+", "-", name).strip("-")
    data = start.out_dir / f"{adapter}.jsonl"
    write_naming(start.sample / "lora.jsonl", data, name)
    words = [data, *NAMING, "--lora_name", adapter]
    start.train(f"An adapter: its name is {name}", "train_lora.py", *words)
    return adapter


def closing_lines(start: Quickstart, weights: Path) -> list[str]:
    """The commands that use what was made, as they are typed into a shell."""
    python, out_dir = start.python, ["--out_dir", start.out_dir]
    lines = [] if Path.cwd() == ROOT else [shell_line("cd", str(ROOT))]
    again = ["scripts/quickstart.py", *(["--smoke"] if start.smoke else []), *out_dir]
    return [
        *lines,
        "# chat in the terminal",
        shell_line(python, "eval_model.py", "--weight", weights, "--temperature", "0"),
        "# chat in a browser; the server for OpenAI's clients; both need some more packages",
        shell_line(python, "-m", "pip", "install", "-r", "scripts/requirements.txt"),
        shell_line(python, "scripts/web_demo.py", *out_dir),
        shell_line(python, "scripts/serve_openai_api.py", *out_dir),
        "# an adapter that gives it a name",
        shell_line(sys.executable, *again, "--name", "Ada"),
    ]


def check_recipe(out_dir: Path, smoke: bool) -> None:
    """Record the settings and data of the folder's models; exit with status 2 if they differ."""
    versions = [(SAMPLE / f"{name}.version").read_text(encoding="utf-8") for name in FILES]
    settings = [*RECIPE.values(), *SETTINGS]
    if smoke:
        settings = [SMOKE_VOCABULARY, SMOKE_MODEL, SMOKE_LINES, SMOKE_QUESTIONS, *settings]
    recipe = json.dumps([*settings, *versions])
    note = out_dir / "recipe.json"
    if not note.is_file() and not any(out_dir.iterdir()):
        note.write_text(recipe, encoding="utf-8")
    if not note.is_file() or note.read_text(encoding="utf-8") != recipe:
        fail(f"{out_dir} holds something else: delete it or choose another --out_dir")


def train(start: Quickstart, control: bool, recipe: Mapping = RECIPE) -> dict[str, Path]:
    """Train the tokenizer, pretrain, tune, with `control` without pretraining too: the weights."""
    texts, chats = start.sample / "pretrain.jsonl", start.sample / "sft.jsonl"
    if not (start.tokenizer / "tokenizer_config.json").is_file():
        size = str(SMOKE_VOCABULARY if start.smoke else recipe["vocabulary"])
        words = [texts, chats, "--out_dir", start.tokenizer, "--overwrite", "--keep_repeats"]
        title = "A tokenizer for this world"
        step(title, start.python, "scripts/train_tokenizer.py", *words, "--vocab_size", size)
    pretraining = [texts, *recipe["pretraining"]]
    start.train("Pretraining on plain text about the world", "train_pretrain.py", *pretraining)
    tuning = [chats, "--val_ratio", "0.02", *recipe["tuning"]]
    title = "Instruction tuning on questions and answers"
    start.train(title, "train_full_sft.py", *tuning)
    weights = {PRETRAINED: start.weights("pretrain")}
    if control:
        alone = replace(start, out_dir=start.out_dir / "without_pretraining")
        title = "For comparison: the same tuning without pretraining"
        alone.train(title, "train_full_sft.py", *tuning, "--from_weight", "none")
        weights[TUNED] = alone.weights("full_sft")
    return weights | {BOTH: start.weights("full_sft")}


def misses(scores: dict[str, dict[str, float]]) -> list[str]:
    """The goals that the scores, by model and skill, do not reach."""
    both = scores[BOTH]
    wanted = dict.fromkeys(both, EACH_SKILL) | HIGHER
    found = [
        f"{skill}: {both[skill]:.1%}, at least {least:.0%} wanted"
        for skill, least in wanted.items()
        if both[skill] < least
    ]
    later = scores[IN_CONVERSATION]["overall"]
    if later < LATER:
        found.append(
            f"overall, after {EARLIER} exchanges: {later:.1%}, at least {LATER:.0%} wanted"
        )
    found += [
        f"recall, {name}: {scores[name]['recall']:.1%}, below {ONE_STAGE_ALONE:.0%} wanted"
        for name in (PRETRAINED, TUNED)
        if name in scores and scores[name]["recall"] >= ONE_STAGE_ALONE
    ]
    return found


def main() -> int:
    """Go all the way; returns the exit status."""
    require_python()
    args = parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    print("== Environment: .venv in the project's folder", flush=True)
    python = prepare(REQUIREMENTS, "quickstart.sha256")
    step("The sample world", python, "scripts/make_sample_data.py")
    check_recipe(args.out_dir, args.smoke)
    sample, model = SAMPLE, MODEL
    if args.smoke:
        sample, model = args.out_dir / "sample", SMOKE_MODEL
        sample.mkdir(exist_ok=True)
        for name in FILES:
            lines = SMOKE_QUESTIONS if "test" in name else SMOKE_LINES
            copy_beginning(SAMPLE / name, sample / name, lines)
    started = time.perf_counter()
    tokenizer = args.out_dir / "tokenizer"
    start = Quickstart(python, args.out_dir, sample, tokenizer, model, ROWS, args.smoke)
    weights = train(start, args.control or args.smoke)
    title, out = "Scores on questions that no training file holds", args.out_dir / "scorecard.md"
    words = ["--out", out, "--history", "0", str(EARLIER)]
    scores = start.score(title, "test.jsonl", weights, *words, figures="scores.json")
    further = run_further_stages(start, scores[PRETRAINED], scores[BOTH]) if args.all else []
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes of computing in this start.")
    below = [] if args.smoke else misses(scores) + further
    if below:
        print("Below the goals:\n  " + "\n  ".join(below), file=sys.stderr, flush=True)
    elif not args.smoke:
        print("All scores reach their goals.")
    if TUNED not in weights:
        print("Not measured: tuning alone (--control).")
    chat = ["--weight", weights[BOTH], "--temperature", "0"]
    if args.name is not None:
        adapter = give_name(start, args.name)
        chat = ["--out_dir", args.out_dir, "--lora_name", adapter, "--temperature", "0"]
    lines = closing_lines(start, weights[BOTH])
    print("\n".join(["\nWhat you can do with it:", *lines]), flush=True)
    if sys.stdin.isatty() and sys.stdout.isatty():
        step("Chat", python, "eval_model.py", *chat)
    else:
        print(f"Chat with it: {shell_line(python, 'eval_model.py', *chat)}")
    return 1 if below else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("quickstart.py: stopped; run it again to go on", file=sys.stderr)
        sys.exit(130)
