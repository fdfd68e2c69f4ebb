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
    DataError,
    RecordError,
    parse_chat,
    parse_preference,
    parse_question,
    parse_text,
)
from .teacher import TeacherRows, collate_taught
from .token_store import tokenizer_hash

__all__ = [
    "BadLines",
    "ChatEncoder",
    "Conversation",
    "DPODataset",
    "DataError",
    "PackedRows",
    "PaddedRows",
    "PairRows",
    "PretrainDataset",
    "RLAIFDataset",
    "RecordError",
    "RowBatches",
    "SFTDataset",
    "TeacherRows",
    "check_file",
    "collate",
    "collate_pairs",
    "collate_taught",
    "dataset_kind",
    "make_loader",
    "open_dataset",
    "parse_chat",
    "parse_preference",
    "parse_question",
    "parse_text",
    "read_records",
    "render_chat",
    "tokenizer_hash",
]
