"""What a stage begins with: processes, tokenizer, model, data, and the run to resume."""

import argparse
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common import Text, UserError, locale_language, report_os_errors, write_atomically
from dataset import (
    Mixture,
    PackedRows,
    PaddedRows,
    PairRows,
    RecordOptions,
    SFTDataset,
    TeacherTopK,
    collate,
)
from dataset.stored import StoredDataset
from diagnosis.plan import LearningRates
from model import (
    LMConfig,
    MiniMindLM,
    load_tokenizer,
    load_weights,
    lora_state,
    read_about,
    resolve_weights,
    tokenizer_hash,
    weights_path,
)
from model.weights import CONVERSATIONS, first_difference, read_state

from .arguments import MOE_DEFAULTS, SHAPE
from .distributed import Distributed, autocast_dtype, find_processes
from .resume import Resume, check_identity, json_arguments, read_resume, seed_everything
from .run_files import beside, log_folder
from .shape import settle_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What weights to start from keep of their configuration, besides the shape that flags can give.
KEPT = ("hidden_dim", "multiple_of", "norm_eps", "max_seq_len")
KEPT += ("scoring_func", "seq_aux", "norm_topk_prob")

EXAMPLES = 6  # questions that weights keep, to offer them to whoever talks to the model
Rows = PackedRows | PaddedRows | PairRows | TeacherTopK | Mixture


@dataclass(frozen=True)
class Stage:
    """What the shared code needs to know of a stage."""

    name: str  # begins the names of its files
    # By --optimizer. The usual rate is taken without --learning_rate; one outside the limits makes
    # a warning in the plan.
    learning_rates: Mapping[str, LearningRates]
    identity: tuple[str, ...] = ()  # its own flags that may not change when a run is resumed
    collate: Callable[[Sequence[Any]], dict[str, Tensor]] = collate  # makes a batch of rows
    sequences_per_row: int = 1  # 2 for pairs
    scores_text: bool = True  # whether perplexity and bits per byte are scores, too
    chats: bool = True  # whether --sample_prompts are questions, not the beginnings of texts


@dataclass
class Setup:
    """What a stage begins with. Of `frozen` and `resume` the main process's count."""

    args: argparse.Namespace
    stage: Stage
    world: Distributed
    dtype: torch.dtype
    tokenizer: "PreTrainedTokenizerBase"
    raw_model: MiniMindLM  # without wrappers
    path: Path  # file that the weights are written to
    first_weights: Path | None  # file of --from_weight, if it gave the shape
    frozen: dict[str, str] = field(default_factory=dict)  # hashes of untrained weights, by flag
    resume: Resume | None = None  # None for a new run
    notes: list[str] = field(default_factory=list)  # lines that the run reports first
    # What the weights' .json says of the conversations that they were trained on; see `read_about`.
    conversations: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)  # when --max_minutes begin

    @cached_property
    def tokenizer_hash(self) -> str:
        """Identifies the tokenizer."""
        return tokenizer_hash(self.tokenizer)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, of all processes."""
        return self.args.batch_size * self.args.accumulation_steps * self.world.world_size

    def identity(self, rows: Rows) -> dict[str, Any]:
        """By flag, what may not change when a run on these rows is resumed."""
        data = ("max_seq_len", "packing", "val_ratio", "seed")
        optimizer = ("optimizer", "lr_scale", "weight_decay_for")
        flags = (*self.raw_model.config.shape, *data, *optimizer, *self.stage.identity)
        values = json_arguments(self.args)
        return {f"--{name}": values[name] for name in flags if name in values} | {
            "--tokenizer_path": self.tokenizer_hash,
            "--data_path": rows.dataset.content,  # what is used of it follows from the flags
            **self.frozen,
        }


def prepare(args: argparse.Namespace, stage: Stage) -> Setup:
    """Find the processes, load the tokenizer and build the model, the same on every process.

    Shape and tokenizer that no flag gives are those of the run that is resumed, else of the weights
    to start from. UserError for a device, a dtype, a tokenizer or a shape that cannot be had.
    """
    started = time.perf_counter()
    language = args.lang or locale_language()
    world = find_processes(args.device, args.ddp, language)
    dtype = autocast_dtype(args.dtype, world)
    origin = settle_shape(args, stage.name, world)
    tokenizer = load_tokenizer(args.tokenizer_path)
    seed_everything(args.seed)
    names = (*SHAPE, *(MOE_DEFAULTS if args.use_moe else ()))
    shape = {name: getattr(args, name) for name in names}
    try:
        config = LMConfig(
            **shape,
            vocab_size=len(tokenizer),
            dropout=args.dropout,
            flash_attn=args.flash_attn,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except ValueError as error:
        flags = " ".join(f"--{name} {value}" for name, value in shape.items() if name != "use_moe")
        raise UserError(f"{flags}: {error}") from None
    path = weights_path(args.out_dir, stage.name, config, args.run_name)
    if origin.config is not None:
        config = replace(config, **{name: getattr(origin.config, name) for name in KEPT})
    check_context(args.max_seq_len, config)
    raw_model = MiniMindLM(config)
    raw_model.gradient_checkpointing = args.gradient_checkpointing
    first = origin.first_weights
    return Setup(args, stage, world, dtype, tokenizer, raw_model, path, first, started=started)


def check_context(max_seq_len: int, config: LMConfig) -> None:
    """Raise UserError if rows of `max_seq_len` positions do not fit into the model's context."""
    if max_seq_len > config.max_seq_len:
        raise UserError(
            f"--max_seq_len {max_seq_len} is above the model's context of {config.max_seq_len}"
        )


def load_first_weights(setup: Setup) -> None:
    """Load what --from_weight names, if anything, on the main process, unless a run is resumed.

    What is known of the conversations that the weights were trained on is passed on.
    """
    args, model, path = setup.args, setup.raw_model, setup.path
    if not setup.world.is_main:
        return
    if setup.resume is None:
        if args.from_weight == "none":
            return
        path = setup.first_weights
        if path is None:
            shape = model.config.shape
            path = resolve_weights("--from_weight", args.from_weight, args.out_dir, shape)
        load_weights(path, model, setup.tokenizer_hash)
        setup.notes.append(f"--from_weight: {path}")
    about = read_about(path) or {}
    setup.conversations = {name: about[name] for name in CONVERSATIONS if about.get(name)}


def find_resume(setup: Setup) -> None:
    """Read what the run goes on from into `setup.resume`, on the main process.

    UserError if only another --dim or --use_moe has it, or files of a new run cannot be written.
    """
    if not setup.world.is_main:
        return
    args, path = setup.args, setup.path
    resume, notes = read_resume(path)
    if args.resume and resume is not None:
        setup.notes += [
            *notes,
            Text("--resume: going on after step {step}", step=resume.state.step),
        ]
        setup.resume = resume
        return
    if args.resume:
        run = f"_{args.run_name}" if args.run_name else ""
        name = rf"{re.escape(Path(setup.stage.name).name)}_\d+(_moe)?{run}_resume\.pth"
        there = sorted(path.parent.glob("*_resume.pth"))
        other = next((file for file in there if re.fullmatch(name, file.name)), None)
        if other and not notes:  # which a damaged file has
            raise UserError(
                f"--resume: nothing of this --dim and --use_moe, but {other}; without --resume a "
                "new run starts"
            )
        nothing = Text(
            "--resume: nothing to go on from in {folder}: a new run starts", folder=path.parent
        )
        setup.notes += [*notes, nothing]
    elif resume is not None and not resume.is_finished:
        unfinished = Text(
            "{path} holds an unfinished run, at step {step}: --resume goes on with it; this new "
            "run {moves} it",
            path=beside(path, "resume"),
            step=resume.state.step,
            moves=Text("deletes") if args.overwrite else Text("moves"),
        )
        setup.notes.append(unfinished)
    check_output(path, setup.raw_model)


def check_output(path: Path, raw_model: MiniMindLM) -> None:
    """Raise UserError if files cannot be written, or the weights there are of another shape."""
    for probe in (path.with_suffix(".probe"), log_folder(path) / ".probe"):
        with report_os_errors(f"--out_dir {probe.parent}"):
            write_atomically(probe, lambda file: file.write(b"a byte, as a full disk has none"))
            probe.unlink()
    for weights in (path, beside(path, "best")):
        if not weights.is_file():
            continue
        if difference := first_difference(weights, read_state(weights), raw_model):
            other = "--lora_name" if lora_state(raw_model) else "--out_dir"
            raise UserError(
                f"{weights} holds another model ({difference}): move it, or choose another {other} "
                "or --run_name"
            )


@dataclass(frozen=True)
class Splits:
    """The rows to train on, to validate on (by name) and to test on."""

    train: Rows
    val: dict[str, Rows]
    test: Rows | None

    def sources(self) -> list[Rows]:
        """The rows of every source, those to train on first."""
        test = [] if self.test is None else [self.test]
        return [*self._train_sources(), *self.val.values(), *test]

    def learnt(self) -> list[StoredDataset]:
        """What is trained on, by source."""
        return [rows.dataset for rows in self._train_sources()]

    def shown(self) -> list[StoredDataset]:
        """What samples and questions are taken from: the validation data, else the training's."""
        return [rows.dataset for rows in self.val.values()] or self.learnt()

    def _train_sources(self) -> list[Rows]:
        return [*self.train.parts.values()] if isinstance(self.train, Mixture) else [self.train]


def map_sources(rows: Rows, make: Callable[[Rows], Rows]) -> Rows:
    """What `make` makes of rows, of a mixture those of each source."""
    return rows.map(make) if isinstance(rows, Mixture) else make(rows)


def open_splits(
    setup: Setup,
    find_file: Callable[[Path], Path],
    dataset: "partial[StoredDataset]",
    scored: "partial[StoredDataset] | None" = None,
    make_rows: Callable[[StoredDataset], Rows] | None = None,
) -> Splits:
    """Open the data that the flags name, the smaller files first: their errors show sooner.

    Args:
        setup: what has the flags; UserError if it resumes a run of other rows or flags.
        find_file: gives the file of a path (`ensure_sample`).
        dataset: makes a data set of a source, given the arguments that all of them have.
        scored: makes those that are scored, not learnt from; None: as `dataset`.
        make_rows: makes rows of a data set; None: packed or padded, as --packing is.
    """
    args = setup.args
    if make_rows is None:
        packed = partial(PackedRows, row_length=args.max_seq_len)
        make_rows = packed if args.packing else PaddedRows

    encoder = dataset.func.make_encoder(setup.tokenizer, RecordOptions.of(args))

    def open_file(path: Path, make: Callable[..., StoredDataset]) -> StoredDataset:
        options = {"cache_dir": args.cache_dir, "skip_bad_lines": args.skip_bad_lines}
        return make(find_file(path), encoder=encoder, **options)

    scored = scored or dataset
    test = make_rows(open_file(args.test_data_path, scored)) if args.test_data_path else None
    val = {name: make_rows(open_file(path, scored)) for name, path in args.val_data_path}
    sources = [(args.data_path, None)] if isinstance(args.data_path, Path) else args.data_path
    names = source_names([path for path, _ in sources])
    parts = {}
    for name, (path, _) in zip(names, sources, strict=True):
        train = open_file(path, dataset)
        if args.val_ratio is not None:
            _, held_out = open_file(path, scored).split(args.val_ratio)
            train, _ = train.split(args.val_ratio)
            val[name if len(sources) > 1 else "held out"] = make_rows(held_out)
        parts[name] = make_rows(train)
    rows = parts[names[0]]
    if len(sources) > 1:
        weights = [
            part.dataset.n_tokens if w is None else w
            for part, (_, w) in zip(parts.values(), sources, strict=True)
        ]
        final = dict(args.mix_schedule)
        changed = [final.get(path, weight) for path, weight in sources] if final else None
        rows = Mixture(parts, weights, args.seed, args.source_end, changed)
    if setup.resume is not None:
        check_identity(setup.path, setup.resume, setup.identity(rows))
        check_output(setup.path, setup.raw_model)
    return Splits(rows, val, test)


def source_names(paths: Sequence[Path]) -> list[str]:
    """A name for each source: that of its file where no other has it, else its path."""
    stems = [path.stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else path.as_posix()
        for stem, path in zip(stems, paths, strict=True)
    ]


def open_chat_splits(setup: Setup, find_file: Callable[[Path], Path]) -> Splits:
    """Open conversations, as `open_splits`, and note what the weights' .json says of them.

    The examples are questions of the validation data, or without it of the training data. Scores
    are means over tokens, whatever --loss_weighting is, so that they can be compared.
    """
    args = setup.args
    length = args.max_seq_len + 1  # so that X, one id shorter, can fill a row
    chats = partial(
        SFTDataset, tokenizer=setup.tokenizer, max_length=length, max_turns=args.max_turns
    )
    learnt = partial(chats, loss_weighting=args.loss_weighting)
    splits = open_splits(setup, find_file, learnt, chats)
    longest = [dataset.longest_conversation for dataset in splits.learnt()]
    if before := setup.conversations.get("longest_conversation"):
        longest.append(before)
    shown = splits.shown()
    each = math.ceil(EXAMPLES / len(shown))
    asked = [text for dataset in shown for text in dataset.questions(setup.tokenizer, each)]
    setup.conversations = {
        "longest_conversation": {name: max(n[name] for n in longest) for name in longest[0]},
        "examples": list(dict.fromkeys(asked))[:EXAMPLES],
    }
    return splits
