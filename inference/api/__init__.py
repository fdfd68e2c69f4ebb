"""OpenAI's API over HTTP."""

from .app import create_app
from .middleware import Limits
