"""What goes into the network: JSONL lines, token ids and loss masks, packed batches."""

from .any_dataset import open_dataset
from .chat import ChatEncoder, render_chat
from .lm_dataset import PretrainDataset, RLAIFDataset, SFTDataset
from .packing import PackedRows, PaddedRows, RowBatches, collate, make_loader
from .records import Conversation, DataError, check_file, parse_chat
from .token_store import tokenizer_hash

__all__ = [
    "ChatEncoder",
    "Conversation",
    "DataError",
    "PackedRows",
    "PaddedRows",
    "PretrainDataset",
    "RLAIFDataset",
    "RowBatches",
    "SFTDataset",
    "check_file",
    "collate",
    "make_loader",
    "open_dataset",
    "parse_chat",
    "render_chat",
    "tokenizer_hash",
]
