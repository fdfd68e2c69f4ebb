"""What the terminal, the server and the page share: loading weights, and text in and out."""

from .chat_model import ChatModel
from .text import TextStream
from .weights import WeightSpec, load_chat_model

__all__ = ["ChatModel", "TextStream", "WeightSpec", "load_chat_model"]
