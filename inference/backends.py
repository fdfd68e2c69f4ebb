"""Where a page gets its answers from: weights on this machine, or a server of OpenAI's API."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import openai

from model import Sampling

from .batcher import Job, Token
from .pool import ModelPool
from .text import TextStream


@dataclass(frozen=True)
class Settings:
    """How an answer is written; names as in OpenAI's API."""

    max_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    seed: int | None = None


class Backend(Protocol):
    """What the page needs of a source of answers."""

    def names(self) -> list[str]:
        """The models there are, the default first."""

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> Iterator[str]:
        """An answer, piece by piece. Closing the iterator stops the writing.

        Raises:
            Exception: of many kinds; its text is for the user.
        """


class LocalModels:
    """The weights in a folder.

    Args:
        pool: loads them.
    """

    def __init__(self, pool: ModelPool):
        self.pool = pool

    def names(self) -> list[str]:
        """As Backend."""
        return list(self.pool.names())

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> Iterator[str]:
        """As Backend; a text that is too long for the model loses its oldest exchanges."""
        batcher = self.pool.get(model)
        talker = batcher.talker
        if talker.encoder is None:  # it continues the last message
            ids = talker.text_ids(messages[-1]["content"])
        else:
            ids, _ = talker.fitting_chat_ids([dict(m) for m in messages], settings.max_tokens)
        if len(ids) >= talker.context:
            raise ValueError(f"{len(ids)} tokens leave no room for an answer in {talker.context}")
        events: queue.SimpleQueue[Token | str | Exception] = queue.SimpleQueue()
        greedy = settings.temperature == 0
        job = Job(
            ids=ids,
            max_new_tokens=settings.max_tokens,
            sampling=Sampling(
                do_sample=not greedy,
                temperature=1.0 if greedy else settings.temperature,
                top_p=settings.top_p,
                repetition_penalty=settings.repetition_penalty,
            ),
            seed=settings.seed,
            ends=frozenset({talker.tokenizer.eos_token_id}),
            emit=events.put,
        )
        batcher.submit([job])
        text = TextStream(talker.tokenizer)
        try:
            while isinstance(event := events.get(), Token):
                if piece := text.add(event.token):
                    yield piece
            if isinstance(event, Exception):
                raise event
            if piece := text.finish():
                yield piece
        finally:
            job.cancelled = True


class Endpoint:
    """A server that speaks OpenAI's API, whoever runs it.

    Args:
        url: up to and with /v1.
        api_key: what it asks for, or None.
    """

    def __init__(self, url: str, api_key: str | None):
        self.client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0)

    def names(self) -> list[str]:
        """As Backend."""
        return [model.id for model in self.client.models.list()]

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> Iterator[str]:
        """As Backend."""
        more: dict[str, Any] = {}
        if settings.repetition_penalty != 1:  # which not every server knows
            more["extra_body"] = {"repetition_penalty": settings.repetition_penalty}
        if settings.seed is not None:
            more["seed"] = settings.seed
        with self.client.chat.completions.create(
            model=model,
            messages=[dict(message) for message in messages],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stream=True,
            **more,
        ) as chunks:
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
