"""The models that a server offers, each loaded when it is first asked for."""

import threading
from dataclasses import replace
from pathlib import Path

import torch

from dataset import tokenizer_hash
from model import weights_hash
from training import UserError, load_model, load_tokenizer, read_about
from training.checkpoint import read_pickle

from .batcher import Batcher, QueueFull
from .weights import Choice, list_weights, load_talker


class ModelPool:
    """Batchers by name: of every weight in a folder, and of every adapter on its base.

    What a request names is looked up in this list; no name becomes a path.

    Args:
        choice: where to look; with `weight`, that alone is offered.
        device: to compute on.
        quantize: as for `load_talker`.
        rows, queue: of each Batcher.
        loaded: how many models stay in memory.
    """

    def __init__(
        self,
        choice: Choice,
        device: torch.device,
        quantize: str | None,
        rows: int,
        queue: int,
        loaded: int,
    ):
        self.choice = choice
        self.device = device
        self.quantize = quantize
        self.rows, self.queue, self.loaded = rows, queue, loaded
        self.batchers: dict[str, Batcher] = {}  # the one used last is last
        self._tokenizer = tokenizer_hash(load_tokenizer(choice.tokenizer_path))
        self._lock = threading.Lock()

    def names(self) -> dict[str, Path]:
        """The file of every model that there is now, the default first."""
        if self.choice.weight is not None:
            path = Path(self.choice.weight)
            return {path.stem: path}
        found: dict[str, Path] = {}
        pretrained: dict[str, Path] = {}
        for path in list_weights(self.choice.out_dir):
            about = read_about(path)
            if about["tokenizer"] == self._tokenizer:
                (pretrained if about["stage"] == "pretrain" else found)[path.stem] = path
        adapters = sorted((self.choice.out_dir / "lora").glob("*.pth"))
        lora = {p.stem: p for p in adapters if not p.stem.endswith(("_resume", "_resume.prev"))}
        return {**lora, **pretrained, **found} if not found else {**found, **pretrained, **lora}

    def get(self, name: str) -> Batcher:
        """The batcher of a model, loaded now if need be; another one that is idle makes room.

        Raises:
            KeyError: if there is no model of that name.
            QueueFull: if all that are loaded are busy.
            UserError: if the model cannot be loaded.
        """
        with self._lock:
            if name in self.batchers:
                self.batchers[name] = self.batchers.pop(name)
                return self.batchers[name]
            path = self.names()[name]
            if len(self.batchers) >= self.loaded:
                idle = [other for other, batcher in self.batchers.items() if not batcher.load]
                if not idle:
                    raise QueueFull(10.0)
                self.batchers.pop(idle[0]).close()
            choice = replace(self.choice, weight=str(path))
            if path.parent.name == "lora":
                choice = replace(choice, weight=str(self._base(path)), lora_name=str(path))
            rows = Batcher.rows_for(self.rows)
            talker = load_talker(choice, self.device, self.quantize, rows)
            self.batchers[name] = Batcher(talker, self.rows, self.queue)
            return self.batchers[name]

    def _base(self, adapter: Path) -> Path:
        """The weights that an adapter was trained on."""
        wanted = read_pickle(adapter, mmap=True)["base"]
        for path in list_weights(self.choice.out_dir):
            about = read_about(path)
            if about["tokenizer"] == self._tokenizer:
                model = load_model(path, about["config"], self._tokenizer)
                if weights_hash(model) == wanted:
                    return path
        raise UserError(f"{adapter}: the weights it was trained on are not in {path.parent}")

    def close(self) -> None:
        """End all batchers."""
        with self._lock:
            for batcher in self.batchers.values():
                batcher.close()
            self.batchers.clear()
