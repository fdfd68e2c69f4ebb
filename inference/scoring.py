"""How good a model is on data that it did not see: its loss, and its answers beside references."""

import csv
import re
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError
from dataset import PaddedRows, PretrainDataset, SFTDataset, collate, dataset_kind
from model import Decoder, TorchDecoder, mean_scores

from .answers import Question, new_file, read_questions, write_answers
from .chat_model import ChatModel

ROW = 512  # tokens of a text that are scored together, and the mean of a full batch's rows
RATINGS = ("relevance", "accuracy", "fluency", "completeness")  # 1 to 5, for a person to fill in


def score(
    chat_model: ChatModel,
    path: Path,
    out: Path | None,
    max_new_tokens: int,
    skip_bad_lines: float = 0.0,
) -> None:
    """Print perplexity and bits per byte, and for conversations how answers compare to references.

    Args:
        chat_model: the model; quantized, its loss is also compared with that of its full weights.
        path: JSONL file of texts or conversations.
        out: where a table of answers goes that a person can rate, or None.
        max_new_tokens: of an answer.
        skip_bad_lines: go on without lines that have errors, if they are at most this share.

    Raises:
        UserError: for bad lines.
        UserError: if something is missing.
    """
    kind = dataset_kind(path)
    compare = kind is SFTDataset and chat_model.encoder is not None
    if out is not None and not compare:
        raise UserError(f"--output_file {out}: only answers to conversations can be rated")
    with tempfile.TemporaryDirectory() as folder:  # nothing is left beside somebody's data
        row = chat_model.context if kind is SFTDataset else min(ROW, chat_model.context)
        dataset = kind(
            path, chat_model.tokenizer, row, cache_dir=folder, skip_bad_lines=skip_bad_lines
        )
        if not compare:
            print_loss(chat_model, dataset, path)
            return
        import_scorers()
        questions = read_questions(chat_model, path, skip_bad_lines=skip_bad_lines)
        asked = [question for question in questions if question.reference is not None]
        if not asked:
            raise UserError(f"--score {path}: no conversation ends with an answer")
        with nullcontext() if out is None else new_file(out, "utf-8-sig") as file:
            print_loss(chat_model, dataset, path)
            answers = write_answers(chat_model, asked, {"max_new_tokens": max_new_tokens})
            compare_answers(asked, answers, file)
    if out is not None:
        print(f"{out}: rate the answers from 1 to 5")


def print_loss(chat_model: ChatModel, dataset: PretrainDataset | SFTDataset, path: Path) -> None:
    """Print the loss, in three measures, of the samples of a file."""
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
    nats, targets = full = total_loss(chat_model, dataset)
    quantized = not isinstance(chat_model.decoder, TorchDecoder)
    if quantized:
        nats, targets = stepwise_loss(chat_model.decoder, dataset)
    figures = mean_scores(
        {"": {"loss": nats, "targets": targets, "text_bytes": dataset.text_bytes}}, "score"
    )
    print(f"{targets:,.0f} target tokens of {len(dataset):,} samples in {path}")
    told = f"loss {nats / targets:.4f} nats per token"
    told += f", perplexity {figures['score_perplexity']:.2f}"
    if "score_bits_per_byte" in figures:
        told += f", {figures['score_bits_per_byte']:.4f} bits per byte"
    print(told)
    if quantized:
        change = nats / full[0] - 1
        print(
            f"with full weights {full[0] / targets:.4f}: quantizing changed the loss by "
            f"{change:+.2%}"
        )


@torch.no_grad()
def total_loss(chat_model: ChatModel, dataset: PretrainDataset | SFTDataset) -> tuple[float, float]:
    """The loss of all targets in nats, each times its weight, and the sum of the weights."""
    rows, most = PaddedRows(dataset), len(chat_model.decoder.tokens)
    lengths = dataset.lengths()
    order = np.argsort(-lengths, kind="stable").tolist()
    nats = weights = 0.0
    while order:
        size = max(1, min(most, most * ROW // int(lengths[order[0]])))  # logits take the memory
        batch = collate([rows[i] for i in order[:size]])
        del order[:size]
        batch = {name: x.to(chat_model.model.device) for name, x in batch.items()}
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask", "position_ids")}
        logits = chat_model.model(**inputs).logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
        nats += float((losses * batch["loss_mask"].flatten()).sum())
        weights += float(batch["loss_mask"].sum())
    return nats, weights


@torch.no_grad()
def stepwise_loss(decoder: Decoder, dataset: PretrainDataset | SFTDataset) -> tuple[float, float]:
    """As `total_loss`, by a decoder that reads the texts as it would write them."""
    nats = weights = 0.0
    size = len(decoder.tokens)
    order = np.argsort(-dataset.lengths(), kind="stable").tolist()
    for start in range(0, len(order), size):
        batch = [dataset[i] for i in order[start : start + size]]  # the longest first
        for t in range(len(batch[0][0])):
            active = [row for row in batch if len(row[0]) > t]
            tokens = [int(x[t]) for x, _, _ in active]
            if t == 0:
                logits = torch.stack([decoder.prefill(i, [id_]) for i, id_ in enumerate(tokens)])
            else:
                logits = decoder.step(tokens)
            targets, mask = (torch.stack([row[i][t] for row in active]) for i in (1, 2))
            nats += float((F.cross_entropy(logits, targets, reduction="none") * mask).sum())
            weights += float(mask.sum())
    return nats, weights


def import_scorers() -> tuple[Any, Any]:
    """Sacrebleu, and the scorer of ROUGE.

    Raises:
        UserError: if one of them is not installed.
    """
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            f"--score: needs {error.name}: pip install -r scripts/requirements.txt"
        ) from None
    return sacrebleu, RougeScorer


class Characters:
    """A tokenizer for ROUGE: a word of letters and digits is a token, and so is a Chinese sign."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens, in lower case."""
        return re.findall(r"[a-z0-9]+|[^\W\sa-z0-9_]", text.lower())


def compare_answers(
    questions: Sequence[Question], answers: Sequence[str], out: TextIO | None
) -> None:
    """Print BLEU, chrF and ROUGE-L of answers beside the questions' own.

    Args:
        questions: each with a reference.
        answers: to them.
        out: a file for a table of both that a person can rate, or None.
    """
    sacrebleu, RougeScorer = import_scorers()
    wanted = [question.reference for question in questions]
    chinese = sum(bool(re.search("[一-鿿]", text)) for text in wanted) * 2 > len(wanted)
    bleu = sacrebleu.corpus_bleu(answers, [wanted], tokenize="zh" if chinese else "13a")
    chrf = sacrebleu.corpus_chrf(answers, [wanted])
    scorer = RougeScorer(["rougeL"], tokenizer=Characters())
    pairs = zip(wanted, answers, strict=True)
    rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]
    print(
        f"{len(questions):,} greedy answers beside their references: BLEU {bleu.score:.1f}, "
        f"chrF {chrf.score:.1f}, ROUGE-L {100 * sum(rouge) / len(rouge):.1f}"
    )
    if out is not None:
        table = csv.writer(out)
        table.writerow(["input", "reference", "answer", *RATINGS])
        for question, answer in zip(questions, answers, strict=True):
            table.writerow([question.text, question.reference, answer, *[""] * len(RATINGS)])
