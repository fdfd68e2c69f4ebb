"""The models of a folder, each loaded when it is first asked for or its files have changed."""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from common import UserError
from model import list_weights, load_tokenizer, read_about, tokenizer_hash
from model.tokenizer import find_tokenizer, tokenizer_files
from model.weights import CONVERSATIONS

from .batcher import Batcher, QueueFull
from .loading import (
    PRETRAINED,
    WeightSpec,
    choose_weights,
    is_pretrained,
    list_adapters,
    load_chat_model,
)

LOG = logging.getLogger(__name__)
# Of each file: its path, time of change, size and inode, which tells it from others of its name.
Versions = list[tuple[Path, int, int, int]]


class UnknownModel(Exception):
    """There is no model of the name that is the error's text."""


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked for."""

    path: Path  # file or folder of its weights, or file of the adapter
    modified: float  # when `path` was changed, in seconds since 1970
    is_adapter: bool = False
    chats: bool = True  # answers conversations; else it continues texts
    # As `read_about` gives them; of an adapter, whose base has them, only once it is loaded.
    longest_conversation: dict[str, int] | None = None
    examples: Sequence[str] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, what it was loaded from, and the file versions that were last tried."""

    batcher: Batcher
    card: ModelCard
    versions: Versions


@dataclass(eq=False)
class ModelPool:
    """The models of a folder by name: all weights, and all adapters on their bases.

    A name that a request gives is looked up among the cards; it never becomes a path. A model whose
    files have changed is loaded again when it is next asked for. The one in memory serves until
    then, finishes the requests that it has, and stays if the new files cannot be loaded.

    With `spec.weight`, a file, a folder, or the name of weights in the folder, there is only that
    model. Raises UserError if it is not there, or the tokenizer cannot be loaded.
    """

    spec: WeightSpec
    device: torch.device
    engine: str | None  # see ChatModel
    rows: int  # see Batcher
    queue: int
    loaded: int  # how many models stay in memory
    history_cnt: int | None = None  # in place of each model's own; see `ChatModel.recent`
    models: dict[str, LoadedModel] = field(default_factory=dict)  # the last one was used last

    def __post_init__(self) -> None:
        weight = self.spec.weight
        if weight is not None and not Path(weight).exists():
            self.spec = replace(self.spec, weight=str(choose_weights(self.spec)))
        self._loads: dict[str, Future[Batcher]] = {}  # that have begun or wait for others
        self._loader = ThreadPoolExecutor(1, "loader")
        self._lock = threading.Lock()  # held to read or change the two dicts
        self._tokenizer: str | None = None  # the hash of the one that a flag names
        if self.spec.tokenizer_path is not None:
            self._tokenizer = tokenizer_hash(load_tokenizer(self.spec.tokenizer_path))
        # By folder of weights and hash: the files looked at, and whether its tokenizer is there.
        self._found: dict[tuple[Path, str], tuple[Versions, bool]] = {}

    def cards(self) -> dict[str, ModelCard]:
        """The models that can be asked for, the default first; those in memory as at loading."""
        cards = self._cards_on_disk()
        with self._lock:
            cards.update((name, model.card) for name, model in self.models.items())
        return cards

    def _cards_on_disk(self) -> dict[str, ModelCard]:
        cards: dict[str, ModelCard] = {}

        def add(
            path: Path,
            folder: Path = self.spec.out_dir,
            about: Mapping[str, Any] | None = None,
            **kind: bool,
        ) -> None:
            below = folder != self.spec.out_dir and self.spec.weight is None
            name = f"{folder.name}/{path.stem}" if below else path.stem
            known = {key: about[key] for key in CONVERSATIONS} if about else {}
            with suppress(OSError):  # it is gone
                card = ModelCard(path, path.stat().st_mtime, **kind, **known)
                cards.setdefault(name, card)

        if self.spec.weight is not None:
            path = Path(self.spec.weight)
            about = None if path.is_dir() else read_about(path)
            add(path, about=about, chats=path.is_dir() or not is_pretrained(path))
            return cards
        if self.spec.tokenizer_path is not None:
            try:
                self._tokenizer = tokenizer_hash(load_tokenizer(self.spec.tokenizer_path))
            except UserError as error:
                LOG.warning("%s", error)
        found = list_weights(self.spec.out_dir, below=True)
        for path, about in sorted(found, key=lambda entry: entry[1]["stage"] == PRETRAINED):
            if self._has_tokenizer(path, about["tokenizer"]):
                add(path, path.parent, about, chats=about["stage"] != PRETRAINED)
        for path in list_adapters(self.spec.out_dir) if cards else ():
            add(path, path.parent.parent, is_adapter=True)
        return cards

    def _has_tokenizer(self, path: Path, hash_: str) -> bool:
        """Whether the tokenizer of weights is the one that a flag names, or else is near them."""
        if self._tokenizer is not None:
            return hash_ == self._tokenizer
        key = path.parent, hash_
        versions = versions_of(tokenizer_files(*key))
        if key not in self._found or self._found[key][0] != versions:
            self._found[key] = versions, find_tokenizer(*key) is not None
        return self._found[key][1]

    def get(self, name: str) -> Batcher:
        """The batcher of a model; waits for what `load` gives, and raises its errors."""
        return self.load(name).result()

    def load(self, name: str) -> "Future[Batcher]":
        """Load a model on the loader's thread, unless it is in memory.

        Requests for a model that is being loaded share one load. If it replaces one in memory, the
        request that finds the change waits for it; those that come meanwhile get the old one. The
        result may be UnknownModel, UserError if the model cannot be loaded, or QueueFull if no
        other model can make room for it.
        """
        with self._lock:
            model = self.models.pop(name, None)
            if model is not None:
                self.models[name] = model  # as the one used last
            load = self._loads.get(name)
            if model is not None and (load is not None or not is_outdated(model)):
                load = Future()
                load.set_result(model.batcher)
            elif load is None:
                load = self._loads[name] = self._loader.submit(self._load, name)
            return load

    def _load(self, name: str) -> Batcher:
        try:
            old = self.models.get(name)
            if old is None:
                card = self._cards_on_disk().get(name)
                if card is None:
                    raise UnknownModel(name)
                self._make_room()
                model = self._read(card)
            else:
                model = self._read_again(old)
            with self._lock:
                self.models[name] = model
            if old is not None and old.batcher is not model.batcher:
                old.batcher.retire()
            return model.batcher
        finally:
            with self._lock:
                del self._loads[name]

    def _read_again(self, old: LoadedModel) -> LoadedModel:
        """Load the changed files of a model; if that fails, keep the old one."""
        versions = file_versions(old.card)
        try:
            return self._read(old.card)
        except Exception as error:  # also that both do not fit into memory
            text = "its files have changed and cannot be loaded; the old ones stay in use"
            unexpected = not isinstance(error, UserError)
            LOG.warning("%s: %s: %s", old.card.path.stem, text, error, exc_info=unexpected)
            return replace(old, versions=versions)

    def _read(self, card: ModelCard) -> LoadedModel:
        versions = file_versions(card)  # first: a later change shows at the next request
        card = replace(card, modified=card.path.stat().st_mtime)
        flag = "lora_name" if card.is_adapter else "weight"
        spec = replace(self.spec, **{flag: str(card.path)})
        chat_model = load_chat_model(spec, self.device, self.engine, self.rows + 1)
        card = replace(card, **{key: getattr(chat_model, key) for key in CONVERSATIONS})
        if self.history_cnt is not None:
            chat_model.history_cnt = self.history_cnt
        return LoadedModel(Batcher(chat_model, self.rows, self.queue), card, versions)

    def _make_room(self) -> None:
        """Drop the model that was not used for the longest time and has no requests."""
        with self._lock:
            if len(self.models) < self.loaded:
                return
            for name, model in self.models.items():
                if not model.batcher.load:
                    self.models.pop(name).batcher.retire()
                    return
        raise QueueFull(10.0)

    def load_first(self) -> list[UserError]:
        """Load the first model that can be loaded; return or raise the errors before it."""
        errors = []
        for name in self.cards():
            try:
                self.get(name)
                return errors
            except UserError as error:
                errors.append(error)
        raise errors[0]

    def batchers(self) -> list[Batcher]:
        """The batchers of all models in memory."""
        with self._lock:
            return [model.batcher for model in self.models.values()]

    def close(self) -> None:
        """End all requests, and begin no further load."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        for batcher in self.batchers():
            batcher.close()


def is_outdated(model: LoadedModel) -> bool:
    """Whether a model's files are there and have changed since they were last tried."""
    return model.card.path.exists() and file_versions(model.card) != model.versions


def file_versions(card: ModelCard) -> Versions:
    """Versions of the files that a model is loaded from, without an adapter's base: one fits."""
    path = card.path
    return versions_of(
        sorted(path.iterdir()) if path.is_dir() else (path, path.with_suffix(".json"))
    )


def versions_of(files: Iterable[Path]) -> Versions:
    """The versions of those of the files that are there."""
    versions = []
    for file in files:
        with suppress(OSError):
            status = file.stat()
            versions.append((file, status.st_mtime_ns, status.st_size, status.st_ino))
    return versions
