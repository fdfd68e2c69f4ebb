"""How good a model is on data that it did not see: its loss, and its answers beside references."""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset import SFTDataset, open_dataset
from model import Decoder, TorchDecoder
from training import UserError

from .answers import read_questions, write_answers
from .talker import Talker

ROW = 512  # the most tokens of a text that are scored together
RATINGS = ("relevance", "accuracy", "fluency", "completeness")  # 1 to 5, for a person to fill in


def score(talker: Talker, path: Path, out: Path | None, max_new_tokens: int) -> None:
    """Print perplexity and bits per byte, and for conversations how answers compare to references.

    Args:
        talker: the model; quantized, its loss is also compared with that of its full weights.
        path: JSONL file of texts or conversations.
        out: where a table of answers goes that a person can rate, or None.
        max_new_tokens: of an answer.

    Raises:
        DataError: for bad lines.
        UserError: if something is missing.
    """
    if out is not None and out.exists():
        raise UserError(f"--output_file {out}: is there already")
    row = min(ROW, talker.context)
    dataset = open_dataset(path, talker.tokenizer, row)
    rows = [dataset[i] for i in range(len(dataset))]
    loss, targets = mean_loss(talker.decoder, rows)
    print(f"{targets:,.0f} target tokens of {len(rows):,} samples in {path}")
    print(
        f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, "
        f"{loss * targets / dataset.text_bytes / math.log(2):.4f} bits per byte"
    )
    if not isinstance(talker.decoder, TorchDecoder):
        full, _ = mean_loss(TorchDecoder(talker.model, len(talker.decoder.tokens)), rows)
        print(
            f"with full weights {full:.4f}: quantizing changed the loss by {loss / full - 1:+.2%}"
        )
    if isinstance(dataset, SFTDataset) and talker.encoder is not None:
        compare_answers(talker, path, out, max_new_tokens)
    elif out is not None:
        raise UserError(f"--output_file {out}: only answers to conversations can be rated")


@torch.no_grad()
def mean_loss(decoder: Decoder, rows: Sequence[tuple]) -> tuple[float, float]:
    """The mean loss of a target in nats, and the number of targets, weighted as in training.

    Args:
        decoder: computes them, as it would write the texts.
        rows: X, Y and loss_mask of each.
    """
    total = weights = 0.0
    size = len(decoder.tokens)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(order), size):
        batch = [rows[i] for i in order[start : start + size]]  # the longest first
        for row, (x, y, mask) in enumerate(batch):
            decoder.tokens[row] = []
            logits = decoder.prefill(row, x[:1].tolist())
            total += float(F.cross_entropy(logits.float(), y[0].to(logits.device)) * mask[0])
        for t in range(1, len(batch[0][0])):
            active = [row for row in batch if len(row[0]) > t]
            logits = decoder.step(torch.stack([x[t] for x, _, _ in active]).to(decoder.device))
            targets = torch.stack([y[t] for _, y, _ in active]).to(logits.device)
            losses = F.cross_entropy(logits.float(), targets, reduction="none").cpu()
            total += float((losses * torch.stack([mask[t] for _, _, mask in active])).sum())
        weights += float(sum(mask.sum() for _, _, mask in batch))
    return total / weights, weights


class Characters:
    """A tokenizer for ROUGE: a word of letters and digits is a token, and so is a Chinese sign."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens, in lower case."""
        return re.findall(r"[a-z0-9]+|[^\W\sa-z0-9_]", text.lower())


def compare_answers(talker: Talker, path: Path, out: Path | None, max_new_tokens: int) -> None:
    """Print BLEU, chrF and ROUGE-L of greedy answers to every last question of a conversation."""
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            f"--score: needs {error.name}: pip install -r scripts/requirements.txt"
        ) from None
    asked = [q for q in read_questions(talker, path) if q.reference is not None]
    if not asked:
        raise UserError(f"--score {path}: no conversation ends with an answer")
    generator = torch.Generator(talker.decoder.device)
    options = {"max_new_tokens": max_new_tokens}
    answers = write_answers(talker, asked, generator, options)
    wanted = [question.reference for question in asked]
    chinese = sum(bool(re.search("[一-鿿]", text)) for text in wanted) * 2 > len(wanted)
    bleu = sacrebleu.corpus_bleu(answers, [wanted], tokenize="zh" if chinese else "13a")
    chrf = sacrebleu.corpus_chrf(answers, [wanted])
    scorer = RougeScorer(["rougeL"], tokenizer=Characters())
    pairs = zip(wanted, answers, strict=True)
    rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]
    print(
        f"{len(asked):,} greedy answers beside their references: BLEU {bleu.score:.1f}, "
        f"chrF {chrf.score:.1f}, ROUGE-L {100 * sum(rouge) / len(rouge):.1f}"
    )
    if out is None:
        return
    try:
        with out.open("x", encoding="utf-8-sig", newline="") as file:  # as spreadsheets want it
            table = csv.writer(file)
            table.writerow(["input", "reference", "answer", *RATINGS])
            for question, answer in zip(asked, answers, strict=True):
                table.writerow([question.text, question.reference, answer, *[""] * len(RATINGS)])
    except OSError as error:
        raise UserError(f"--output_file {out}: {error.strerror}") from None
    print(f"{out}: rate the answers from 1 to 5")
