"""Score models on the held-out questions of the sample world, by skill and language.

python scripts/score_world.py --weight full_sft --beside untrained pretrain
python scripts/score_world.py --weight full_sft --output scorecard.md --examples

Every model gets the same chat prompts and answers greedily. A model that was only pretrained has
never seen that form; whatever it writes after the prompt counts as its answer. To see what
instruction tuning gives by itself, tune from scratch (train_full_sft.py --from_weight none
--out_dir elsewhere) and name that .pth file after --beside.

An answer is right if it equals an accepted one after `normalise`, no more and no less. The skill
"facts" asks about people, towns and things of which only pretraining told, in wordings that no
training file holds. Declining is counted both ways: how often the model declines where the world
does not say, and how often it gives some other answer where the world does.
"""

import argparse
import json
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import PreTrainedTokenizerBase

from dataset import tokenizer_hash
from model import LMConfig, MiniMindLM
from training import (
    ROOT,
    UserError,
    count,
    find_processes,
    flag,
    load_model,
    load_tokenizer,
    make_parser,
    report_user_errors,
    resolve_weights,
    seed_everything,
)

UNTRAINED = "untrained"
MAX_NEW_TOKENS = 32  # the longest accepted answer has fewer
LANGUAGES = {"en": "English", "zh": "Chinese"}


@dataclass(frozen=True)
class Question:
    """A question of the test.

    Attributes:
        skill: what it tests.
        language: "en" or "zh".
        text: the question.
        answers: all that count as right; the first is the one to show.
        choices: among how many answers a guess would be; 0 where guessing is hopeless.
    """

    skill: str
    language: str
    text: str
    answers: tuple[str, ...]
    choices: int

    def accepts(self, answer: str) -> bool:
        """Whether an answer is right."""
        return normalise(answer) in map(normalise, self.answers)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--weight", default="full_sft", help="a stage's name, or a .pth file")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="WEIGHT",
        help=f"weights to compare with, as for --weight; {UNTRAINED}: fresh ones",
    )
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="where weights are")
    parser.add_argument("--dim", type=count, default=512, help="of the weights to load")
    parser.add_argument("--n_layers", type=count, default=8, help="of weights without a .json")
    parser.add_argument("--use_moe", action=flag, default=False, help="load a mixture of experts")
    parser.add_argument(
        "--data_path",
        type=Path,
        default=ROOT / "dataset" / "sample" / "test.jsonl",
        help="the questions",
    )
    parser.add_argument("--output", type=Path, help="also write the scorecard to this file")
    parser.add_argument(
        "--examples", action=flag, default=False, help="show one question of each skill"
    )
    parser.add_argument("--batch_size", type=count, default=64, help="questions at a time")
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu; default: the first there")
    parser.add_argument(
        "--tokenizer_path", type=Path, default=ROOT / "model" / "minimind_tokenizer", help="folder"
    )
    return parser.parse_args()


def normalise(text: str) -> str:
    """Leave out what does not change an answer: spaces, case, width, a full stop at the end."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(text.split()).rstrip(".。")


def read_questions(path: Path) -> list[Question]:
    """Read a test file: {"skill", "language", "conversations", "accepted", "choices"} lines.

    Raises:
        UserError: if the file cannot be used.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--data_path {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            (user,) = (m["content"] for m in record["conversations"] if m["role"] == "user")
            questions.append(
                Question(
                    record["skill"],
                    record["language"],
                    user,
                    tuple(record["accepted"]),
                    record["choices"],
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a question of the test ({error})") from None
    if not questions:
        raise UserError(f"--data_path {path}: no questions")
    return questions


def answer(
    model: MiniMindLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    batch_size: int = 64,
) -> list[str]:
    """Let the model answer greedily, questions of like length together, padded on the left."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for question in questions
    ]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        written = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, width:]
        for i, row in zip(batch, written.tolist(), strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def score(
    questions: Sequence[Question], answers: Sequence[str]
) -> dict[tuple[str, str], tuple[float, int]]:
    """Sum up, by (skill, language), the share of right answers and the number of questions.

    The skill "overall" is over all questions, "answered where it can" over the facts: the share to
    which the answer is anything but what declining is in that language; the language "all" is both.
    """
    declining = {
        (question.language, normalise(text))
        for question in questions
        if question.skill == "declining"
        for text in question.answers
    }
    groups: dict[tuple[str, str], list[bool]] = {}

    def add(skill: str, language: str, right: bool) -> None:
        for code in (language, "all"):
            groups.setdefault((skill, code), []).append(right)

    for question, text in zip(questions, answers, strict=True):
        right = question.accepts(text)
        add(question.skill, question.language, right)
        add("overall", question.language, right)
        if question.skill == "facts":
            answered = (question.language, normalise(text)) not in declining
            add("answered where it can", question.language, answered)
    return {group: (sum(right) / len(right), len(right)) for group, right in groups.items()}


def chance(questions: Sequence[Question], skill: str, language: str) -> float:
    """What a guess among the possible answers would be right in, on average."""
    guesses = [
        1 / question.choices if question.choices else 0.0
        for question in questions
        if skill in (question.skill, "overall") and language in (question.language, "all")
    ]
    return sum(guesses) / len(guesses)


def scorecard(questions: Sequence[Question], answers: dict[str, list[str]]) -> str:
    """A Markdown table: a row for each skill and language, a column for each model's answers."""
    scores = {name: score(questions, given) for name, given in answers.items()}
    skills = list(dict.fromkeys(question.skill for question in questions))
    groups = next(iter(scores.values()))
    rows = [["skill", "language", "questions", "chance", *answers]]
    rows.append(["---", "---", "---:", "---:", *["---:"] * len(answers)])
    for skill in [*skills, "overall", "answered where it can"]:
        for code in ("en", "zh", "all"):
            if (skill, code) not in groups:
                continue
            guess = "" if skill not in (*skills, "overall") else chance(questions, skill, code)
            shares = [each[skill, code][0] for each in scores.values()]
            rows.append(
                [
                    skill,
                    LANGUAGES.get(code, "both"),
                    str(groups[skill, code][1]),
                    f"{guess:.0%}" if guess != "" else "",
                    *(f"{share:.0%}" for share in shares),
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def examples(questions: Sequence[Question], answers: dict[str, list[str]]) -> str:
    """One question of each skill and language, what was expected, and what each model said."""
    shown: dict[tuple[str, str], str] = {}
    for place, question in enumerate(questions):
        given = [
            f"  - {name}: {' '.join(texts[place].split()) or '(nothing)'}"
            for name, texts in answers.items()
        ]
        heading = f"- {question.skill}, {LANGUAGES[question.language]}: **{question.text}**"
        expected = f"  - expected: {question.answers[0]}"
        shown.setdefault(
            (question.skill, question.language), "\n".join([heading, expected, *given])
        )
    return "\n".join(shown.values())


def open_models(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Callable[[], MiniMindLM]]:
    """The models to score, by name, each built when called.

    Raises:
        UserError: if weights are missing.
    """
    try:
        shape = LMConfig(
            dim=args.dim, n_layers=args.n_layers, use_moe=args.use_moe, vocab_size=len(tokenizer)
        )
    except ValueError as error:
        raise UserError(f"--dim {args.dim}: {error}") from None
    paths = {
        name: resolve_weights(flag_name, name, args.out_dir, shape)
        for flag_name, names in (("--weight", [args.weight]), ("--beside", args.beside))
        for name in names
        if name != UNTRAINED
    }
    hash_ = tokenizer_hash(tokenizer)
    models = {name: lambda p=path: load_model(p, shape, hash_) for name, path in paths.items()}

    def fresh() -> MiniMindLM:
        seed_everything(0)
        return MiniMindLM(models[args.weight]().config)

    names = dict.fromkeys([args.weight, *args.beside])
    return {name: fresh if name == UNTRAINED else models[name] for name in names}


def main() -> None:
    """Score the weights, one after the other, and print the scorecard."""
    args = parse_args()
    if args.weight == UNTRAINED:
        raise UserError(f"--weight {UNTRAINED}: it goes after --beside")
    device = find_processes(args.device, ddp=False).device
    tokenizer = load_tokenizer(args.tokenizer_path)
    questions = read_questions(args.data_path)
    answers = {
        Path(name).stem: answer(build().to(device), tokenizer, questions, args.batch_size)
        for name, build in open_models(args, tokenizer).items()
    }
    text = scorecard(questions, answers)
    if args.examples:
        text += "\n\n" + examples(questions, answers)
    print(text)
    if args.output:
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(text + "\n", encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"--output {args.output}: {error}") from None


if __name__ == "__main__":
    with report_user_errors():
        main()
