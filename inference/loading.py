"""Find the weights that flags or requests name, and load them."""

import json
import re
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common import TOKENIZER, Translate, UserError, format_number
from model import (
    LMConfig,
    MiniMindLM,
    Tokenizer,
    list_weights,
    load_lora,
    load_model,
    load_tokenizer,
    read_about,
    resolve_weights,
    tokenizer_folder,
    tokenizer_hash,
    weights_hash,
    weights_path,
)
from model.tokenizer import find_tokenizer
from model.weights import name_patterns, read_pickle

from . import chat_texts as texts
from .chat_model import ChatModel

MOST_LISTED = 10  # weights
PRETRAINED = "pretrain"  # the stage whose weights continue texts; those of all others answer


@dataclass(frozen=True)
class WeightSpec:
    """Which weights to use, as flags name them.

    `weight` is what `find_weights` takes, or a folder of an old version. None: the weights that the
    adapter was trained on; without an adapter the newest chat weights, or the newest pretrained
    ones if there are no others. `lora_name` is an adapter's name, its run's, or the whole name of
    its file; or its .pth file. Names are looked up in `out_dir` and the folders
    in it. `tokenizer_path` None: see `tokenizer_folder`. `dim`, `n_layers` and `use_moe` are the
    shape to look for, if given, and that of weights without a .json file.
    """

    out_dir: Path
    tokenizer_path: Path | None = None
    weight: str | None = None
    lora_name: str | None = None
    dim: int | None = None
    n_layers: int | None = None
    use_moe: bool | None = None

    @property
    def shape(self) -> dict[str, int | bool]:
        """The fields of the shape that are given, by the config's names."""
        given = {name: getattr(self, name) for name in ("dim", "n_layers", "use_moe")}
        return {name: value for name, value in given.items() if value is not None}


def list_adapters(out_dir: Path) -> list[Path]:
    """The adapters in a folder's lora/, by name, and then those of the folders in it."""
    found = []
    for path in (*sorted(out_dir.glob("lora/*.pth")), *sorted(out_dir.glob("*/lora/*.pth"))):
        with suppress(UserError):
            if "_resume" not in path.stem and adapted_base(path) is not None:
                found.append(path)
    return found


def adapted_base(path: Path) -> str | None:
    """The hash of the weights that an adapter was trained on; None if the file holds no adapter."""
    contents = read_pickle(path, mmap=True)
    return contents.get("base") if isinstance(contents, dict) else None


def is_pretrained(path: Path) -> bool:
    """Whether weights were only pretrained, by their .json file or else by their name."""
    about = read_about(path)
    stage = path.stem.partition("_")[0] if about is None else about["stage"]
    return stage == PRETRAINED


def choose_weights(spec: WeightSpec) -> Path:
    """The file of weights that `spec` names. Raises UserError."""
    if spec.weight is not None:
        return resolve_weights("--weight", spec.weight, spec.out_dir, spec.shape)
    matching = [
        (path, about)
        for path, about in list_weights(spec.out_dir, below=True)
        if spec.shape.items() <= vars(about["config"]).items()
    ]
    if not matching:
        flags = "".join(f" of --{name} {value}" for name, value in spec.shape.items())
        raise UserError(
            f"--out_dir {spec.out_dir}: no weights{flags} there; train some, or name a file "
            "with --weight"
        )
    return min(matching, key=lambda entry: entry[1]["stage"] == PRETRAINED)[0]


def describe_weights(out_dir: Path, say: Translate = str.format) -> list[str]:
    """A table of the weights in a folder and those in it, newest first; none if they are one."""
    found = list(list_weights(out_dir, below=True))
    if len(found) < 2:
        return []
    rows = []
    for path, about in found[:MOST_LISTED]:
        with torch.device("meta"):
            size = sum(p.numel() for p in MiniMindLM(about["config"]).parameters())
        when = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
        rows.append((str(path), format_number(size), about["stage"], f"{when:%Y-%m-%d %H:%M}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if len(found) > MOST_LISTED:
        lines.append(say(texts.MORE_WEIGHTS, count=len(found) - MOST_LISTED))
    return [say(texts.WEIGHTS), *(f"  {line}" for line in lines)]


def find_adapter(spec: WeightSpec, shape: LMConfig) -> Path:
    """The newest file that `spec.lora_name` names. Raises UserError, which names `shape`'s file."""
    folder = spec.out_dir / "lora"
    if spec.lora_name.endswith(".pth") and Path(spec.lora_name).is_file():
        return Path(spec.lora_name)
    for pattern in name_patterns(spec.lora_name, r"\d+" if spec.dim is None else f"{spec.dim}"):
        near = (*folder.glob("*.pth"), *spec.out_dir.glob("*/lora/*.pth"))
        if paths := [path for path in near if pattern.fullmatch(path.stem)]:
            return max(paths, key=lambda path: path.stat().st_mtime)
    wanted = spec.lora_name
    if not wanted.endswith(".pth"):
        wanted = weights_path(folder, wanted, shape)
    names = {re.sub(r"_\d+(_moe)?$", "", path.stem) for path in list_adapters(spec.out_dir)}
    there = ", ".join(sorted(names)) or "no adapter"
    raise UserError(f"--lora_name {spec.lora_name}: no file {wanted}; there is {there}")


def load_base(
    base: str, out_dir: Path, tokenizer: str | None, adapter: Path
) -> tuple[Path, MiniMindLM]:
    """Find and load the weights that an adapter was trained on: file and model.

    Args:
        base: hash of the weights.
        out_dir: folder of weights, in which and below which they are.
        tokenizer: hash of the tokenizer in use; None: any that is found near the weights.
        adapter: file or folder of the adapter, for errors.

    Raises UserError if they are not there or belong to another tokenizer.
    """
    near = (
        adapter.parent.parent
    )  # where a stage leaves the weights: tried first, as hashing is slow
    found = list_weights(out_dir, below=True)
    for path, about in sorted(found, key=lambda entry: entry[0].parent != near):
        try:
            model = load_model(path, about["config"], about["tokenizer"])
        except UserError:  # a damaged file is not what is looked for
            continue
        if weights_hash(model) == base:
            if tokenizer is None:
                belongs = find_tokenizer(path.parent, about["tokenizer"]) is not None
            else:
                belongs = tokenizer == about["tokenizer"]
            if not belongs:
                raise UserError(
                    f"{path}: trained with another tokenizer; --tokenizer_path names it"
                )
            return path, model
    raise UserError(
        f"{adapter}: the weights that it was trained on are not in {out_dir}; --weight names them"
    )


@dataclass(frozen=True)
class TrainedModel:
    """A model on the CPU, in eval mode, with what belongs to it.

    Attributes:
        name: name of the weights, and after a plus sign that of the adapter.
        path: file of the weights, or their folder.
        adapter: file of the adapter, or None.
        model: the model; its adapter is active and not merged.
        tokenizer: tokenizer of its ids.
        chats: whether it answers conversations; else it continues texts.
        longest_conversation, examples: as `read_about` gives them, of the base of an adapter.
    """

    name: str
    path: Path
    adapter: Path | None
    model: MiniMindLM
    tokenizer: Tokenizer
    chats: bool
    longest_conversation: dict[str, int] | None = None
    examples: Sequence[str] = ()


def load_chat_model(
    spec: WeightSpec, device: torch.device, engine: str | None = None, rows: int = 1
) -> ChatModel:
    """Load a model to answer with; for `engine` and `rows` see ChatModel, for errors below."""
    trained = load_trained(spec)
    return ChatModel(
        trained.name,
        trained.model.to(device),
        trained.tokenizer,
        trained.chats,
        engine,
        rows,
        trained.longest_conversation,
        trained.examples,
    )


def load_trained(spec: WeightSpec) -> TrainedModel:
    """Load weights, tokenizer and adapter.

    Raises UserError if they are not there or do not belong together.
    """
    if spec.weight is not None and Path(spec.weight).is_dir():
        folder = Path(spec.weight)
        model, tokenizer = load_folder(spec)
        return TrainedModel(folder.name, folder, None, model.eval(), tokenizer, chats=True)
    given = None  # the hash of the tokenizer, if a flag names one
    if spec.tokenizer_path is not None:
        given = tokenizer_hash(load_tokenizer(spec.tokenizer_path))
    try:
        shape = LMConfig(**spec.shape)
    except ValueError as error:
        raise UserError(f"--dim {spec.dim}: {error}") from None
    adapter = None if spec.lora_name is None else find_adapter(spec, shape)
    model = None
    if spec.weight is None and adapter is not None:
        base = adapted_base(adapter)
        if base is None:
            raise UserError(f"{adapter}: not an adapter")
        path, model = load_base(base, spec.out_dir, given, adapter)
    else:
        path = choose_weights(spec)
    tokenizer = load_tokenizer(tokenizer_folder(spec.tokenizer_path, path))
    if model is None:
        shape = replace(shape, vocab_size=len(tokenizer))
        model = load_model(path, shape, tokenizer_hash(tokenizer))
    name, chats = path.stem, not is_pretrained(path)
    if adapter is not None:
        load_lora(model, adapter)
        name, chats = f"{name}+{adapter.stem}", True  # adapters are trained on conversations
    about = read_about(path) or {"longest_conversation": None, "examples": ()}
    longest, examples = about["longest_conversation"], about["examples"]
    return TrainedModel(name, path, adapter, model.eval(), tokenizer, chats, longest, examples)


def load_folder(spec: WeightSpec) -> tuple[MiniMindLM, Tokenizer]:
    """Load a folder in transformers' format: config.json, model.safetensors, perhaps a tokenizer.

    `save_pretrained` wrote such folders when MiniMindLM was one of transformers' models.
    """
    folder = Path(spec.weight)
    if spec.lora_name is not None:
        raise UserError("--lora_name: needs the .pth file that the adapter was trained on")
    own = (folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(folder if own else spec.tokenizer_path or TOKENIZER)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != LMConfig.model_type:
            kind = config.get("model_type")
            raise ValueError(f"{kind}, an export? Name the .pth that it was made from")
        model = MiniMindLM(LMConfig.from_dict(config))
        state = load_file(folder / "model.safetensors")
        state.setdefault("output.weight", state.get("tok_embeddings.weight"))  # one tensor, tied
        model.load_state_dict(state)
    except (OSError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 200)  # PyTorch names every difference, a line each
        raise UserError(f"--weight {folder}: cannot be loaded ({reason})") from None
    if model.config.vocab_size != len(tokenizer):
        raise UserError(
            f"--weight {folder}: {model.config.vocab_size} ids, the tokenizer has "
            f"{len(tokenizer)}: --tokenizer_path names another"
        )
    return model, tokenizer
