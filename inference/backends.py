"""Where a page gets its answers from: weights on this machine, or a server of OpenAI's API."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from model import Sampling

from .batcher import Closed, GenerationRequest, Token
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

    def sampling(self) -> Sampling:
        """How tokens are chosen; temperature 0 takes the likeliest."""
        return Sampling(
            do_sample=self.temperature > 0,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


class Backend(Protocol):
    """What the page needs of a source of answers."""

    def names(self) -> list[str]:
        """The models there are, the default first."""

    def chats(self, model: str) -> bool:
        """Whether a model answers conversations; else it continues the last message."""

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
        return list(self.pool.offers())

    def chats(self, model: str) -> bool:
        """As Backend."""
        offer = self.pool.offers().get(model)
        return offer is None or offer.chats

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> Iterator[str]:
        """As Backend; a text that is too long for the model loses its oldest exchanges."""
        events: queue.SimpleQueue[Token | str | Exception] = queue.SimpleQueue()
        while True:
            batcher = self.pool.get(model)
            chat_model = batcher.chat_model
            if chat_model.encoder is None:
                ids = chat_model.text_ids(messages[-1]["content"])
            else:
                ids = chat_model.fitting_chat_ids(messages, settings.max_tokens)
            if len(ids) >= chat_model.context:
                raise ValueError(f"{len(ids)} tokens leave no room in {chat_model.context}")
            job = GenerationRequest(
                ids=ids,
                max_new_tokens=settings.max_tokens,
                sampling=settings.sampling(),
                seed=settings.seed,
                emit=events.put,
            )
            try:
                batcher.submit([job])
                break
            except Closed:  # another model took its place just now
                continue
        text = TextStream(chat_model.tokenizer)
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
        import openai  # which weights here do not need

        self.client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0)

    def names(self) -> list[str]:
        """As Backend."""
        return [model.id for model in self.client.models.list()]

    def chats(self, model: str) -> bool:
        """As Backend, by the name that this project gives them."""
        return not model.startswith("pretrain")

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> Iterator[str]:
        """As Backend."""
        options: dict[str, Any] = {
            "model": model,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "stream": True,
        }
        if settings.repetition_penalty != 1:  # which not every server knows
            options["extra_body"] = {"repetition_penalty": settings.repetition_penalty}
        if settings.seed is not None:
            options["seed"] = settings.seed
        if self.chats(model):
            chunks = self.client.chat.completions.create(
                messages=[dict(message) for message in messages], **options
            )
        else:
            chunks = self.client.completions.create(prompt=messages[-1]["content"], **options)
        with chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    piece = choice.delta.content if self.chats(model) else choice.text
                    if piece:
                        yield piece
