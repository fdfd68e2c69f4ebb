"""What terminal, server, page, converter and scores share: loading models, generating text."""

from .chat_model import ChatModel
from .command_line import (
    THINKING,
    add_answer_arguments,
    add_compute_arguments,
    add_engine,
    add_history_cnt,
    add_model_arguments,
    add_tool_file,
    add_weight_arguments,
    chosen_engine,
    listen,
    named_weights,
    open_pool,
)
from .loading import TrainedModel, WeightSpec, describe_weights, load_chat_model, load_trained
