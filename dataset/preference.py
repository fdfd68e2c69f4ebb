"""Pairs of a preferred and a rejected reply to one prompt, as samples, rows and batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .chat import ChatEncoder, Piece, render_chat
from .lm_dataset import CHUNK, ChatDataset
from .packing import collate, make_row
from .records import parse_preference
from .token_store import INDEX_DTYPE, ArrayFolder, ArrayWriter, Encoded, Parsed
from .turns import Kept, Turns, keep_replies

SIDES = ("chosen", "rejected")
PAIR_VERSION = 2  # of what `parse_preference` makes of a line
LOGP_DTYPE = np.dtype("<f4")


class PreferenceEncoder(ChatEncoder):
    """Lines with a pair to two documents: the prompt with the chosen reply, then with the other.

    The targets are the assistant's tokens after the messages that both share.
    """

    counted = ("tied_scores", "inverted_scores")

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.key = f"preference {PAIR_VERSION} {self.key}"

    def parse(self, line: bytes) -> Parsed:
        """The pieces of both conversations; no text is counted, as no score is by its bytes.

        Counted are scores that do not prefer the chosen reply. Raises RecordError.
        """
        pair = parse_preference(line)
        sides = []
        for messages in (pair.chosen, pair.rejected):
            scored = [{**m, "weight": float(i >= pair.shared)} for i, m in enumerate(messages)]
            sides.append(self.check_control(render_chat(scored, pair.tools)))
        chosen, rejected = pair.scores or (1, 0)
        return Parsed(tuple(sides), 0, (int(chosen == rejected), int(chosen < rejected)))

    def encode(self, records: Sequence[Sequence[Sequence[Piece]]]) -> Encoded:
        """Ids and weights of the conversations, two for each record."""
        return super().encode([side for record in records for side in record])


class DPODataset(ChatDataset):
    """The pairs of a JSONL file: two replies to one prompt, of which the first is preferred.

    `dataset[i]` is a dict of tensors, each (len,): `x_chosen`, `y_chosen` int64 and `mask_chosen`
    float32, 1 where predicting `y` is scored, and the same of `rejected`. Scored are the
    assistant's tokens, `</s>` included, after the messages that both sides share.

    Args:
        path: of the file, whose lines `dataset.records.parse_preference` reads.
        tokenizer: with this project's chat template.
        max_prompt_length: the most ids of a prompt, the header of the reply included. Of a longer
            one the oldest turns are left out, each whole, and the system message stays. Where the
            last turn alone is longer, there is no item.
        max_completion_length: the most ids of a reply; what is longer is cut at its end.
        cache_dir, skip_bad_lines: as for `TokenStore.open_or_build`.
    """

    _COLUMNS = {**ChatDataset._COLUMNS, "targets": INDEX_DTYPE}
    _SUMS = (*ChatDataset._SUMS, "targets")
    _COUNTED = PreferenceEncoder.counted
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
        tokenizer: Any,
        max_prompt_length: int,
        max_completion_length: int,
        *,
        cache_dir: str | Path | None = None,
        skip_bad_lines: float = 0.0,
    ) -> None:
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        super().__init__(
            path,
            PreferenceEncoder(tokenizer),
            max_prompt_length + max_completion_length,
            f"{max_prompt_length}_{max_completion_length}",
            cache_dir=cache_dir,
            skip_bad_lines=skip_bad_lines,
        )

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch, of both sides."""
        return self._items.meta["targets"]

    @property
    def n_positions(self) -> int:
        """The sum of the lengths of both sides."""
        return self._items.meta["positions"]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {}
        for side, document in zip(SIDES, self._both(self._document(index)), strict=True):
            ids = torch.from_numpy(self._read(self.store.ids, document).astype(np.int64))
            weights = torch.from_numpy(self._read(self.store.weights, document))
            item |= {f"x_{side}": ids[:-1], f"y_{side}": ids[1:], f"mask_{side}": weights[1:]}
        return item

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Positions of the longer side of the items `start` to `stop`: int64."""
        sides = self._both(2 * self._documents[start:stop])
        return np.maximum(*(self._kept_ids(documents) for documents in sides)) - 1

    @property
    def _n_stored(self) -> int:
        return len(self.store.lines) // 2

    def _document(self, index: int) -> int:
        """The document of the chosen side."""
        return 2 * super()._document(index)

    @staticmethod
    def _both(chosen: Any) -> tuple[Any, Any]:
        """The documents of both sides."""
        return chosen, chosen + 1

    def _keep(
        self,
        ids: np.ndarray,
        weights: np.ndarray,
        offsets: np.ndarray,
        turns: Turns,
        encoder: ChatEncoder,
    ) -> tuple[Kept, dict[str, np.ndarray]]:
        kept = keep_replies(
            turns, weights, offsets, self.max_prompt_length, self.max_completion_length
        )
        before = np.append(0, np.cumsum(weights > 0))
        return kept, {"targets": before[kept.ends] - before[kept.begins]}

    def _build_items(self, folder: Path, documents: np.ndarray) -> dict[str, Any]:
        """The array `documents` holds the pairs; sums are of both sides, of turns of the first."""
        kept = self._kept.arrays
        sums = (*self._SUMS, *self._COUNTED, "left_out", "positions")
        meta: dict[str, Any] = dict.fromkeys(sums, 0)
        with ArrayWriter(folder, documents=INDEX_DTYPE) as writer:
            for start in range(0, len(documents), CHUNK):
                pairs = documents[start : start + CHUNK]
                sides = self._both(2 * pairs)
                fits = np.logical_and(*(kept["ends"][d] > kept["begins"][d] for d in sides))
                writer.append("documents", pairs[fits])
                meta["left_out"] += int((~fits).sum())
                meta["dropped_turns"] += int(kept["dropped_turns"][sides[0][fits]].sum())
                for name in self._COUNTED:
                    meta[name] += int(self.store.counts(name)[sides[0][fits]].sum())
                for side in sides:
                    used = side[fits]
                    meta["cut_answers"] += int(kept["cut_answers"][used].sum())
                    meta["targets"] += int(kept["targets"][used].sum())
                    meta["positions"] += int(self._kept_ids(used).sum()) - len(used)
        return {"arrays": writer.description(), **meta}


class PairRows(Dataset):
    """The pairs of a DPODataset as rows, each with what the reference gives its two replies.

    Attributes:
        dataset: the pairs.
        lengths: (pairs,) positions of the longer side, int64.
    """

    def __init__(self, dataset: DPODataset) -> None:
        self.dataset = dataset
        self.lengths = dataset.lengths()
        self._reference: ArrayFolder | None = None

    def use_reference(self, key: str) -> bool:
        """Use what is kept of a reference from now on.

        Args:
            key: names the reference; fit for a file name.

        Returns:
            Whether anything is.
        """
        self._reference = self.dataset.store.find_derived(self._name(key))
        return self._reference is not None

    def keep_reference(self, key: str, logps: np.ndarray) -> None:
        """Keep what a reference gives the replies beside the data, and use it.

        Args:
            key: as for `use_reference`.
            logps: (pairs, 2) summed log-probabilities of chosen and rejected replies.

        Raises:
            UserError: if it cannot be written.
        """

        def write(folder: Path) -> dict[str, Any]:
            with ArrayWriter(folder, logps=LOGP_DTYPE) as writer:
                writer.append("logps", logps.flatten())
            return {"arrays": writer.description()}

        self._reference = self.dataset.store.derived(self._name(key), write)

    def _name(self, key: str) -> str:
        return f"reference_{key}_{self.dataset.items_key}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`chosen` and `rejected`, rows as those of `dataset.packing`, and `reference`, (2,)."""
        pair = self.dataset[index]
        sides = {
            side: make_row([tuple(pair[f"{name}_{side}"] for name in ("x", "y", "mask"))], index)
            for side in SIDES
        }
        logps = (0.0, 0.0)  # until there is a reference
        if self._reference is not None:
            logps = self._reference.arrays["logps"][2 * index : 2 * index + 2].tolist()
        return {**sides, "reference": torch.tensor(logps)}

    @property
    def fill(self) -> float:
        """The share of real tokens if each side were padded to the longer one of its pair."""
        return self.dataset.n_positions / (2 * int(self.lengths.sum()))


def collate_pairs(pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack pairs into a batch: all chosen rows, then all rejected ones.

    (2B, T) each as by `dataset.packing.collate`, `sample` (B,) and `reference` (2B,). No pairs at
    all give a batch of one pair of padding, with `sample` -1.
    """
    if not pairs:
        nothing = collate([])
        both = {name: torch.cat([values, values]) for name, values in nothing.items()}
        return {**both, "sample": nothing["sample"], "reference": torch.zeros(2)}
    batch = collate([pair[side] for side in SIDES for pair in pairs])
    reference = torch.stack([pair["reference"] for pair in pairs]).T.flatten()
    return {**batch, "sample": batch["sample"][: len(pairs)], "reference": reference}
