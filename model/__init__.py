"""The network: its configuration, its layers and how it generates."""

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

__all__ = [
    "KVCache",
    "LMConfig",
    "LoRA",
    "MiniMindLM",
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
