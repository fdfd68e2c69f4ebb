"""The models that a server offers, each loaded when it is first asked for."""

import logging
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import UserError
from model import load_tokenizer, tokenizer_hash

from .batcher import Batcher, QueueFull
from .weights import (
    PRETRAINED,
    WeightSpec,
    continues_texts,
    list_adapters,
    list_weights,
    load_chat_model,
)

LOG = logging.getLogger(__name__)
# What tells a file from another one of its name: time of change, size, inode. None: not there.
Version = tuple[int, int, int] | None


class UnknownModel(Exception):
    """There is no model of that name."""


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked for.

    Attributes:
        path: its file, or folder.
        modified: when that was last changed, in seconds since 1970.
        is_adapter: whether that is an adapter's.
        chats: whether it answers conversations; else it continues texts.
    """

    path: Path
    modified: float
    is_adapter: bool = False
    chats: bool = True


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        batcher: writes its texts.
        offer: what was loaded.
        versions: of the files that it came from.
        refused: newer versions of them that could not be loaded, if there are any.
    """

    batcher: Batcher
    offer: ModelCard
    versions: tuple[Version, ...]
    refused: tuple[Version, ...] | None = None


class ModelPool:
    """Batchers by name: of every weight in a folder, and of every adapter on its base.

    What a request names is looked up in this list; no name becomes a path. A model whose files have
    changed is loaded again when it is next asked for. The one in memory goes on until that is done,
    and ends when the texts that it has begun are written; it stays if the new files are no good.

    Args:
        spec: where to look; with `weight`, a file or a folder, or the name of one of the weights
            there, that alone is offered.
        device: to compute on.
        quantize: as for `load_chat_model`.
        rows, queue: of each Batcher.
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
        self.models: dict[str, LoadedModel] = {}  # in memory, the one used last is last
        # That still write the texts that they have begun: their threads keep them alive.
        self._replaced: weakref.WeakSet[Batcher] = weakref.WeakSet()
        self._tokenizer_files = tokenizer_files(spec.tokenizer_path)
        self._tokenizer_versions = versions_of(self._tokenizer_files)
        self._tokenizer = tokenizer_hash(load_tokenizer(spec.tokenizer_path))
        self._lock = threading.Lock()  # of `models` and `_replaced`
        self._loading = threading.Lock()  # one model is loaded at a time

    def offers(self) -> dict[str, ModelCard]:
        """The models that can be asked for now by name, the default first.

        One that is in memory is told as it was loaded, whatever its files have become.
        """
        offers = self._find_offers()
        with self._lock:
            offers.update((name, model.offer) for name, model in self.models.items())
        return offers

    def _find_offers(self) -> dict[str, ModelCard]:
        """The models that there are on disk."""
        if self.spec.weight is not None:
            path = Path(self.spec.weight)
            with suppress(OSError):  # it is gone
                chats = path.is_dir() or not continues_texts(path)
                return {path.stem: ModelCard(path, modified(path), chats=chats)}
            return {}
        self._follow_tokenizer()
        chats: dict[str, ModelCard] = {}
        pretrained: dict[str, ModelCard] = {}
        for path, about in list_weights(self.spec.out_dir):
            if about["tokenizer"] == self._tokenizer:
                chat = about["stage"] != PRETRAINED
                with suppress(OSError):
                    offer = ModelCard(path, modified(path), chats=chat)
                    (chats if chat else pretrained)[path.stem] = offer
        offers = {**chats, **pretrained}
        for path in list_adapters(self.spec.out_dir) if offers else ():
            with suppress(OSError):
                offers.setdefault(path.stem, ModelCard(path, modified(path), is_adapter=True))
        return offers

    def _follow_tokenizer(self) -> None:
        """Note which tokenizer is in its folder now; one that cannot be loaded changes nothing."""
        versions = versions_of(self._tokenizer_files)
        if versions == self._tokenizer_versions:
            return
        self._tokenizer_versions = versions
        try:
            self._tokenizer = tokenizer_hash(load_tokenizer(self.spec.tokenizer_path))
        except UserError as error:
            LOG.warning("%s", error)

    def get(self, name: str) -> Batcher:
        """The batcher of a model, loaded now if need be; another one that is idle makes room.

        While models are being loaded, one that is in memory is given as it is.

        Raises:
            UnknownModel: if there is none of that name.
            QueueFull: if all that are loaded are busy.
            UserError: if it cannot be loaded.
        """
        batcher = self.find_loaded(name)
        if batcher is not None and not self.is_outdated(name):
            return batcher
        if not self._loading.acquire(blocking=batcher is None):
            return batcher
        try:
            with self._lock:
                model = self.models.get(name)
            if model is None:
                return self._load(name).batcher
            if self.is_outdated(name):  # still
                return self._load_again(name, model).batcher
            return model.batcher
        finally:
            self._loading.release()

    def _load(self, name: str) -> LoadedModel:
        offer = self._find_offers().get(name)
        if offer is None:
            raise UnknownModel(name)
        self._make_room()
        model = self._read(offer)
        with self._lock:
            self.models[name] = model
        return model

    def _load_again(self, name: str, old: LoadedModel) -> LoadedModel:
        """Put what its files hold now in the place of a model; if that cannot be, it stays."""
        versions = self._versions(old.offer)
        try:
            model = self._read(old.offer)
        except Exception as error:  # also that both do not fit into memory
            LOG.warning(
                "%s: its files have changed and cannot be loaded; it goes on as it was: %s",
                name,
                error,
                exc_info=not isinstance(error, UserError),
            )
            model = replace(old, refused=versions)
        with self._lock:
            self.models[name] = model
            if model.batcher is not old.batcher:
                self._replaced.add(old.batcher)
                old.batcher.retire()
        return model

    def _read(self, offer: ModelCard) -> LoadedModel:
        """Load a model. Raises UserError."""
        versions = self._versions(offer)  # first: a change from here on is seen at the next request
        try:
            offer = replace(offer, modified=modified(offer.path))
        except OSError as error:
            raise UserError(f"{offer.path}: {error.strerror}") from None
        flag = "lora_name" if offer.is_adapter else "weight"
        spec = replace(self.spec, **{flag: str(offer.path)})
        chat_model = load_chat_model(spec, self.device, self.quantize, self.rows + 1)
        batcher = Batcher(chat_model, self.rows, self.queue)
        return LoadedModel(batcher, replace(offer, chats=chat_model.encoder is not None), versions)

    def is_outdated(self, name: str) -> bool:
        """Whether a model in memory is not what its files hold now, as far as they can be loaded.

        Files that are gone, as while they are being replaced, do not make it so.
        """
        with self._lock:
            model = self.models.get(name)
        if model is None:
            return False
        versions = self._versions(model.offer)
        return versions[0] is not None and versions not in (model.versions, model.refused)

    def _versions(self, offer: ModelCard) -> tuple[Version, ...]:
        """Those of the files that a model comes from, its own first.

        An adapter's base is no part of them: it is what the adapter was trained on, or none.
        """
        files = [offer.path]
        if offer.path.is_dir():
            with suppress(OSError):
                files += sorted(offer.path.iterdir())
        elif not offer.is_adapter:
            files.append(offer.path.with_suffix(".json"))
        return versions_of([*files, *self._tokenizer_files])

    def load_first(self) -> list[UserError]:
        """Load the first model that can be loaded: what is wrong with those before it.

        Raises:
            UserError: if none can be: what is wrong with the first.
        """
        errors = []
        for name in self.offers():
            try:
                self.get(name)
                return errors
            except UserError as error:
                errors.append(error)
        raise errors[0]

    def find_loaded(self, name: str) -> Batcher | None:
        """The batcher of a model that is in memory; None for all others."""
        with self._lock:
            if name not in self.models:
                return None
            self.models[name] = self.models.pop(name)
            return self.models[name].batcher

    def batchers(self) -> list[Batcher]:
        """Those of all models in memory, also of replaced ones that still write."""
        with self._lock:
            return [*(model.batcher for model in self.models.values()), *self._replaced]

    def _make_room(self) -> None:
        with self._lock:
            if len(self.models) < self.loaded:
                return
            for name, model in self.models.items():
                if model.batcher.close(only_if_idle=True):
                    del self.models[name]
                    return
        raise QueueFull(10.0)

    def close(self) -> None:
        """End all batchers."""
        for batcher in self.batchers():
            batcher.close()
        with self._lock:
            self.models.clear()


def modified(path: Path) -> float:
    """When a file was last changed; of a folder, the newest file in it. Raises OSError."""
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files)


def tokenizer_files(folder: Path) -> list[Path]:
    """What of a tokenizer's folder decides what it does."""
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


def versions_of(files: Iterable[Path]) -> tuple[Version, ...]:
    """What tells files from others of their names."""
    versions: list[Version] = []
    for file in files:
        try:
            status = file.stat()
            versions.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            versions.append(None)
    return tuple(versions)
