"""Find the weights that flags or requests name, and load them."""

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common import UserError
from model import (
    LMConfig,
    MiniMindLM,
    Tokenizer,
    load_lora,
    load_model,
    load_tokenizer,
    read_about,
    resolve_weights,
    tokenizer_hash,
    weights_hash,
    weights_path,
)
from model.weights import read_pickle

from .chat_model import ChatModel

PRETRAINED = "pretrain"  # the stage whose weights continue texts; those of all others answer


@dataclass(frozen=True)
class WeightSpec:
    """Which weights to use, as flags name them.

    `weight` is a stage's name or a run's (its --run_name), of whose weights the newest are used;
    the whole name of a file in `out_dir`; a .pth file; or a folder of an old version. None:
    the weights that the adapter was trained on; without an adapter the newest chat weights, or the
    newest pretrained ones if there are no others. `lora_name` is an adapter's name, its run's, or
    the whole name of its file; or its .pth file. `dim`, `n_layers` and `use_moe` are the shape to
    look for, if given, and that of weights without a .json file.
    """

    out_dir: Path
    tokenizer_path: Path
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


def list_weights(out_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The .pth files in a folder that a .json file describes, newest first, with its content."""
    found = []
    for path in out_dir.glob("*.pth"):
        with suppress(UserError, OSError):  # of no use, or gone meanwhile
            if about := read_about(path):
                found.append((path.stat().st_mtime, path, about))
    for _, path, about in sorted(found, key=lambda entry: entry[0], reverse=True):
        yield path, about


def list_adapters(out_dir: Path) -> list[Path]:
    """The adapters in a folder's lora/, by name."""
    found = []
    for path in sorted((out_dir / "lora").glob("*.pth")):
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


def name_patterns(name: str, dim: str = r"\d+") -> tuple[re.Pattern[str], ...]:
    """Patterns of the file names that a stage, an adapter or a run may have, the likelier first."""
    name = re.escape(name)
    return re.compile(rf"{name}_{dim}(_moe)?|{name}"), re.compile(rf".+_{dim}(_moe)?_{name}")


def find_weights(spec: WeightSpec, shape: LMConfig) -> Path:
    """The newest file that `spec` names; without a .json it has `shape`. Raises UserError."""
    matching = [
        (path, about)
        for path, about in list_weights(spec.out_dir)
        if spec.shape.items() <= vars(about["config"]).items()
    ]
    if spec.weight is None:
        if not matching:
            flags = "".join(f" of --{name} {value}" for name, value in spec.shape.items())
            raise UserError(
                f"--out_dir {spec.out_dir}: no weights{flags} there; train some, or name a file "
                "with --weight"
            )
        return min(matching, key=lambda entry: entry[1]["stage"] == PRETRAINED)[0]
    if not spec.weight.endswith(".pth"):
        for pattern in name_patterns(spec.weight):
            for path, _ in matching:
                if pattern.fullmatch(path.stem):
                    return path
    return resolve_weights("--weight", spec.weight, spec.out_dir, shape)


def find_adapter(spec: WeightSpec, shape: LMConfig) -> Path:
    """The newest file that `spec.lora_name` names. Raises UserError, which names `shape`'s file."""
    folder = spec.out_dir / "lora"
    if spec.lora_name.endswith(".pth"):
        return resolve_weights("--lora_name", spec.lora_name, folder, shape)
    for pattern in name_patterns(spec.lora_name, r"\d+" if spec.dim is None else f"{spec.dim}"):
        if paths := [path for path in folder.glob("*.pth") if pattern.fullmatch(path.stem)]:
            return max(paths, key=lambda path: path.stat().st_mtime)
    wanted = weights_path(folder, spec.lora_name, shape)
    names = {re.sub(r"_\d+(_moe)?$", "", path.stem) for path in list_adapters(spec.out_dir)}
    there = ", ".join(sorted(names)) or "no adapter"
    raise UserError(f"--lora_name {spec.lora_name}: no file {wanted}; there is {there}")


def load_base(base: str, out_dir: Path, tokenizer: str, adapter: Path) -> tuple[Path, MiniMindLM]:
    """Find and load the weights that an adapter was trained on: file and model.

    Args:
        base: hash of the weights.
        out_dir: folder of weights.
        tokenizer: hash of the tokenizer in use.
        adapter: file or folder of the adapter, for errors.

    Raises UserError if they are not there or belong to another tokenizer.
    """
    for path, about in list_weights(out_dir):
        try:
            model = load_model(path, about["config"], about["tokenizer"])
        except UserError:  # a damaged file is not what is looked for
            continue
        if weights_hash(model) == base:
            if about["tokenizer"] != tokenizer:
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
    tokenizer = load_tokenizer(spec.tokenizer_path)
    hash_ = tokenizer_hash(tokenizer)
    try:
        shape = LMConfig(vocab_size=len(tokenizer), **spec.shape)
    except ValueError as error:
        raise UserError(f"--dim {spec.dim}: {error}") from None
    adapter = None if spec.lora_name is None else find_adapter(spec, shape)
    if spec.weight is None and adapter is not None:
        base = adapted_base(adapter)
        if base is None:
            raise UserError(f"{adapter}: not an adapter")
        path, model = load_base(base, spec.out_dir, hash_, adapter)
    else:
        path = find_weights(spec, shape)
        model = load_model(path, shape, hash_)
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
    tokenizer = load_tokenizer(folder if own else spec.tokenizer_path)
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
