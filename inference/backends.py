"""Where a page gets its answers from: weights on this machine, or a server of OpenAI's API."""

import logging
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from model import Sampling

from .batcher import Event, GenerationRequest, Token
from .loading import PRETRAINED
from .pool import ModelPool
from .text import TextStream

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Settings of an answer; names as in OpenAI's API."""

    max_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    seed: int | None = None


class LocalModels:
    """The models of a pool."""

    def __init__(self, pool: ModelPool):
        self.pool = pool

    def models(self) -> dict[str, bool]:
        """The models, the default first, each with whether it answers conversations."""
        return {name: card.chats for name, card in self.pool.cards().items()}

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> Iterator[str]:
        """Generate an answer, piece by piece. Closing the iterator ends the generation.

        A conversation that is too long for the model loses its oldest exchanges, and those that
        `ChatModel.recent` leaves out; a model that does
        not chat continues the last message. Raises many kinds of error, each with a text for users.
        """
        batcher = self.pool.get(model)
        chat_model = batcher.chat_model
        messages = chat_model.recent(messages, LOG.warning)
        ids = chat_model.chat_ids(messages, room=settings.max_tokens)
        if len(ids) >= chat_model.context:
            raise ValueError(f"{len(ids)} tokens leave no room in {chat_model.context}")
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = GenerationRequest(
            ids=ids,
            max_new_tokens=settings.max_tokens,
            sampling=Sampling(
                do_sample=settings.temperature > 0,
                temperature=settings.temperature,
                top_p=settings.top_p,
                repetition_penalty=settings.repetition_penalty,
            ),
            seed=settings.seed,
            emit=events.put,
        )

        def tokens() -> Iterator[int]:
            while isinstance(event := events.get(), Token):
                yield event.token
            if isinstance(event, Exception):
                raise event

        batcher.submit([request])
        try:
            yield from TextStream(chat_model.tokenizer).decode(tokens())
        finally:
            request.cancelled = True


class Endpoint:
    """The models of a server that speaks OpenAI's API at `url`. Methods as those of LocalModels."""

    def __init__(self, url: str, api_key: str | None):
        import openai  # local weights do not need it

        self.client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0)

    def models(self) -> dict[str, bool]:
        """As in LocalModels; a model answers conversations unless its name is of pretraining."""
        names = [model.id for model in self.client.models.list()]
        return {name: not name.startswith(PRETRAINED) for name in names}

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> Iterator[str]:
        """Generate an answer, piece by piece. Closing the iterator ends the generation."""
        options = {name: value for name, value in vars(settings).items() if value is not None}
        penalty = options.pop("repetition_penalty")
        if penalty != 1:  # not every server knows it
            options["extra_body"] = {"repetition_penalty": penalty}
        chats = not model.startswith(PRETRAINED)
        if chats:
            create, prompt = self.client.chat.completions.create, {"messages": list(messages)}
        else:
            create, prompt = self.client.completions.create, {"prompt": messages[-1]["content"]}
        with create(model=model, **prompt, stream=True, **options) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    if piece := choice.delta.content if chats else choice.text:
                        yield piece


Backend = LocalModels | Endpoint
