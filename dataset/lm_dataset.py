"""Data sets of training samples, in file order; `dataset.packing` makes batches of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .arrays import INDEX_DTYPE, LENGTH_DTYPE
from .chat import ChatEncoder
from .reader import read_records
from .records import record_kind
from .stored import ChatDataset, StoredDataset
from .text import TextEncoder
from .token_store import ROLES, Encoded
from .turns import USER, Spans, Turns, equal_answers, find_turns, keep_answers, keep_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT, TRIES = 100, 10  # of an example question: characters at most, conversations looked at


class PretrainDataset(StoredDataset):
    """The texts of a JSONL file, `{"text"}`, as samples for next-token prediction.

    A document is `<s>` text `</s>`. An item holds at most `max_length` of its ids; of a longer
    document, consecutive items share one id, so that each token after `<s>` is a target once.

    `dataset[i]` is `(X, Y, loss_mask)`, each (len,): `X = ids[:-1]` and `Y = ids[1:]` int64,
    `loss_mask` float32 (1 where predicting `Y` is to be learnt). Arguments: see `StoredDataset`.
    """

    _ENCODER = TextEncoder
    _COLUMNS = {**StoredDataset._COLUMNS, "text_bytes": INDEX_DTYPE}

    @property
    def _options(self) -> str:
        return f"{self.max_length}"

    @property
    def n_documents(self) -> int:
        """Texts, each of which has items."""
        return self._items.meta["records"]

    @property
    def n_tokens(self) -> int:
        """Targets in one epoch: all ids but each document's first."""
        return self.n_positions

    def _tabulate(self, first: int, stop: int, encoder: TextEncoder) -> dict[str, np.ndarray]:
        offsets = self.store.offsets[first : stop + 1]
        text_bytes = self.store.arrays["bytes"][first:stop]
        items = -((1 - np.diff(offsets)) // (self.max_length - 1))  # of each document
        documents = np.repeat(np.arange(len(items)), items)
        number = np.arange(len(documents)) - np.repeat(np.cumsum(items) - items, items)
        begins = offsets[documents] + number * (self.max_length - 1)
        return {
            "documents": first + documents,
            "prefixes": np.zeros_like(documents),
            "begins": begins,
            "lengths": np.minimum(offsets[documents + 1] - begins, self.max_length),
            "text_bytes": np.where(number == 0, text_bytes[documents], 0),
        }


class SFTDataset(ChatDataset):
    """The conversations of a JSONL file as samples for instruction tuning; see `parse_chat`.

    The targets are all tokens of the assistant's messages and the `</s>` after each, except of
    answers without text, reasoning and calls. What is left out of a conversation that is longer
    than `max_length` ids: see `keep_answers`. One without a target has no item.

    `dataset[i]` is `(X, Y, loss_mask)`, each (len,): `X = ids[:-1]` and `Y = ids[1:]` int64,
    `loss_mask` float32, the weight of each target and 0 elsewhere.

    Args:
        path, tokenizer, max_length, options: see `StoredDataset`.
        max_turns: how many of the last turns to use; None: all.
        loss_weighting: "token" gives each target the weight of its message (1 unless the record
            sets it); "sample" divides that among the targets of an answer.
    """

    _COLUMNS = {
        **ChatDataset._COLUMNS,
        **dict.fromkeys(("exchanges", "targets"), LENGTH_DTYPE),
        "text_bytes": np.dtype("<f8"),
    }
    _REASONS = {**ChatDataset._REASONS, "empty_answers": "empty answers not learnt"}

    def __init__(
        self,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        *,
        max_turns: int | None = None,
        loss_weighting: Literal["token", "sample"] = "token",
        **options: Any,
    ) -> None:
        if loss_weighting not in ("token", "sample"):
            raise ValueError(f"loss_weighting {loss_weighting!r} is neither token nor sample")
        self.max_turns = max_turns
        self.loss_weighting = loss_weighting
        super().__init__(path, tokenizer, max_length, **options)

    @property
    def _options(self) -> str:
        return f"{self.max_length}_{self.max_turns or 'all'}_{self.loss_weighting}"

    def roles(self, index: int) -> list[str]:
        """The role of the message that each id of item `index` is in: one for each, X[0] first."""
        positions = self._positions(*self._rows(index))
        messages = np.searchsorted(self.store.arrays["messages"], positions, side="right") - 1
        return [ROLES[role] for role in self.store.arrays["roles"][messages]]

    @property
    def longest_conversation(self) -> dict[str, int]:
        """The most exchanges, and the most tokens, that an item takes of a conversation."""
        table = self._items.arrays
        return {"exchanges": int(table["exchanges"].max()), "tokens": int(table["lengths"].max())}

    def questions(self, tokenizer: "PreTrainedTokenizerBase", number: int) -> list[str]:
        """First questions of up to `number` conversations, of one short line each."""
        found: dict[str, None] = {}
        for index in np.random.default_rng(0).integers(len(self), size=TRIES * number):
            document = self._document(self._rows(int(index))[0])
            chat = self.store.read(document, document + 1)
            begins = np.append(chat.messages, len(chat.ids))
            first = int(np.flatnonzero(chat.roles == USER)[0])
            ids = chat.ids[begins[first] : begins[first + 1]].tolist()
            text = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
            text = text.removeprefix(f"{ROLES[USER]}\n").strip()
            if 0 < len(text) <= SHORT and len(text.splitlines()) == 1:
                found[text] = None
            if len(found) == number:
                break
        return list(found)

    def _weights(self, positions: np.ndarray) -> np.ndarray:
        return self._weigh(super()._weights(positions))

    def _weigh(self, weights: np.ndarray) -> np.ndarray:
        return equal_answers(weights) if self.loss_weighting == "sample" else weights

    def _keep(
        self, chats: Encoded, turns: Turns, encoder: ChatEncoder
    ) -> tuple[Spans, dict[str, np.ndarray]]:
        spans = keep_answers(
            turns, chats.weights, encoder.newline_length, self.max_length, self.max_turns
        )
        position = np.arange(len(chats.ids))
        begins, ends = (np.repeat(border, chats.lengths) for border in (spans.begins, spans.ends))
        weights = np.where((begins <= position) & (position < ends), chats.weights, 0)
        text_bytes = self._weigh(weights).astype(np.float64) * encoder.byte_counts[chats.ids]
        starts = chats.offsets[:-1]
        first, end = (np.searchsorted(turns.users, border) for border in (spans.begins, spans.ends))
        return spans, {
            "exchanges": end - first,
            "targets": np.add.reduceat(weights > 0, starts, dtype=np.int64),
            "text_bytes": np.add.reduceat(text_bytes, starts),
        }


class RLAIFDataset(ChatDataset):
    """The last question of each conversation of a JSONL file, and the answer that it has there.

    `dataset[i]` is {"prompt", "answer"}, two strings: the conversation up to the last assistant
    message as the chat template renders it, generation prompt included; and that message, without
    its reasoning. A prompt has at most `max_length` ids: of a longer one the oldest turns are left
    out, each whole, and the system message stays. Where the last turn alone is longer, there is no
    item. Arguments: see `StoredDataset`.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        **options: Any,
    ) -> None:
        super().__init__(path, tokenizer, max_length, **options)
        encoder = ChatEncoder(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._header_length, self._newline_length = encoder.header_length, encoder.newline_length
        self._end_think = encoder.end_think

    @property
    def _options(self) -> str:
        return f"prompts_{self.max_length}"

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": self._decode(self.prompt_ids(index)), "answer": self._answer(index)}

    def prompt_ids(self, index: int) -> torch.Tensor:
        """(len,) int64, the prompt of item `index`; no text in it has become a control token."""
        ids = self.store.ids[self._positions(*self._rows(index))]
        return torch.from_numpy(ids.astype(np.int64))

    def _answer(self, index: int) -> str:
        document = self._document(*self._rows(index))
        chat = self.store.read(document, document + 1)
        turns = find_turns(chat)
        end = turns.ends[0] - self._newline_length - 1
        ids = chat.ids[turns.answers[0] + self._header_length : end]
        thoughts = np.flatnonzero(ids == self._end_think)
        if len(thoughts):
            return self._decode(ids[thoughts[0] + 1 :]).removeprefix("\n")
        return self._decode(ids)

    def _decode(self, ids: np.ndarray | torch.Tensor) -> str:
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def _keep(
        self, chats: Encoded, turns: Turns, encoder: ChatEncoder
    ) -> tuple[Spans, dict[str, np.ndarray]]:
        ends = turns.answers + encoder.header_length
        return keep_prompts(turns, ends, ends, self.max_length, 0), {}


def dataset_kind(path: str | Path) -> type[PretrainDataset] | type[SFTDataset]:
    """The data set for a source: of texts if its first record is one, else of conversations."""
    _, first = next(read_records(Path(path)), (None, b""))
    return PretrainDataset if record_kind(first) == "text" else SFTDataset
