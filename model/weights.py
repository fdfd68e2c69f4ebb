"""Weights on disk: a state_dict, and beside it a JSON file that says what it is."""

import json
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import UserError, is_run_name, report_save_errors, write_atomically

from .LMConfig import LMConfig
from .model import MiniMindLM
from .model_lora import load_lora, load_lora_state, lora_state, save_lora


def weights_path(out_dir: Path, stage: str, config: LMConfig, run_name: str | None = None) -> Path:
    """`{out_dir}/{stage}_{dim}{_moe}{_run_name}.pth`."""
    moe, run = "_moe" if config.use_moe else "", f"_{run_name}" if run_name else ""
    return out_dir / f"{stage}_{config.dim}{moe}{run}.pth"


def resolve_weights(flag: str, name: str, out_dir: Path, config: LMConfig) -> Path:
    """The file that a flag means.

    Args:
        flag: for the error.
        name: a .pth file; or of a file in `out_dir`, its stage, its whole name, or its --run_name.
        out_dir: where weights are.
        config: their shape, where `name` does not give the whole name.

    Raises:
        UserError: if there is no such file, or a --run_name is that of several.
    """
    usual = Path(name) if name.endswith(".pth") else weights_path(out_dir, name, config)
    runs: list[Path] = []
    if is_run_name(name):
        runs = sorted(out_dir.glob(weights_path(Path(), "*", config, name).name))
    for path in (usual, out_dir / f"{name}.pth", *runs):
        if path.is_file():
            break
    else:
        raise UserError(f"{flag} {name}: no file {usual}")
    if path in runs and len(runs) > 1:
        raise UserError(f"{flag} {name}: name one of {', '.join(run.stem for run in runs)}")
    return path


def save_weights(
    path: Path,
    model: nn.Module,
    config: LMConfig,
    stage: str,
    tokenizer_hash: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `path` with .json (how to rebuild the model) and `path` (a state_dict on the CPU).

    Args:
        path: the .pth file.
        model: the bare model, not its DDP or compiled wrapper.
        config: its shape.
        stage: pretrain, full_sft, dpo or distill.
        tokenizer_hash: identifies the tokenizer that its ids belong to.
        dtype: of the saved tensors.

    Raises:
        SaveError: if the disk is full or cannot be written; an older file is kept.
    """
    shared: dict[int, torch.Tensor] = {}  # the tied embedding stays one tensor in the file
    state = {
        name: shared.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", dtype))
        for name, tensor in model.state_dict().items()
    }
    about = {"stage": stage, "tokenizer": tokenizer_hash, "config": asdict(config)}
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    with report_save_errors(path):
        write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode()))
        write_atomically(path, lambda file: torch.save(state, file))


def trained_state(model: MiniMindLM) -> dict[str, torch.Tensor]:
    """What training changes: the state_dict, or the matrices of the adapter in use."""
    return lora_state(model) or model.state_dict()


def load_trained_state(model: MiniMindLM, state: dict[str, torch.Tensor]) -> None:
    """The inverse of `trained_state`."""
    if lora_state(model):
        load_lora_state(model, state)
    else:
        model.load_state_dict(state)


def save_adapter(path: Path, model: MiniMindLM, dtype: torch.dtype, base: str) -> None:
    """Write `path`, as `save_lora` fills it.

    Raises:
        SaveError: as `save_weights`.
    """
    with report_save_errors(path):
        write_atomically(path, lambda file: save_lora(model, file, dtype, base))


def load_adapter(path: Path, model: MiniMindLM, name: str = "default") -> None:
    """Put the adapter in a file on its base, call it `name` and use it.

    Raises:
        UserError: if the file is missing or damaged, holds no adapter, or one of another base.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    check_sums(path)
    try:
        load_lora(model, read_pickle(path, mmap=True), name)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_about(path: Path) -> dict[str, Any] | None:
    """What the JSON file beside the weights says: stage, tokenizer (a hash), config (LMConfig).

    None where there is no such file.

    Raises:
        UserError: if it cannot be used.
    """
    about_path = path.with_suffix(".json")
    if not about_path.is_file():
        return None
    try:
        about = json.loads(about_path.read_text(encoding="utf-8"))
        return {
            "stage": about["stage"],
            "tokenizer": about["tokenizer"],
            "config": LMConfig.from_dict(about["config"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{about_path}: does not describe a model ({error})") from None


def read_state(path: Path, of_model: bool = False) -> dict[str, torch.Tensor]:
    """The state_dict in a .pth file, memory-mapped; of an adapter its matrices.

    Only tensors are unpickled.

    Raises:
        UserError: if the file is damaged, holds anything but named tensors, or with `of_model` an
            adapter.
    """
    state = read_pickle(path, mmap=True)
    if isinstance(state, dict) and isinstance(state.get("weights"), dict):
        if of_model:
            raise UserError(f"{path}: an adapter, not a model's weights (--lora_name takes it)")
        state = state["weights"]  # of an adapter
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a state_dict")
    return state


def read_pickle(path: Path, *, mmap: bool) -> Any:
    """What torch.save wrote: tensors in plain containers, memory-mapped if that is wanted.

    Raises:
        UserError: if the file is damaged, or holds what only running code could rebuild.
    """
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # older files are not
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: damaged, or it holds more than tensors") from None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged or not a weight file ({reason})") from None


def check_sums(path: Path) -> None:
    """Read the whole file and compare it with the checksums that torch.save left in it.

    Raises:
        UserError: if a byte of a tensor has changed. Older files have no checksums.
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
    """Copy the weights in `path` into the model, whatever their precision.

    Args:
        path: the .pth file.
        model: takes the weights.
        tokenizer_hash: of the tokenizer in use.

    Raises:
        UserError: if the file is damaged, its names or shapes are not the model's, or the JSON file
            beside it names another tokenizer.
    """
    about = read_about(path)
    if about is not None and about["tokenizer"] != tokenizer_hash:
        raise UserError(f"{path}: trained with another tokenizer; --tokenizer_path names it")
    check_sums(path)
    state = read_state(path, of_model=True)
    difference = first_difference(path, state, model)
    if difference:
        hint = "" if about else "; no .json beside it says its shape"
        raise UserError(f"{path}: weights of another model: {difference}{hint}")
    model.load_state_dict(state)


def load_model(path: Path, shape: LMConfig, tokenizer_hash: str) -> MiniMindLM:
    """Build the model that the JSON file beside the weights describes, and load them.

    Args:
        path: the .pth file.
        shape: used where there is no JSON file, as beside weights from elsewhere.
        tokenizer_hash: of the tokenizer in use.

    Raises:
        UserError: if there is no such file, and as `load_weights` and `read_about`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    about = read_about(path)
    model = MiniMindLM(about["config"] if about else shape)
    load_weights(path, model, tokenizer_hash)
    return model


def first_difference(path: Path, state: dict[str, torch.Tensor], model: nn.Module) -> str | None:
    """The first name or shape in which weights in a file differ from the model's; None without."""
    about = read_about(path)
    if about:
        there, here = about["config"], model.config
        names = ["use_moe", "dim", "n_layers", "n_heads", "n_kv_heads"]
        if there.use_moe and here.use_moe:
            names += ["n_routed_experts", "n_shared_experts", "num_experts_per_tok"]
        for name in names:  # some of which no tensor's shape tells
            if getattr(there, name) != getattr(here, name):
                return f"--{name} is {getattr(there, name)} there, {getattr(here, name)} here"
    own = trained_state(model)
    for name, tensor in own.items():
        if name not in state:
            return f"it has no {name}"
        if state[name].shape != tensor.shape:
            return f"{name} is {tuple(state[name].shape)} there, {tuple(tensor.shape)} here"
    extra = next((name for name in state if name not in own), None)
    return extra and f"{extra} is not part of this model"
