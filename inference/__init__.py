"""What the terminal, the server and the page share: loading weights, and text in and out."""

from .talker import Talker
from .text import TextStream
from .weights import WeightSpec, load_talker

__all__ = ["Talker", "TextStream", "WeightSpec", "load_talker"]
