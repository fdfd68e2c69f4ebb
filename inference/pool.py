"""The models of a folder, each loaded when it is first asked for or its files have changed."""

import logging
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import UserError
from model import load_tokenizer, tokenizer_hash

from .batcher import Batcher, QueueFull
from .loading import (
    PRETRAINED,
    WeightSpec,
    is_pretrained,
    list_adapters,
    list_weights,
    load_chat_model,
)

LOG = logging.getLogger(__name__)
# Tells a file from another of the same name: time of change, size, inode. None: there is no file.
Version = tuple[int, int, int] | None


class UnknownModel(Exception):
    """There is no model of the name that is the error's text."""


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked for.

    Attributes:
        path: file or folder of its weights, or file of the adapter.
        modified: time of the last change of `path`, in seconds since 1970.
        is_adapter: whether `path` is an adapter.
        chats: whether the model answers conversations; else it continues texts.
    """

    path: Path
    modified: float
    is_adapter: bool = False
    chats: bool = True


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        batcher: generates with the model.
        card: what was loaded.
        versions: versions of the files that it was loaded from.
        refused: newer versions of these files that could not be loaded, if there are any.
    """

    batcher: Batcher
    card: ModelCard
    versions: tuple[Version, ...]
    refused: tuple[Version, ...] | None = None


class ModelPool:
    """The models of a folder by name: all weights, and all adapters on their bases.

    A name that a request gives is looked up among the cards; it never becomes a path. A model whose
    files have changed is loaded again when it is next asked for. The one in memory serves until
    then, finishes the requests that it has, and stays if the new files cannot be loaded.

    Args:
        spec: where to look. With `weight`, a file, a folder, or the name of weights in the folder,
            there is only that model.
        device: device to compute on.
        quantize: see ChatModel.
        rows, queue: see Batcher.
        loaded: how many models stay in memory.

    Raises:
        UserError: if `weight` is no file or folder, or the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        spec: WeightSpec,
        device: torch.device,
        quantize: str | None,
        rows: int,
        queue: int,
        loaded: int,
    ):
        if spec.weight is not None and not Path(spec.weight).exists():
            named = spec.out_dir / f"{spec.weight}.pth"
            if not named.is_file():
                raise UserError(f"--weight {spec.weight}: no such file")
            spec = replace(spec, weight=str(named))
        self.spec = spec
        self.device = device
        self.quantize = quantize
        self.rows, self.queue, self.loaded = rows, queue, loaded
        self.models: dict[str, LoadedModel] = {}  # by name, the one used last is the last
        # Batchers that were replaced and still have requests: their threads keep them alive.
        self._replaced: weakref.WeakSet[Batcher] = weakref.WeakSet()
        self._loads: dict[str, Future[Batcher]] = {}  # that have begun or wait for others
        self._loader = ThreadPoolExecutor(1, "loader")
        self._lock = threading.Lock()  # held to read or change the three above
        names = ("tokenizer.json", "tokenizer_config.json")  # these determine what it does
        self._tokenizer_files = [spec.tokenizer_path / name for name in names]
        self._tokenizer_versions = file_versions(self._tokenizer_files)
        self._tokenizer = tokenizer_hash(load_tokenizer(spec.tokenizer_path))

    def cards(self) -> dict[str, ModelCard]:
        """The models that can be asked for by name, the default first.

        The card of a model in memory is that of its loading, whatever its files have become.
        """
        cards = self._cards_on_disk()
        with self._lock:
            cards.update((name, model.card) for name, model in self.models.items())
        return cards

    def _cards_on_disk(self) -> dict[str, ModelCard]:
        if self.spec.weight is not None:
            path = Path(self.spec.weight)
            with suppress(OSError):  # it is gone
                chats = path.is_dir() or not is_pretrained(path)
                return {path.stem: ModelCard(path, modified(path), chats=chats)}
            return {}
        self._reload_tokenizer()
        cards = []
        for path, about in list_weights(self.spec.out_dir):
            if about["tokenizer"] == self._tokenizer:
                with suppress(OSError):
                    chats = about["stage"] != PRETRAINED
                    cards.append(ModelCard(path, modified(path), chats=chats))
        cards.sort(key=lambda card: not card.chats)
        by_name = {card.path.stem: card for card in cards}
        for path in list_adapters(self.spec.out_dir) if cards else ():
            with suppress(OSError):
                by_name.setdefault(path.stem, ModelCard(path, modified(path), is_adapter=True))
        return by_name

    def _reload_tokenizer(self) -> None:
        """Note the hash of the tokenizer in the folder now, if it can be loaded."""
        versions = file_versions(self._tokenizer_files)
        if versions != self._tokenizer_versions:
            self._tokenizer_versions = versions
            try:
                self._tokenizer = tokenizer_hash(load_tokenizer(self.spec.tokenizer_path))
            except UserError as error:
                LOG.warning("%s", error)

    def get(self, name: str) -> Batcher:
        """The batcher of a model; waits for what `load` gives, and raises the same errors."""
        return self.load(name).result()

    def load(self, name: str) -> "Future[Batcher]":
        """Load a model on the loader's thread, unless it is in memory.

        Requests for a model that is being loaded share one load. If it replaces one in memory, the
        request that finds the change waits for it; those that come meanwhile get the old one.

        Returns:
            The batcher, once there is one. It may raise UserError if the model cannot be loaded,
            QueueFull if no other model can make room for it, and UnknownModel.

        Raises:
            UnknownModel: if there is none of that name.
        """
        model = self.find_loaded(name)
        is_current = model is not None and not self._is_outdated(model)
        if model is None and name not in self._cards_on_disk():
            raise UnknownModel(name)
        with self._lock:
            load = self._loads.get(name)
            if is_current or (model is not None and load is not None):
                done: Future[Batcher] = Future()
                done.set_result(model.batcher)
                return done
            if load is None:
                load = self._loads[name] = self._loader.submit(self._load, name)
            return load

    def _load(self, name: str) -> Batcher:
        """Do the work of `load`."""
        try:
            old = self.find_loaded(name)
            if old is not None and not self._is_outdated(old):  # since a moment ago
                return old.batcher
            model = self._read_first(name) if old is None else self._read_again(name, old)
            with self._lock:
                self.models[name] = model
                if old is not None and model.batcher is not old.batcher:
                    self._replaced.add(old.batcher)
                    old.batcher.retire()
            return model.batcher
        finally:
            with self._lock:
                del self._loads[name]

    def _read_first(self, name: str) -> LoadedModel:
        card = self._cards_on_disk().get(name)
        if card is None:
            raise UnknownModel(name)
        self._make_room()
        return self._read(card)

    def _read_again(self, name: str, old: LoadedModel) -> LoadedModel:
        """Load the changed files of a model; if that fails, keep the old one."""
        versions = self._versions(old.card)
        try:
            return self._read(old.card)
        except Exception as error:  # also that both do not fit into memory
            LOG.warning(
                "%s: its files have changed and cannot be loaded; the old ones stay in use: %s",
                name,
                error,
                exc_info=not isinstance(error, UserError),
            )
            return replace(old, refused=versions)

    def _read(self, card: ModelCard) -> LoadedModel:
        versions = self._versions(card)  # first: a later change shows at the next request
        try:
            card = replace(card, modified=modified(card.path))
        except OSError as error:
            raise UserError(f"{card.path}: {error.strerror}") from None
        flag = "lora_name" if card.is_adapter else "weight"
        spec = replace(self.spec, **{flag: str(card.path)})
        chat_model = load_chat_model(spec, self.device, self.quantize, self.rows + 1)
        card = replace(card, chats=chat_model.encoder is not None)
        return LoadedModel(Batcher(chat_model, self.rows, self.queue), card, versions)

    def _is_outdated(self, model: LoadedModel) -> bool:
        """Whether a model's files have changed, and the change was not refused.

        Files that are missing, as while they are being replaced, are no change.
        """
        versions = self._versions(model.card)
        return versions[0] is not None and versions not in (model.versions, model.refused)

    def _versions(self, card: ModelCard) -> tuple[Version, ...]:
        """Versions of the files that a model is loaded from, its own first.

        An adapter's base is not among them: there is only one that fits.
        """
        files = [card.path]
        if card.path.is_dir():
            with suppress(OSError):
                files += sorted(card.path.iterdir())
        elif not card.is_adapter:
            files.append(card.path.with_suffix(".json"))
        return file_versions([*files, *self._tokenizer_files])

    def _make_room(self) -> None:
        with self._lock:
            if len(self.models) < self.loaded:
                return
            for name, model in self.models.items():
                if model.batcher.close(only_if_idle=True):
                    del self.models[name]
                    return
        raise QueueFull(10.0)

    def load_first(self) -> list[UserError]:
        """Load the first model that can be loaded, and return the errors of those before it.

        Raises:
            UserError: the first model's, if none can be loaded.
        """
        errors = []
        for name in self.cards():
            try:
                self.get(name)
                return errors
            except UserError as error:
                errors.append(error)
        raise errors[0]

    def find_loaded(self, name: str) -> LoadedModel | None:
        """The model of that name if it is in memory, which counts as its use."""
        with self._lock:
            model = self.models.pop(name, None)
            if model is not None:
                self.models[name] = model
            return model

    def batchers(self) -> list[Batcher]:
        """The batchers of all models in memory, and replaced ones that still have requests."""
        with self._lock:
            return [*(model.batcher for model in self.models.values()), *self._replaced]

    def close(self) -> None:
        """End all batchers, and begin no further load."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        for batcher in self.batchers():
            batcher.close()
        with self._lock:
            self.models.clear()


def modified(path: Path) -> float:
    """Time of the last change of a file, or of the newest file in a folder. Raises OSError."""
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files)


def file_versions(files: Iterable[Path]) -> tuple[Version, ...]:
    """The version of each file."""
    versions: list[Version] = []
    for file in files:
        try:
            status = file.stat()
            versions.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            versions.append(None)
    return tuple(versions)
