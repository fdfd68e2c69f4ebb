"""What goes into the network: JSONL lines, token ids and loss masks, packed batches."""

from .lm_dataset import PretrainDataset
from .packing import PackedRows, PaddedRows, RowBatches, collate, make_loader
from .records import DataError
from .token_store import tokenizer_hash

__all__ = [
    "DataError",
    "PackedRows",
    "PaddedRows",
    "PretrainDataset",
    "RowBatches",
    "collate",
    "make_loader",
    "tokenizer_hash",
]
