"""Which weights there are, and how to load them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset import tokenizer_hash
from model import LMConfig, MiniMindLM
from training import (
    UserError,
    load_adapter,
    load_model,
    load_tokenizer,
    read_about,
    resolve_weights,
)

from .talker import Talker

PRETRAINED = "pretrain"  # the stage whose weights continue texts; the others' answer


@dataclass(frozen=True)
class Choice:
    """Which weights to use, as the flags of the command line say.

    Attributes:
        weight: a stage's name, a .pth file, a folder in transformers' format, or None: the newest
            chat weights in `out_dir`, or the newest at all where there are none.
        lora_name: an adapter's name, or its .pth file.
        out_dir: where weights are.
        dim, n_layers, use_moe: the shape to look for, where given, and that of weights without a
            .json file.
        tokenizer_path: folder of the tokenizer.
    """

    weight: str | None
    lora_name: str | None
    out_dir: Path
    dim: int | None
    n_layers: int | None
    use_moe: bool | None
    tokenizer_path: Path


def list_weights(out_dir: Path) -> list[Path]:
    """The .pth files in a folder that a .json file describes, newest first."""
    paths = [path for path in out_dir.glob("*.pth") if path.with_suffix(".json").is_file()]
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def newest_weights(choice: Choice) -> Path:
    """The newest chat weights that fit the shape asked for, else the newest pretrained ones.

    Raises:
        UserError: if there are none.
    """
    shape = {
        name: value
        for name in ("dim", "n_layers", "use_moe")
        if (value := getattr(choice, name)) is not None
    }
    found: dict[bool, Path] = {}
    for path in list_weights(choice.out_dir):
        about = read_about(path)
        if all(getattr(about["config"], name) == value for name, value in shape.items()):
            found.setdefault(about["stage"] != PRETRAINED, path)
    if not found:
        flags = "".join(f" of --{name} {value}" for name, value in shape.items())
        raise UserError(
            f"--out_dir {choice.out_dir}: no weights{flags} there; train some, or name a file "
            "with --weight"
        )
    return found.get(True) or found[False]


def load_talker(
    choice: Choice, device: torch.device, quantize: str | None = None, rows: int = 1
) -> Talker:
    """Load what a choice means.

    Raises:
        UserError: if it is not there or does not fit.
    """
    if choice.weight is not None and Path(choice.weight).is_dir():
        return load_folder(choice, device, quantize, rows)
    tokenizer = load_tokenizer(choice.tokenizer_path)
    try:
        shape = LMConfig(
            dim=choice.dim or 512,
            n_layers=choice.n_layers or 8,
            use_moe=bool(choice.use_moe),
            vocab_size=len(tokenizer),
        )
    except ValueError as error:
        raise UserError(f"--dim {choice.dim}: {error}") from None
    if choice.weight is None:
        path = newest_weights(choice)
    else:
        path = resolve_weights("--weight", choice.weight, choice.out_dir, shape)
    model = load_model(path, shape, tokenizer_hash(tokenizer))
    about = read_about(path)
    pretrained = path.name.startswith(PRETRAINED) if about is None else about["stage"] == PRETRAINED
    name = path.stem
    if choice.lora_name is not None:
        folder = choice.out_dir / "lora"
        adapter = resolve_weights("--lora_name", choice.lora_name, folder, model.config)
        load_adapter(adapter, model)
        name += f"+{adapter.stem}"
        pretrained = False  # adapters are trained on conversations
    return Talker(name, model.to(device).eval(), tokenizer, not pretrained, quantize, rows)


def load_folder(choice: Choice, device: torch.device, quantize: str | None, rows: int) -> Talker:
    """Load a model of this project that `save_pretrained` wrote, with the tokenizer beside it.

    Raises:
        UserError: if the folder holds something else.
    """
    folder = Path(choice.weight)
    tokenizer = load_tokenizer(
        folder if (folder / "tokenizer.json").is_file() else choice.tokenizer_path
    )
    if choice.lora_name is not None:
        raise UserError("--lora_name: needs the .pth file that the adapter was trained on")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != LMConfig.model_type:
            raise ValueError(f"a model of the type {kind}")
        config = LMConfig.from_pretrained(folder, local_files_only=True)
        model = MiniMindLM.from_pretrained(folder, config=config, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{error}".partition("\n")[0]
        raise UserError(f"--weight {folder}: cannot be loaded ({reason})") from None
    return Talker(folder.name, model.to(device).eval(), tokenizer, True, quantize, rows)
