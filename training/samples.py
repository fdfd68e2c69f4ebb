"""What the model writes after the prompts of --sample_prompts, while it is trained."""

import torch
from torch import Tensor

from common import UserError
from dataset import ChatEncoder, render_chat
from dataset.text import TextEncoder

from .setup import Setup

NEW_TOKENS = 64  # at most


def encode_prompts(setup: Setup) -> list[Tensor]:
    """The ids of each prompt, (T,) int64: the beginning of a document, or a question in a chat.

    UserError if one leaves no room for an answer.
    """
    prompts = setup.args.sample_prompts
    if not prompts:
        return []
    encoder = (ChatEncoder if setup.stage.chats else TextEncoder)(setup.tokenizer)
    encoded = []
    for prompt in prompts:
        if setup.stage.chats:
            message = {"role": "user", "content": prompt}
            pieces = render_chat([message], add_generation_prompt=True)
            ids = encoder.encode([pieces]).ids
        else:
            ids = encoder.encode([prompt]).ids[:-1]  # without </s>
        room = setup.raw_model.config.max_seq_len - NEW_TOKENS
        if len(ids) > room:
            raise UserError(
                f"--sample_prompts {prompt[:20]!r}…: {len(ids):,} tokens; at most {room:,} fit"
            )
        encoded.append(torch.from_numpy(ids.astype("int64")))
    return encoded


def write_samples(setup: Setup, prompts: list[Tensor]) -> list[tuple[str, str]]:
    """Each prompt, and what the model most probably continues or answers to its ids.

    Nothing is drawn, so that a run is the same with and without samples.
    """
    model = setup.raw_model
    was_training = model.training
    model.eval()
    answers = model.batch_generate(prompts, max_new_tokens=NEW_TOKENS)
    model.train(was_training)
    texts = [setup.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in answers]
    return list(zip(setup.args.sample_prompts, texts, strict=True))
