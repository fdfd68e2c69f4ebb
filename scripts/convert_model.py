"""Convert trained weights for other engines: transformers, llama.cpp, Ollama, PEFT.

python scripts/convert_model.py --weight full_sft --to transformers --out minimind-hf
python scripts/convert_model.py --weight full_sft --to gguf --dtype q8_0 --out minimind.gguf
python scripts/convert_model.py --weight full_sft --to ollama --out minimind-ollama
python scripts/convert_model.py --lora_name identity --to peft --out identity-peft
python scripts/convert_model.py --lora_name identity --to pth --out out/merged_512.pth
python scripts/convert_model.py --from peft --weight identity-peft --out out/lora/named_512.pth
"""

import common.interrupt  # noqa: F401  for Ctrl-C during the imports below

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common import (
    BooleanFlag,
    SaveError,
    UserError,
    make_parser,
    report_os_errors,
    report_user_errors,
    user_path,
)
from export.gguf_format import write_gguf
from export.model_card import write_model_card
from export.ollama import write_modelfile
from export.peft_format import exported_base, read_peft, read_peft_config, write_peft
from export.transformers_format import check_routing, write_transformers
from inference import TrainedModel, add_weight_arguments, load_trained, named_weights
from inference.loading import load_base
from model import (
    MiniMindLM,
    active_lora,
    apply_lora,
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
FOLDERS = ("transformers", "ollama", "peft")
# A folder is replaced if it holds weights, and nothing but these files.
WEIGHT_FILES = {"model.safetensors", "model.gguf", "adapter_model.safetensors"}
OTHER_FILES = {"README.md", "Modelfile", "config.json", "generation_config.json"}
OTHER_FILES |= {"tokenizer.json", "tokenizer_config.json", "adapter_config.json"}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--to", choices=DTYPES, help="format to write")
    parser.add_argument(
        "--from",
        dest="source",
        choices=("peft",),
        help="or the one to read: --weight is then PEFT's folder",
    )
    add_weight_arguments(parser)
    parser.add_argument("--out", type=user_path, required=True, help="file or folder to write")
    names = sorted({name for names in DTYPES.values() for name in names})
    parser.add_argument("--dtype", choices=names, help="dtype of the tensors; default: float32")
    parser.add_argument("--overwrite", action=BooleanFlag, default=False, help="replace --out")
    args = parser.parse_args()
    if (args.to is None) == (args.source is None):
        raise UserError("--to FORMAT or --from peft is needed, one of the two")
    if args.source and args.weight is None:
        raise UserError("--from peft needs --weight, PEFT's folder")
    ignored = ("lora_name", "dtype", "dim", "n_layers", "use_moe")
    given = [name for name in ignored if args.source and getattr(args, name) is not None]
    if given:
        raise UserError(f"--{given[0]}: not with --from peft")
    args.dtype = args.dtype or "float32"
    if args.to and args.dtype not in DTYPES[args.to]:
        raise UserError(f"--dtype {args.dtype}: --to {args.to} has {', '.join(DTYPES[args.to])}")
    if args.to in ("peft", "pth") and args.lora_name is None:
        raise UserError(f"--to {args.to} needs --lora_name, the adapter to write or merge")
    if (args.to == "pth" or args.source) and args.out.suffix != ".pth":
        raise UserError(f"--out {args.out}: must end in .pth, which is written")
    if args.to == "gguf" and args.out.suffix != ".gguf":
        raise UserError(f"--out {args.out}: must end in .gguf")
    return args


def main() -> None:
    """Convert, and print what was written."""
    args = parse_args()
    for name in ("SIGTERM", "SIGHUP"):  # so that nothing half-written stays
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    with report_os_errors(f"--out {args.out}"):
        check_out(args)
    try:
        name = import_adapter(args) if args.source else export(args)
    except SaveError as error:
        raise UserError(f"--out {error}") from None
    files = list(args.out.iterdir()) if args.out.is_dir() else [args.out]
    print(f"{name} → {args.out}, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB")


def check_out(args: argparse.Namespace) -> None:
    """Make sure that the output replaces nothing that somebody did not mean.

    Raises:
        UserError: if there is something, without --overwrite or not written by this script.
    """
    out = args.out
    if not out.exists() and not (out.suffix == ".pth" and out.with_suffix(".json").exists()):
        return
    if not args.overwrite:
        raise UserError(f"--out {out} exists, or a file beside it; --overwrite replaces it")
    if out.is_dir() != (args.to in FOLDERS):
        raise UserError(f"--out {out}: a folder where a file is written, or the reverse")
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        if names and (names - WEIGHT_FILES - OTHER_FILES or not names & WEIGHT_FILES):
            raise UserError(f"--out {out}: is not replaced, since it holds other files")


@contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A path beside `out`, which `check_out` has seen; what is there at the end becomes `out`.

    After an error, or a signal, what was there before is there again.

    Raises:
        UserError: if it cannot be written.
    """
    target = out.resolve()
    temporary, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("tmp", "old"))
    try:
        remove(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if target.exists():
            remove(old)
            target.rename(old)
        temporary.rename(target)
        remove(old)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            if old.exists() and not target.exists():
                old.rename(target)
            remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def export(args: argparse.Namespace) -> str:
    """Load a model and write it, or its adapter, as `--to` says; its name."""
    trained = load_trained(named_weights(args))
    name, model, tokenizer = trained.name, trained.model, trained.tokenizer
    config, dtype = model.config, args.dtype
    sources = [path.resolve() for path in (trained.path, trained.adapter) if path is not None]
    if args.out.resolve() in sources:
        raise UserError(f"--out {args.out}: is what it would be made from")
    if args.to == "pth":
        plain = merged(model)
        conversations = {
            "longest_conversation": trained.longest_conversation,
            "examples": list(trained.examples),
        }
        hash_, precision = tokenizer_hash(tokenizer), getattr(torch, dtype)
        save_weights(args.out, plain, config, "lora", hash_, precision, conversations)
        return name
    with new_output(args.out) as path:
        if args.to == "gguf":
            export_gguf(path, trained, GGUF_TYPES[dtype], args.to)
            return name
        path.mkdir()
        if args.to == "ollama":
            write_modelfile(path, "model.gguf", tokenizer, config.max_seq_len)
            export_gguf(path / "model.gguf", trained, GGUF_TYPES[dtype], args.to)
        elif args.to == "peft":
            settings, matrices = lora_settings(model), lora_state(model)
            base = trained.path.as_posix()
            write_peft(path, config, settings, matrices, base, weights_hash(model))
        else:
            check_routing(config)
            model = merged(model)
            write_model_card(path, trained, model, args.out.name)
            weights, hash_ = model.state_dict(), weights_hash(model)
            del model, trained  # so that each tensor can go once it is converted
            write_transformers(path, config, weights, tokenizer, hash_, getattr(torch, dtype))
    return name


def export_gguf(path: Path, trained: TrainedModel, file_type: str, kind: str) -> None:
    """Write a GGUF file. Raises UserError if the package for it is missing."""
    try:
        write_gguf(path, merged(trained.model), trained.tokenizer, file_type, trained.name)
    except ImportError as error:
        raise UserError(
            f"--to {kind} needs {error.name}: pip install -r scripts/requirements.txt"
        ) from None


def merged(model: MiniMindLM) -> MiniMindLM:
    """The model with its active adapter, if any, added to the weights."""
    if active_lora(model) is None:
        return model
    merge_lora(model)
    with torch.device("meta"):
        plain = MiniMindLM(model.config)
    plain.load_state_dict(base_state(model), assign=True)
    plain.output.weight = plain.tok_embeddings.weight
    return plain.eval()


def import_adapter(args: argparse.Namespace) -> str:
    """Write PEFT's adapter as one of ours, for the weights of its base; the folder's name."""
    folder = Path(args.weight)
    settings = read_peft_config(folder)
    tokenizer = args.tokenizer_path and tokenizer_hash(load_tokenizer(args.tokenizer_path))
    base = exported_base(folder, settings)
    _, model = load_base(base, args.out_dir, tokenizer, folder)
    arguments, matrices = read_peft(folder, settings, model.config)
    try:
        apply_lora(model, **arguments)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in lora_state(model).items()}
        load_lora_state(model, zeros | matrices)
    except ValueError as error:
        raise UserError(f"--weight {folder}: {error}") from None
    save_lora(model, args.out, base=base)
    return folder.name


if __name__ == "__main__":
    with report_user_errors():
        main()
