"""The network: its configuration, its layers and how it generates."""

from .decoder import Decoder, TorchDecoder
from .device import choose_device
from .generation import KVCache
from .LMConfig import LMConfig
from .loss import summarise, token_losses
from .model import MiniMindLM
from .model_lora import (
    LoRA,
    active_lora,
    adapters,
    apply_lora,
    base_state,
    load_lora,
    load_lora_state,
    lora_state,
    merge_lora,
    save_lora,
    unmerge_lora,
    use_lora,
    weights_hash,
)
from .sampling import Sampling
from .tokenizer import load_tokenizer, tokenizer_hash
from .weights import (
    load_adapter,
    load_model,
    load_trained_state,
    load_weights,
    read_about,
    resolve_weights,
    save_adapter,
    save_weights,
    trained_state,
    weights_path,
)

__all__ = [
    "Decoder",
    "KVCache",
    "LMConfig",
    "LoRA",
    "MiniMindLM",
    "Sampling",
    "TorchDecoder",
    "active_lora",
    "adapters",
    "apply_lora",
    "base_state",
    "choose_device",
    "load_adapter",
    "load_lora",
    "load_lora_state",
    "load_model",
    "load_tokenizer",
    "load_trained_state",
    "load_weights",
    "lora_state",
    "merge_lora",
    "read_about",
    "resolve_weights",
    "save_adapter",
    "save_lora",
    "save_weights",
    "summarise",
    "token_losses",
    "tokenizer_hash",
    "trained_state",
    "unmerge_lora",
    "use_lora",
    "weights_hash",
    "weights_path",
]
