"""Convert trained weights for other engines: transformers, llama.cpp, Ollama, PEFT.

python scripts/convert_model.py --weight full_sft --to transformers --out minimind-hf
python scripts/convert_model.py --weight full_sft --to gguf --dtype q8_0 --out minimind.gguf
python scripts/convert_model.py --weight full_sft --to ollama --out minimind-ollama
python scripts/convert_model.py --lora_name identity --to peft --out identity-peft
python scripts/convert_model.py --lora_name identity --to pth --out out/named_512.pth
python scripts/convert_model.py --from peft --weight identity-peft --out out/lora/named_512.pth
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common import (
    BooleanFlag,
    SaveError,
    UserError,
    add_tokenizer_path,
    make_parser,
    name_or_path,
    positive_int,
    report_user_errors,
    user_path,
)
from export.gguf_format import write_gguf
from export.model_card import write_model_card
from export.ollama import write_modelfile
from export.peft_format import CONFIG_FILE, read_peft, read_peft_config, write_peft
from export.transformers_format import write_transformers
from inference import TrainedModel, WeightSpec, load_trained
from inference.loading import load_base
from model import (
    LMConfig,
    MiniMindLM,
    active_lora,
    apply_lora,
    load_model,
    load_tokenizer,
    lora_state,
    merge_lora,
    save_lora,
    save_weights,
    tokenizer_hash,
    weights_hash,
)
from model.model_lora import base_state, load_lora_state, lora_settings

GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
GGUF_TYPES |= {name: name for name in ("q8_0", "q4_k_m")}
DTYPES = {
    "transformers": ("float32", "bfloat16", "float16"),
    "gguf": tuple(GGUF_TYPES),
    "ollama": tuple(GGUF_TYPES),
    "peft": ("float32",),
    "pth": ("float32", "float16"),
}
# Files of the folders that are written: a folder with others is not replaced.
WRITTEN = {
    "README.md",
    "Modelfile",
    "config.json",
    "generation_config.json",
    "model.gguf",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    CONFIG_FILE,
    "adapter_model.safetensors",
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--to", choices=DTYPES, help="format to write")
    parser.add_argument("--from", dest="source", choices=("peft",), help="or the one to read")
    parser.add_argument(
        "--weight",
        type=name_or_path,
        help="a stage's or a run's name, a .pth file or a folder, as eval_model.py takes it; with "
        "--from peft PEFT's folder; default: the newest chat weights in --out_dir",
    )
    parser.add_argument(
        "--lora_name", type=name_or_path, help="an adapter's name, or its .pth file"
    )
    parser.add_argument("--out", type=user_path, required=True, help="file or folder to write")
    names = sorted({name for names in DTYPES.values() for name in names})
    parser.add_argument("--dtype", choices=names, default="float32", help="dtype of the tensors")
    parser.add_argument("--overwrite", action=BooleanFlag, default=False, help="replace --out")
    parser.add_argument("--out_dir", type=user_path, default=Path("out"), help="weight folder")
    add_tokenizer_path(parser)
    parser.add_argument("--dim", type=positive_int, help="width of the weights, to choose by")
    parser.add_argument("--n_layers", type=positive_int, help="blocks of the weights, likewise")
    parser.add_argument("--use_moe", action=BooleanFlag, help="experts or not, likewise")
    args = parser.parse_args()
    if (args.to is None) == (args.source is None):
        raise UserError("--to FORMAT or --from peft is needed, one of the two")
    if args.source and args.weight is None:
        raise UserError("--from peft needs --weight, PEFT's folder")
    if args.to and args.dtype not in DTYPES[args.to]:
        raise UserError(f"--dtype {args.dtype}: --to {args.to} has {', '.join(DTYPES[args.to])}")
    if args.to in ("peft", "pth") and args.lora_name is None:
        raise UserError(f"--to {args.to} needs --lora_name, the adapter to write or merge")
    if (args.to == "pth" or args.source) and args.out.suffix != ".pth":
        raise UserError(f"--out {args.out}: must end in .pth")
    return args


def main() -> None:
    """Convert, and print what was written."""
    args = parse_args()
    check_out(args.out, args.overwrite)
    try:
        if args.source:
            import_adapter(args)
        else:
            names = ("out_dir", "tokenizer_path", "weight", "lora_name")
            names += ("dim", "n_layers", "use_moe")
            spec = WeightSpec(**{name: getattr(args, name) for name in names})
            export(args, load_trained(spec))
    except SaveError as error:
        raise UserError(f"--out {error}") from None
    files = list(args.out.iterdir()) if args.out.is_dir() else [args.out]
    print(f"saved {args.out}, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB")


def check_out(out: Path, overwrite: bool) -> None:
    """Make sure that the output replaces nothing that somebody did not mean.

    Raises:
        UserError: if there is something, without `overwrite` or not written by this script.
    """
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"--out {out} exists; --overwrite replaces it")
    if out.is_dir():
        other = next((path for path in out.iterdir() if path.name not in WRITTEN), None)
        if other is not None:
            raise UserError(f"--out {out}: is not replaced, since it holds {other.name}")


@contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A path beside `out`; what is there at the end becomes `out`, unless an error is raised.

    Raises:
        UserError: if it cannot be written.
    """
    temporary, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("tmp", "old"))
    try:
        remove(temporary)
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if out.is_dir():
            remove(old)
            out.rename(old)
        temporary.replace(out)
        remove(old)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def export(args: argparse.Namespace, trained: TrainedModel) -> None:
    """Write a model, or its adapter, as `--to` says."""
    if args.to == "pth":
        save_weights(
            args.out,
            merged(trained.model),
            trained.model.config,
            "lora",
            tokenizer_hash(trained.tokenizer),
            getattr(torch, args.dtype),
        )
        return
    with new_output(args.out) as path:
        if args.to != "gguf":
            path.mkdir()
        if args.to in ("gguf", "ollama"):
            file = path / "model.gguf" if args.to == "ollama" else path
            export_gguf(file, trained, GGUF_TYPES[args.dtype])
        if args.to == "ollama":
            context = trained.model.config.max_seq_len
            write_modelfile(path, file.name, trained.tokenizer, context)
        elif args.to == "peft":
            model = trained.model
            base = trained.path.as_posix()
            write_peft(path, model.config, lora_settings(model), lora_state(model), base)
        elif args.to == "transformers":
            write_model_card(path, trained, args.out.name)
            model = merged(trained.model)
            config, weights, hash_ = model.config, model.state_dict(), weights_hash(model)
            tokenizer = trained.tokenizer
            del model, trained  # so that each tensor can go once it is converted
            write_transformers(path, config, weights, tokenizer, hash_, getattr(torch, args.dtype))


def export_gguf(path: Path, trained: TrainedModel, file_type: str) -> None:
    """Write a GGUF file. Raises UserError if the package for it is missing."""
    try:
        write_gguf(path, merged(trained.model), trained.tokenizer, file_type, trained.name)
    except ImportError as error:
        raise UserError(
            f"--to gguf needs {error.name}: pip install -r scripts/requirements.txt"
        ) from None


def merged(model: MiniMindLM) -> MiniMindLM:
    """The model with its active adapter, if any, added to the weights."""
    if active_lora(model) is None:
        return model
    merge_lora(model)
    with torch.device("meta"):
        plain = MiniMindLM(model.config)
    plain.load_state_dict(base_state(model), assign=True)
    return plain.eval()


def import_adapter(args: argparse.Namespace) -> None:
    """Write PEFT's adapter as one of ours, for the weights that its base was exported from."""
    folder = Path(args.weight)
    settings = read_peft_config(folder)
    model = load_exported_base(args, folder, settings.get("base_model_name_or_path") or "")
    arguments, matrices = read_peft(folder, settings, model.config)
    try:
        apply_lora(model, **arguments)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in lora_state(model).items()}
        load_lora_state(model, zeros | matrices)
    except ValueError as error:
        raise UserError(f"--weight {folder}: {error}") from None
    save_lora(model, args.out)


def load_exported_base(args: argparse.Namespace, adapter: Path, base: str) -> MiniMindLM:
    """Load the weights of an adapter's base.

    Args:
        args: flags.
        adapter: PEFT's folder.
        base: what it names as its base: the folder that was exported from the weights, or their
            file.

    Raises:
        UserError: if they are not there.
    """
    hash_ = tokenizer_hash(load_tokenizer(args.tokenizer_path))
    if base.endswith(".pth"):
        return load_model(Path(base), LMConfig(), hash_)
    try:
        exported = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
        weights = exported["minimind_weights"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{adapter / CONFIG_FILE}: base_model_name_or_path {base!r} is no folder that "
            "--to transformers wrote"
        ) from None
    return load_base(weights, args.out_dir, hash_, adapter)[1]


if __name__ == "__main__":
    with report_user_errors():
        main()
