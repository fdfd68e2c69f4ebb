"""The network: its configuration, its layers and how it generates."""

from .decoder import Decoder, TorchDecoder
from .generation import KVCache
from .LMConfig import LMConfig
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
    "load_lora",
    "load_lora_state",
    "lora_state",
    "merge_lora",
    "save_lora",
    "unmerge_lora",
    "use_lora",
    "weights_hash",
]
