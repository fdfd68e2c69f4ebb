"""The network: its configuration, its layers, how it generates, and its files."""

from .decoder import Decoder, TorchDecoder
from .device import choose_device
from .generation import Continuation, SamplingLoop
from .kv_cache import KVCache
from .LMConfig import SIZES, LMConfig, shape_of_depth
from .loss import find_targets, mean_scores, target_logits, token_losses
from .model import MiniMindLM
from .model_lora import (
    active_lora,
    apply_lora,
    lora_state,
    merge_lora,
    unmerge_lora,
    use_lora,
    weights_hash,
)
from .sampling import Constraint, Sampling
from .tokenizer import Tokenizer, keep_tokenizer, load_tokenizer, tokenizer_hash
from .weights import (
    find_weights,
    list_weights,
    load_lora,
    load_model,
    load_trained_state,
    load_weights,
    read_about,
    resolve_weights,
    save_lora,
    save_weights,
    tokenizer_folder,
    trained_state,
    weights_path,
)
