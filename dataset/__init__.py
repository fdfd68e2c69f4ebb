"""What goes into the model: records, token ids and loss masks, packed batches."""

from .chat import ChatEncoder, render_chat
from .fields import RecordError
from .lm_dataset import PretrainDataset, RLAIFDataset, SFTDataset, dataset_kind
from .mixture import Mixture
from .packing import PackedRows, PaddedRows, RowBatches, collate, make_loader, shorten_rows
from .preference import DPODataset, PairRows, collate_pairs
from .reader import Place, check_source, locate, read_records
from .records import (
    BadLines,
    RecordOptions,
    pair_judged,
    parse_chat,
    parse_preference,
    parse_question,
    parse_text,
    record_kind,
    record_text,
)
from .stored import NoItems
from .teacher import TeacherTopK, collate_with_teacher
from .text import LANGUAGES, language
from .turns import fit_prompt
