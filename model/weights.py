"""Weights on disk: a state_dict, and beside it a JSON file that describes the model."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import TOKENIZER, UserError, is_run_name, report_save_errors, write_atomically

from .LMConfig import LMConfig
from .model import MiniMindLM
from .model_lora import (
    apply_lora,
    load_lora_state,
    lora_settings,
    lora_state,
    state_difference,
    weights_hash,
)
from .tokenizer import find_tokenizer

MOST_NAMED = 8  # files, in an error
# What `read_about` gives of the conversations that weights were trained on.
CONVERSATIONS = ("longest_conversation", "examples")


def weights_path(out_dir: Path, stage: str, config: LMConfig, run_name: str | None = None) -> Path:
    """The path of a stage's weights: `{out_dir}/{stage}_{dim}{_moe}{_run_name}.pth`."""
    moe, run = "_moe" if config.use_moe else "", f"_{run_name}" if run_name else ""
    return out_dir / f"{stage}_{config.dim}{moe}{run}.pth"


def resolve_weights(flag: str, name: str, out_dir: Path, shape: Mapping[str, Any]) -> Path:
    """The file that `find_weights` finds; UserError if there is none."""
    path = find_weights(flag, name, out_dir, shape)
    if path is None:
        usual = Path(name) if name.endswith(".pth") else _usual_path(out_dir, name, shape)
        raise UserError(f"{flag} {name}: no file {usual}; {_what_is_there(usual.parent)}")
    return path


def find_weights(flag: str, name: str, out_dir: Path, shape: Mapping[str, Any]) -> Path | None:
    """The file of weights that a flag names, of any shape that has the fields of `shape`.

    `name` is a .pth file; or the name of a stage, of whose weights the newest are taken, the whole
    name of a file, or a --run_name: in `out_dir`, else in the folders in it. A file in `out_dir`
    that no .json describes has its whole name, or the one of a stage's weights of that shape.

    None if there is no such file; UserError if several have this --run_name.
    """
    if name.endswith(".pth"):
        return Path(name) if Path(name).is_file() else None
    of_stage, of_run = name_patterns(name)
    here, below = [], []
    for path, about in list_weights(out_dir, below=True):
        if shape.items() <= vars(about["config"]).items():
            (here if path.parent == out_dir else below).append(path)
    undescribed = (_usual_path(out_dir, name, shape), out_dir / f"{name}.pth")
    here += [p for p in undescribed if p.is_file() and not p.with_suffix(".json").is_file()]
    for paths in (here, below):
        for path in paths:
            if of_stage.fullmatch(path.stem):
                return path
        runs = [path for path in paths if is_run_name(name) and of_run.fullmatch(path.stem)]
        if len(runs) > 1:
            raise UserError(f"{flag} {name}: name one of {', '.join(map(str, runs))}")
        if runs:
            return runs[0]
    return None


def _usual_path(out_dir: Path, stage: str, shape: Mapping[str, Any]) -> Path:
    """Where a stage leaves weights of a shape, of which fields may be left out."""
    moe = "_moe" if shape.get("use_moe") else ""
    return out_dir / f"{stage}_{shape.get('dim', LMConfig.dim)}{moe}.pth"


def _what_is_there(folder: Path) -> str:
    """The names of the weights in a folder, the newest first, as the end of an error."""
    names = [path.name for path, _ in list_weights(folder)]
    if not names:
        return f"{folder} holds no weights"
    more = len(names) - MOST_NAMED
    return f"{folder} has {', '.join(names[:MOST_NAMED])}" + (
        f" and {more} more" if more > 0 else ""
    )


def list_weights(out_dir: Path, below: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The .pth files in a folder that a .json file describes, newest first, with its content.

    With `below` also those in the folders in it.
    """
    found = []
    for path in (*out_dir.glob("*.pth"), *(out_dir.glob("*/*.pth") if below else ())):
        with suppress(UserError, OSError):  # of no use, or gone meanwhile
            if about := read_about(path):
                found.append((path.stat().st_mtime, path, about))
    for _, path, about in sorted(found, key=lambda entry: entry[0], reverse=True):
        yield path, about


def name_patterns(name: str, dim: str = r"\d+") -> tuple[re.Pattern[str], ...]:
    """Patterns of the file names that a stage, an adapter or a run may have, the likelier first."""
    name = re.escape(name)
    return re.compile(rf"{name}_{dim}(_moe)?|{name}"), re.compile(rf".+_{dim}(_moe)?_{name}")


def tokenizer_folder(given: Path | None, weights: Path) -> Path:
    """The folder of the tokenizer of weights: `given`, else near them, else the shipped one.

    Raises UserError if the JSON file beside the weights is damaged.
    """
    if given is not None:
        return given
    about = read_about(weights)
    return (about and find_tokenizer(weights.parent, about["tokenizer"])) or TOKENIZER


def save_weights(
    path: Path,
    model: nn.Module,
    config: LMConfig,
    stage: str,
    tokenizer_hash: str,
    dtype: torch.dtype = torch.float32,
    conversations: Mapping[str, Any] | None = None,
) -> None:
    """Write the raw model's state_dict to `path`, and to its .json what rebuilds the model.

    `conversations` is what the .json says of those that the model was trained on, see `read_about`.
    Raises SaveError if the disk is full or cannot be written; an older file is kept.
    """
    shared: dict[int, torch.Tensor] = {}  # the tied embedding stays one tensor in the file
    state = {
        name: shared.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", dtype))
        for name, tensor in model.state_dict().items()
    }
    about = {"stage": stage, "tokenizer": tokenizer_hash, **(conversations or {})}
    about["config"] = asdict(config)
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    with report_save_errors(path):
        write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode()))
        write_atomically(path, lambda file: torch.save(state, file))


def trained_state(model: MiniMindLM) -> dict[str, torch.Tensor]:
    """The tensors that training changes: the active adapter's matrices, else the state_dict."""
    return lora_state(model) or model.state_dict()


def load_trained_state(model: MiniMindLM, state: dict[str, torch.Tensor]) -> None:
    """Load what `trained_state` returned."""
    if lora_state(model):
        load_lora_state(model, state)
    else:
        model.load_state_dict(state)


def save_lora(
    model: MiniMindLM, path: Path, dtype: torch.dtype = torch.float32, base: str | None = None
) -> None:
    """Write the active adapter, which is not merged, with its settings and its base's hash.

    `base` is the model's `weights_hash`, if already computed. SaveError as of `save_weights`.
    """
    contents = {
        "lora": lora_settings(model),
        "base": base or weights_hash(model),
        "weights": {name: t.to("cpu", dtype) for name, t in lora_state(model).items()},
    }
    with report_save_errors(path):
        write_atomically(path, lambda file: torch.save(contents, file))


def load_lora(model: MiniMindLM, path: Path, name: str = "default") -> None:
    """Add an adapter that `save_lora` wrote to its base and activate it, as `name`.

    The model may have other adapters. UserError if the file is missing or damaged, or no adapter of
    this model's weights in this precision.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    check_sums(path)
    contents = read_pickle(path, mmap=True)
    if not isinstance(contents, dict) or contents.keys() != {"lora", "base", "weights"}:
        raise UserError(f"{path}: not an adapter")
    if contents["base"] != weights_hash(model):
        raise UserError(f"{path}: an adapter of another base, not of these weights")
    try:
        apply_lora(model, **contents["lora"], name=name)
        load_lora_state(model, contents["weights"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_about(path: Path) -> dict[str, Any] | None:
    """Read the JSON file beside the weights.

    It has the stage, the tokenizer (a hash) and the config (an LMConfig). Of the conversations that
    the weights were trained on it has `longest_conversation`, {"exchanges", "tokens"} or None where
    that is not known, and `examples`, a few questions or none.

    None if there is no such file. Raises UserError if it is damaged.
    """
    about_path = path.with_suffix(".json")
    if not about_path.is_file():
        return None
    try:
        about = json.loads(about_path.read_text(encoding="utf-8"))
        longest = about.get("longest_conversation")
        if longest is not None:
            longest = {name: int(longest[name]) for name in ("exchanges", "tokens")}
        return {
            "longest_conversation": longest,
            "examples": list(map(str, about.get("examples", []))),
            "stage": about["stage"],
            "tokenizer": about["tokenizer"],
            "config": LMConfig.from_dict(about["config"]),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{about_path}: does not describe a model ({error})") from None


def read_state(path: Path, of_model: bool = False) -> dict[str, torch.Tensor]:
    """Read the state_dict in a .pth file; of an adapter, its matrices, memory-mapped.

    UserError if the file holds anything but named tensors, or an adapter and `of_model` is set.
    """
    state = read_pickle(path, mmap=not of_model)
    if isinstance(state, dict) and isinstance(state.get("weights"), dict):
        if of_model:
            raise UserError(f"{path}: an adapter, not a model's weights (--lora_name takes it)")
        state = state["weights"]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a state_dict")
    return state


def read_pickle(path: Path, *, mmap: bool) -> Any:
    """Read what torch.save wrote of tensors and plain containers; UserError for all else."""
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # older files are not
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: damaged, or it holds more than tensors") from None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged or not a weight file ({reason})") from None


def check_sums(path: Path) -> None:
    """Read the whole file and compare it with the checksums that torch.save wrote into it.

    Raises UserError if a byte of a tensor has changed. Files of old versions have no checksums.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # as above
        raise UserError(f"{path}: damaged ({error})") from None
    if damaged:
        raise UserError(f"{path}: damaged: {damaged} in it has changed")


def load_weights(path: Path, model: nn.Module, tokenizer_hash: str) -> None:
    """Copy the weights in a .pth file into the model, as `matching_state` reads them."""
    model.load_state_dict(matching_state(path, model, tokenizer_hash))


def matching_state(path: Path, model: nn.Module, tokenizer_hash: str) -> dict[str, torch.Tensor]:
    """Read weights, of any precision, from a .pth file; UserError if they are not the model's.

    Their names or shapes may be others, the file damaged, or another tokenizer's.
    """
    about = read_about(path)
    if about is not None and about["tokenizer"] != tokenizer_hash:
        raise UserError(f"{path}: trained with another tokenizer; --tokenizer_path names it")
    check_sums(path)
    state = read_state(path, of_model=True)
    difference = first_difference(path, state, model)
    if difference:
        hint = "" if about else "; there is no .json beside it with its shape"
        raise UserError(f"{path}: weights of another model: {difference}{hint}")
    return state


def load_model(path: Path, shape: LMConfig, tokenizer_hash: str) -> MiniMindLM:
    """Build the model that the JSON file beside the weights describes, and load them.

    `shape` is the configuration to use where there is no JSON file. UserError
    as of `matching_state`, or if there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    about = read_about(path)
    with torch.device("meta"):  # memory holds the weights once, and no random ones are drawn
        model = MiniMindLM(about["config"] if about else shape)
    state = matching_state(path, model, tokenizer_hash)
    model.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
    model.output.weight = model.tok_embeddings.weight
    return model


def first_difference(path: Path, state: dict[str, torch.Tensor], model: nn.Module) -> str | None:
    """Describe the first name or shape in which a file's weights differ from the model's."""
    if about := read_about(path):
        there, here = about["config"].shape, model.config.shape
        for name in there:  # use_moe first, on which the others depend
            if there[name] != here[name]:
                return f"--{name} is {there[name]} there, {here[name]} here"
    return state_difference(state, trained_state(model))
