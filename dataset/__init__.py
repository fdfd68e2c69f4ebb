"""What goes into the network: JSONL lines, token ids and loss masks, packed batches."""

from .any_dataset import dataset_kind, open_dataset
from .chat import ChatEncoder, render_chat
from .lm_dataset import PretrainDataset, RLAIFDataset, SFTDataset
from .packing import PackedRows, PaddedRows, RowBatches, collate, make_loader
from .preference import DPODataset, PairRows, collate_pairs
from .reader import check_file, read_records
from .records import (
    BadLines,
    Conversation,
    RecordError,
    parse_chat,
    parse_preference,
    parse_question,
    parse_text,
)
from .teacher import TeacherTopK, collate_with_teacher

__all__ = [
    "BadLines",
    "ChatEncoder",
    "Conversation",
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
    "make_loader",
    "open_dataset",
    "parse_chat",
    "parse_preference",
    "parse_question",
    "parse_text",
    "read_records",
    "render_chat",
]
