"""Score a model on data that it was not trained on: its loss, and its answers beside references."""

import csv
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError
from dataset import PaddedRows, PretrainDataset, SFTDataset, collate, dataset_kind
from model import Decoder, mean_scores, token_losses

from .answers import Question, generate_answers, new_file, read_questions
from .chat_model import ChatModel

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

ROW = 512  # tokens of a text that are scored together, and the mean of a full batch's rows
RATINGS = ("relevance", "accuracy", "fluency", "completeness")  # 1 to 5, for a person to fill in

Messages = Sequence[Mapping[str, Any]]  # of the assistant


def score(
    chat_model: ChatModel,
    path: Path,
    out: Path | None,
    max_new_tokens: int,
    skip_bad_lines: float,
    enable_thinking: bool | None = None,
) -> None:
    """Print perplexity and bits per byte, and for conversations how answers compare to references.

    Contents are compared with contents, and calls with calls; `enable_thinking` is the prompts'.
    The loss of a quantized model is compared with that of its full weights. `out` is a file for a
    table of answers that a person can rate. Raises UserError for more bad lines than the share
    `skip_bad_lines`, or a package that is not installed.
    """
    kind = dataset_kind(path)
    compares = kind is SFTDataset and chat_model.encoder is not None
    if out is not None and not compares:
        raise UserError(f"--output_file {out}: only answers to conversations can be rated")
    with tempfile.TemporaryDirectory() as folder:  # nothing is left beside the data
        row = chat_model.context if kind is SFTDataset else min(ROW, chat_model.context)
        options = {"cache_dir": folder, "skip_bad_lines": skip_bad_lines}
        dataset = kind(path, chat_model.tokenizer, row, **options)
        if not compares:
            print_loss(chat_model, dataset, path)
            return
        scorer = rouge_scorer()
        questions = read_questions(
            chat_model, path, skip_bad_lines, enable_thinking=enable_thinking, with_calls=True
        )
        questions = [question for question in questions if question.reference is not None]
        if not questions:
            raise UserError(f"--score {path}: no conversation ends with an answer")
        with nullcontext() if out is None else new_file(out, "utf-8-sig") as file:
            print_loss(chat_model, dataset, path)
            prompts = [question.ids for question in questions]
            thinking = [question.thinking for question in questions]
            answers = generate_answers(chat_model, prompts, thinking, max_new_tokens=max_new_tokens)
            references = [question.reference for question in questions]
            compare_contents(references, answers, scorer)
            compare_calls(references, answers)
            if file is not None:
                write_table(questions, answers, file)
    if out is not None:
        print(f"{out}: rate the answers from 1 to 5")


def print_loss(chat_model: ChatModel, dataset: PretrainDataset | SFTDataset, path: Path) -> None:
    """Print the loss of a file's samples in three measures."""
    if dataset.n_bad_lines:
        print(f"{dataset.n_bad_lines:,} bad lines of the file left out")
    if isinstance(dataset, SFTDataset):
        if dataset.counts["empty_answers"]:
            print(f"{dataset.counts['empty_answers']:,} empty answers not scored")
        dropped, cut = (dataset.counts[name] for name in ("dropped_turns", "cut_answers"))
        if dropped or cut:
            print(
                f"beyond the context of {chat_model.context} tokens: {dropped:,} turns left out, "
                f"{cut:,} answers cut"
            )
    full_nats, targets = total_loss(chat_model, dataset)
    is_quantized = chat_model.engine == "int8"
    nats = decoder_loss(chat_model.decoder, dataset) if is_quantized else full_nats
    sums = {"loss": nats, "targets": targets, "text_bytes": dataset.text_bytes}
    scores = mean_scores({"": sums}, "score")
    print(f"{targets:,.0f} target tokens of {len(dataset):,} samples in {path}")
    line = f"loss {scores['score_loss']:.4f} nats per token"
    line += f", perplexity {scores['score_perplexity']:.2f}"
    if "score_bits_per_byte" in scores:
        line += f", {scores['score_bits_per_byte']:.4f} bits per byte"
    print(line)
    if is_quantized:
        print(
            f"with full weights {full_nats / targets:.4f}: quantizing changed the loss by "
            f"{nats / full_nats - 1:+.2%}"
        )


@torch.no_grad()
def total_loss(chat_model: ChatModel, dataset: PretrainDataset | SFTDataset) -> tuple[float, float]:
    """The weighted loss of all targets in nats, and the sum of their weights."""
    samples, rows = PaddedRows(dataset), len(chat_model.decoder.tokens)
    lengths = dataset.lengths()
    order = np.argsort(-lengths).tolist()
    nats = weights = 0.0
    while order:
        size = max(1, min(rows, rows * ROW // int(lengths[order[0]])))  # logits take the memory
        batch = collate([samples[i] for i in order[:size]])
        del order[:size]
        batch = {name: x.to(chat_model.model.device) for name, x in batch.items()}
        losses, *_ = token_losses(chat_model.model, batch)
        nats += float(losses.sum())
        weights += float(batch["loss_mask"].sum())
    return nats, weights


@torch.no_grad()
def decoder_loss(decoder: Decoder, dataset: PretrainDataset | SFTDataset) -> float:
    """The weighted loss of all targets in nats, by the logits of a decoder."""
    nats = 0.0
    for inputs, targets, mask in map(dataset.__getitem__, range(len(dataset))):
        logits = torch.cat([*decoder.prefill_in_chunks(0, inputs.tolist(), all_logits=True)])
        nats += float((F.cross_entropy(logits, targets, reduction="none") * mask).sum())
    return nats


def rouge_scorer() -> "RougeScorer":
    """The scorer of ROUGE-L. Raises UserError if it or sacrebleu is not installed."""
    try:
        import sacrebleu  # noqa: F401  which `compare_answers` needs
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        hint = "pip install -r scripts/requirements.txt"
        raise UserError(f"--score: needs {error.name}: {hint}") from None
    return RougeScorer(["rougeL"], tokenizer=WordsAndCharacters())


class WordsAndCharacters:
    """A tokenizer for ROUGE: words of Latin letters and digits, and single Chinese characters."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens, in lower case."""
        return re.findall(r"[a-z0-9]+|[^\W\sa-z0-9_]", text.lower())


def compare_contents(references: Messages, answers: Messages, scorer: "RougeScorer") -> None:
    """Print BLEU, chrF and ROUGE-L of contents, where the reference has one."""
    import sacrebleu

    pairs = [
        (wanted["content"], answer["content"])
        for wanted, answer in zip(references, answers, strict=True)
        if wanted["content"]
    ]
    if not pairs:
        return
    references, answers = zip(*pairs, strict=True)
    n_chinese = sum(bool(re.search("[一-鿿]", text)) for text in references)
    tokenizer = "zh" if 2 * n_chinese > len(references) else "13a"
    bleu = sacrebleu.corpus_bleu(answers, [references], tokenize=tokenizer)
    chrf = sacrebleu.corpus_chrf(answers, [references])
    rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]
    print(
        f"{len(pairs):,} greedy answers beside their references: BLEU {bleu.score:.1f}, "
        f"chrF {chrf.score:.1f}, ROUGE-L {100 * sum(rouge) / len(rouge):.1f}"
    )


def compare_calls(references: Messages, answers: Messages) -> None:
    """Print how often answers call the tools that their references call, and only then.

    Calls are the same if names and values of arguments are, whatever the spaces in their JSON.
    """
    pairs = list(zip(references, answers, strict=True))
    called = [pair for pair in pairs if pair[0].get("tool_calls")]
    others = [answer for wanted, answer in pairs if not wanted.get("tool_calls")]
    unneeded = sum(is_call(answer) for answer in others)
    if called:
        valid = sum(is_call(answer) and "broken_calls" not in answer for _, answer in called)
        named = sum(_names(wanted) == _names(answer) for wanted, answer in called)
        exact = sum(_calls(wanted) == _calls(answer) for wanted, answer in called)
        print(
            f"{len(called):,} answers that must call tools: {valid / len(called):.1%} call any by "
            f"valid JSON, {named / len(called):.1%} the right ones, {exact / len(called):.1%} with "
            "the very arguments"
        )
    if others and (called or unneeded):
        print(f"{len(others):,} that need not: {unneeded / len(others):.1%} call one")


def is_call(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message calls a tool, or tries to."""
    return bool(message.get("tool_calls") or message.get("broken_calls"))


def _names(message: Mapping[str, Any]) -> list[str]:
    return [call["name"] for call in message.get("tool_calls", ())]


def _calls(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of the arguments."""
    return [(call["name"], _value(call["arguments"])) for call in message.get("tool_calls", ())]


def _value(arguments: Any) -> Any:
    """The arguments of a call, which may be JSON of them."""
    with suppress(ValueError, RecursionError, TypeError):
        return json.loads(arguments)
    return arguments


def write_table(questions: Sequence[Question], answers: Messages, file: TextIO) -> None:
    """Write a table of references and answers, with empty columns for a person's ratings."""
    table = csv.writer(file)
    table.writerow(["input", "reference", "answer", *RATINGS])
    for question, answer in zip(questions, answers, strict=True):
        texts = [_shown(question.reference), _shown(answer)]
        table.writerow([question.text, *texts, *[""] * len(RATINGS)])


def _shown(message: Mapping[str, Any]) -> str:
    """What a user gets to see of a message: its content, and calls as the model writes them."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"]] * bool(message["content"]) + calls)
