"""What the terminal, the server and the page share: loading weights, and text in and out."""

from .talker import Talker, make_decoder
from .text import TextStream
from .weights import Choice, list_weights, load_talker

__all__ = ["Choice", "Talker", "TextStream", "list_weights", "load_talker", "make_decoder"]
