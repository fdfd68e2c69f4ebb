"""Pairs of a preferred and a rejected reply to one prompt, as samples, rows and batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .arrays import LENGTH_DTYPE, ArrayFolder, build_once, find_arrays
from .chat import ChatEncoder, Piece, render_chat
from .packing import collate, make_row
from .reader import Record
from .records import DEFAULT, RecordOptions, pair_judged, parse_preference
from .stored import ChatDataset
from .token_store import Encoded, Parsed
from .turns import Spans, Turns, keep_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
PAIR_VERSION = 3  # of what `parse_preference` makes of a line


class PreferenceEncoder(ChatEncoder):
    """Encodes a pair as two documents: the prompt with the chosen reply, then with the other.

    The targets are the assistant's tokens after the messages that both share. Counted are scores
    that do not prefer the chosen reply.
    """

    counted = ("tied_scores", "inverted_scores")

    prepare = staticmethod(pair_judged)

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", options: RecordOptions = DEFAULT
    ) -> None:
        super().__init__(tokenizer, options)
        self.key = f"preference {PAIR_VERSION} {self.key}"

    def parse(self, record: Record) -> Parsed:
        """The pieces of both conversations, and counts. Raises RecordError or LeftOut."""
        pair = parse_preference(record, self.options)
        sides = []
        for messages in (pair.chosen, pair.rejected):
            scored = [{**m, "weight": float(i >= pair.shared)} for i, m in enumerate(messages)]
            sides.append(self.check_control(render_chat(scored, pair.tools)))
        chosen, rejected = pair.scores or (1, 0)
        return sides, (int(chosen == rejected), int(chosen < rejected))

    def encode(self, records: Sequence[Sequence[Sequence[Piece]]]) -> Encoded:
        """Encode the conversations, two for each record."""
        return super().encode([side for record in records for side in record])


class DPODataset(ChatDataset):
    """The pairs of a JSONL file: two replies to one prompt, the first preferred.

    `dataset[i]` is a dict of tensors, each (len,): `x_chosen`, `y_chosen` int64 and `mask_chosen`
    float32, 1 where predicting `y` is scored, and the same of `rejected`. Scored are the
    assistant's tokens, `</s>` included, after the messages that both sides share.

    Args:
        max_prompt_length: most ids of a prompt, the header of the reply included; longer ones are
            treated as by `RLAIFDataset`.
        max_completion_length: most ids of a reply; what is longer is cut at its end.
        path, tokenizer, options: see `StoredDataset`.
    """

    _ENCODER = PreferenceEncoder
    _DOCUMENTS = len(SIDES)
    _COLUMNS = {**ChatDataset._COLUMNS, "targets": LENGTH_DTYPE}
    _REASONS = {
        "dropped_turns": "turns of prompts left out: longer than --max_prompt_length",
        "cut_answers": "replies cut: longer than --max_completion_length",
        "left_out": "pairs left out: their last turn is longer than --max_prompt_length",
        "tied_scores": "pairs whose two scores are equal",
        "inverted_scores": "pairs whose rejected reply has the higher score",
    }

    def __init__(
        self,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        max_prompt_length: int,
        max_completion_length: int,
        **options: Any,
    ) -> None:
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        max_length = max_prompt_length + max_completion_length
        super().__init__(path, tokenizer, max_length, **options)

    @property
    def _options(self) -> str:
        return f"{self.max_prompt_length}_{self.max_completion_length}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {}
        for side, row in zip(SIDES, self._rows(index), strict=True):
            item[f"x_{side}"], item[f"y_{side}"], item[f"mask_{side}"] = self._sample(row)
        return item

    def _keep(
        self, chats: Encoded, turns: Turns, encoder: ChatEncoder
    ) -> tuple[Spans, dict[str, np.ndarray]]:
        targets, offsets = np.flatnonzero(chats.weights > 0), chats.offsets
        begins = targets[np.searchsorted(targets, offsets[:-1])]
        ends = targets[np.searchsorted(targets, offsets[1:]) - 1] + 1
        spans = keep_prompts(
            turns, begins, ends, self.max_prompt_length, self.max_completion_length
        )
        spans.dropped_turns[1::2] = 0  # those of the prompt, which both sides share, count once
        before = np.append(0, np.cumsum(chats.weights > 0))
        return spans, {"targets": before[spans.ends] - before[spans.begins]}


class PairRows(Dataset):
    """The pairs of a DPODataset as rows, each with what the reference gives its two replies.

    `lengths` (pairs,) int64 are the positions of the longer side of each.
    """

    def __init__(self, dataset: DPODataset) -> None:
        self.dataset = dataset
        self.lengths = dataset.lengths()
        self._cached_reference: ArrayFolder | None = None

    def use_reference(self, key: str) -> bool:
        """Use the cached log-probabilities of the reference `key`; whether there are any."""
        self._cached_reference = find_arrays(self._folder(key))
        return self._cached_reference is not None

    def keep_reference(self, key: str, logps: np.ndarray) -> None:
        """Cache log-probabilities of the reference `key` beside the data, and use them.

        `logps` is (pairs, 2), summed over chosen and rejected replies.
        """
        self._cached_reference = build_once(
            self._folder(key),
            {"logps": np.dtype("<f4")},
            lambda append: append(logps=logps.flatten()),
        )

    def _folder(self, key: str) -> Path:
        return self.dataset.store.folder / f"reference_{key}_{self.dataset.items_key}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`chosen` and `rejected`, rows as `make_row` makes them, and `reference`, (2,)."""
        pair = self.dataset[index]
        sides = {
            side: make_row([tuple(pair[f"{name}_{side}"] for name in ("x", "y", "mask"))], index)
            for side in SIDES
        }
        logps = (0.0, 0.0)  # until there is a reference
        if self._cached_reference is not None:
            logps = self._cached_reference.arrays["logps"][2 * index : 2 * index + 2].tolist()
        return {**sides, "reference": torch.tensor(logps)}

    @property
    def fill(self) -> float:
        """The share of real tokens if each side were padded to the longer one of its pair."""
        return self.dataset.n_positions / (2 * int(self.lengths.sum()))


def collate_pairs(pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack pairs as `collate` does rows, all chosen ones first, then all rejected ones.

    (2B, T) each, `sample` (B,) and `reference` (2B,). No pairs at all give one pair of padding.
    """
    if not pairs:
        nothing = collate([])
        both = {name: torch.cat([values, values]) for name, values in nothing.items()}
        return {**both, "sample": nothing["sample"], "reference": torch.zeros(2)}
    batch = collate([pair[side] for side in SIDES for pair in pairs])
    reference = torch.stack([pair["reference"] for pair in pairs]).T.flatten()
    return {**batch, "sample": batch["sample"][: len(pairs)], "reference": reference}
