"""What goes into the model: JSONL lines, token ids and loss masks, packed batches."""

from .chat import ChatEncoder, render_chat
from .fields import RecordError
from .lm_dataset import PretrainDataset, RLAIFDataset, SFTDataset, dataset_kind
from .packing import PackedRows, PaddedRows, RowBatches, collate, make_loader
from .preference import DPODataset, PairRows, collate_pairs
from .reader import check_file, read_records
from .records import (
    BadLines,
    parse_chat,
    parse_preference,
    parse_question,
    parse_text,
    record_text,
)
from .teacher import TeacherTopK, collate_with_teacher
from .text import LANGUAGES, language
from .turns import fit_prompt

__all__ = [
    "LANGUAGES",
    "BadLines",
    "ChatEncoder",
    "DPODataset",
    "PackedRows",
    "PaddedRows",
    "PairRows",
    "PretrainDataset",
    "RLAIFDataset",
    "RecordError",
    "RowBatches",
    "SFTDataset",
    "TeacherTopK",
    "check_file",
    "collate",
    "collate_pairs",
    "collate_with_teacher",
    "dataset_kind",
    "fit_prompt",
    "language",
    "make_loader",
    "parse_chat",
    "parse_preference",
    "parse_question",
    "parse_text",
    "read_records",
    "record_text",
    "render_chat",
]
