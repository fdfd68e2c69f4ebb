"""The models that a server offers, each loaded when it is first asked for."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset import tokenizer_hash
from training import UserError, load_tokenizer

from .batcher import Batcher, QueueFull
from .weights import (
    PRETRAINED,
    WeightSpec,
    continues_texts,
    list_adapters,
    list_weights,
    load_talker,
)


class UnknownModel(Exception):
    """There is no model of that name."""


@dataclass(frozen=True)
class Offer:
    """A model that can be asked for.

    Attributes:
        path: its file, or folder.
        is_adapter: whether that is an adapter's.
        chats: whether it answers conversations; else it continues texts.
    """

    path: Path
    is_adapter: bool = False
    chats: bool = True


class ModelPool:
    """Batchers by name: of every weight in a folder, and of every adapter on its base.

    What a request names is looked up in this list; no name becomes a path.

    Args:
        spec: where to look; with `weight`, a file or a folder, or the name of one of the weights
            there, that alone is offered.
        device: to compute on.
        quantize: as for `load_talker`.
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
        self.batchers: dict[str, Batcher] = {}  # the one used last is last
        self._tokenizer = tokenizer_hash(load_tokenizer(spec.tokenizer_path))
        self._lock = threading.Lock()  # of `batchers`
        self._loading = threading.Lock()  # one model is loaded at a time

    def offers(self) -> dict[str, Offer]:
        """The models that there are now by name, the default first."""
        if self.spec.weight is not None:
            path = Path(self.spec.weight)
            return {path.stem: Offer(path, chats=path.is_dir() or not continues_texts(path))}
        chats: dict[str, Offer] = {}
        pretrained: dict[str, Offer] = {}
        for path, about in list_weights(self.spec.out_dir):
            if about["tokenizer"] == self._tokenizer:
                chat = about["stage"] != PRETRAINED
                (chats if chat else pretrained)[path.stem] = Offer(path, chats=chat)
        offers = {**chats, **pretrained}
        for path in list_adapters(self.spec.out_dir) if offers else ():
            offers.setdefault(path.stem, Offer(path, is_adapter=True))
        return offers

    def get(self, name: str) -> Batcher:
        """The batcher of a model, loaded now if need be; another one that is idle makes room.

        Raises:
            UnknownModel: if there is none of that name.
            QueueFull: if all that are loaded are busy.
            UserError: if it cannot be loaded.
        """
        if (batcher := self.find_loaded(name)) is not None:
            return batcher
        with self._loading:
            if (batcher := self.find_loaded(name)) is not None:  # meanwhile
                return batcher
            offer = self.offers().get(name)
            if offer is None:
                raise UnknownModel(name)
            self._make_room()
            flag = "lora_name" if offer.is_adapter else "weight"
            spec = replace(self.spec, **{flag: str(offer.path)})
            talker = load_talker(spec, self.device, self.quantize, self.rows + 1)
            batcher = Batcher(talker, self.rows, self.queue)
            with self._lock:
                self.batchers[name] = batcher
            return batcher

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
            if name not in self.batchers:
                return None
            self.batchers[name] = self.batchers.pop(name)
            return self.batchers[name]

    def _make_room(self) -> None:
        with self._lock:
            if len(self.batchers) < self.loaded:
                return
            for name, batcher in self.batchers.items():
                if batcher.close(only_if_idle=True):
                    del self.batchers[name]
                    return
        raise QueueFull(10.0)

    def close(self) -> None:
        """End all batchers."""
        with self._lock:
            for batcher in self.batchers.values():
                batcher.close()
            self.batchers.clear()
