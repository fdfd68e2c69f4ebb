"""What the model writes: after the prompts of --sample_prompts, and at the end of its run."""

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from common import UserError
from dataset import ChatEncoder, render_chat
from dataset.text import TextEncoder

from .setup import Setup, Splits

NEW_TOKENS = 64  # at most
LAST_SAMPLES, FIRST_TOKENS = 3, 16  # at the end of a run; tokens of the beginning of a text


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


def last_prompts(setup: Setup, data: Splits) -> list[Tensor]:
    """The ids of three prompts from the validation data, or without any from the training data.

    They are beginnings of texts, or conversations up to an answer that is learnt; of several
    sources, some of each.
    """
    room = setup.raw_model.config.max_seq_len - NEW_TOKENS
    shown, prompts = data.shown(), []
    each = math.ceil(LAST_SAMPLES / len(shown))
    for dataset in shown:
        spread = range(0, len(dataset), max(1, len(dataset) // each))
        found = (_first_ids(setup, dataset[index]) for index in spread)
        prompts += islice((ids for ids in found if len(ids) <= room), each)
    return prompts[:LAST_SAMPLES]


def _first_ids(setup: Setup, item: Any) -> Tensor:
    """The beginning of a text, or a conversation up to an answer that is learnt."""
    if isinstance(item, dict):  # a pair
        item = item["x_chosen"], item["y_chosen"], item["mask_chosen"]
    ids, _, mask = item
    length = min(FIRST_TOKENS, len(ids) // 2)
    if setup.stage.chats:
        length = int(mask.nonzero()[0]) + 1  # Y[i] follows X[i]
    return ids[: max(1, length)]


def write_samples(setup: Setup, prompts: list[Tensor]) -> list[str]:
    """What the model most probably continues or answers to the ids of each prompt.

    The marks of thoughts and calls are shown, as they are in the tokens. Nothing is drawn, so that
    a run is the same with and without samples.
    """
    model = setup.raw_model
    was_training = model.training
    model.eval()
    answers = model.batch_generate(prompts, max_new_tokens=NEW_TOKENS)
    model.train(was_training)
    texts = [setup.tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in answers]
    return [text.removesuffix(setup.tokenizer.eos_token) for text in texts]
