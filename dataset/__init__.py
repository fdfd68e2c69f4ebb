"""What goes into the network: JSONL lines, token ids and loss masks, packed batches."""

from dataset.lm_dataset import PretrainDataset
from dataset.packing import PackedRows, PaddedRows, RowBatches, collate
from dataset.records import DataError
from dataset.token_store import tokenizer_hash

__all__ = [
    "DataError",
    "PackedRows",
    "PaddedRows",
    "PretrainDataset",
    "RowBatches",
    "collate",
    "tokenizer_hash",
]
