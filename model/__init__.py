"""The network: its configuration, its layers and how it generates."""

from .generation import KVCache
from .LMConfig import LMConfig
from .model import MiniMindLM

__all__ = ["KVCache", "LMConfig", "MiniMindLM"]
