"""Where a page gets its answers from: weights on this machine, or a server of OpenAI's API."""

import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from model import Sampling

from .batcher import Event, GenerationRequest, Token
from .chat_model import earlier_exchanges
from .loading import PRETRAINED
from .parts import Delta
from .pool import ModelPool


@dataclass(frozen=True)
class Settings:
    """Settings of an answer; names as in OpenAI's API."""

    max_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    seed: int | None = None
    enable_thinking: bool | None = None  # None leaves it to the model


@dataclass(frozen=True)
class ModelInfo:
    """What a page knows of a model."""

    chats: bool  # answers conversations; else it continues texts
    history: int | None = None  # earlier exchanges in the longest conversation it was trained on
    examples: tuple[str, ...] = ()  # questions to try

    @classmethod
    def of(cls, chats: bool, about: Mapping[str, Any]) -> "ModelInfo":
        """Of a model's entry, which may have `longest_conversation` and `examples`."""
        history = earlier_exchanges(about.get("longest_conversation"))
        return cls(chats, history, tuple(about.get("examples") or ()))


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, and the tokens of the answer so far if the source counts them."""

    delta: Delta
    tokens: int | None = None


NOTHING = Piece(Delta("content", ""))


class LocalModels:
    """The models of a pool; `address` is where they are."""

    def __init__(self, pool: ModelPool):
        self.pool = pool
        self.address = str(pool.spec.weight or pool.spec.out_dir)

    def models(self) -> dict[str, ModelInfo]:
        """The models, the default first."""
        cards = self.pool.cards()
        return {name: ModelInfo.of(card.chats, vars(card)) for name, card in cards.items()}

    def is_loaded(self, model: str) -> bool:
        """Whether a model answers without being loaded first."""
        return model in self.pool.models

    def stream(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        settings: Settings,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[Piece]:
        """Generate an answer, piece by piece. Closing the iterator ends the generation.

        `messages` and `tools`, JSON schemas, are as in training data. While the model is being
        loaded, the pieces are empty.

        A conversation that is too long for the model loses its oldest exchanges; a model that does
        not chat continues the last message. Raises many kinds of error, each with a text for users.
        """
        load = self.pool.load(model)
        while not load.done():
            yield NOTHING
            wait([load], timeout=0.2)
        batcher = load.result()
        chat_model = batcher.chat_model
        thinks = settings.enable_thinking
        ids = chat_model.chat_ids(messages, tools, settings.max_tokens, thinks)
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

        n_tokens = 0

        def tokens() -> Iterator[int]:
            nonlocal n_tokens
            while isinstance(event := events.get(), Token):
                n_tokens += 1
                yield event.token
            if isinstance(event, Exception):
                raise event

        batcher.submit([request])
        try:
            for delta in chat_model.parse(tokens(), thinks):
                yield Piece(delta, n_tokens)
        finally:
            request.cancelled = True


class Endpoint:
    """The models of a server that speaks OpenAI's API at `url`. Methods as those of LocalModels."""

    def __init__(self, url: str, api_key: str | None):
        import openai  # local weights do not need it

        self.address = url
        self.client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0)

    def models(self) -> dict[str, ModelInfo]:
        """As in LocalModels; a model answers conversations unless its name is of pretraining."""
        return {
            model.id: ModelInfo.of(answers_conversations(model.id), model.model_extra or {})
            for model in self.client.models.list()
        }

    def is_loaded(self, model: str) -> bool:
        """True: servers do not tell."""
        return True

    def stream(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        settings: Settings,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[Piece]:
        """Generate an answer, piece by piece. Closing the iterator ends the generation."""
        options = {name: value for name, value in vars(settings).items() if value is not None}
        options["stream_options"] = {"include_usage": True}
        # Not every server knows what is beyond OpenAI's API.
        penalty, thinks = options.pop("repetition_penalty"), options.pop("enable_thinking", None)
        extra = {"repetition_penalty": penalty} if penalty != 1 else {}
        if thinks is not None:
            extra["chat_template_kwargs"] = {"enable_thinking": thinks}
        options |= {"extra_body": extra} if extra else {}
        chats = answers_conversations(model)
        if chats:
            create, prompt = self.client.chat.completions.create, {"messages": for_api(messages)}
            options |= {"tools": list(tools)} if tools else {}
        else:
            create, prompt = self.client.completions.create, {"prompt": messages[-1]["content"]}
        calls: dict[int, Delta] = {}  # a call comes in pieces
        with create(model=model, **prompt, stream=True, **options) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    if not chats:
                        yield Piece(Delta("content", choice.text))
                        continue
                    if text := getattr(choice.delta, "reasoning_content", None):
                        yield Piece(Delta("reasoning", text))
                    if choice.delta.content:
                        yield Piece(Delta("content", choice.delta.content))
                    for call in choice.delta.tool_calls or ():
                        _, text, name = calls.get(call.index, ("call", "", ""))
                        text += call.function.arguments or ""
                        calls[call.index] = Delta("call", text, name or call.function.name or "")
                if chunk.usage:
                    yield Piece(NOTHING.delta, chunk.usage.completion_tokens)
        yield from map(Piece, calls.values())


def for_api(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as in training data in the form of OpenAI's API, where calls have ids."""
    made: list[dict[str, Any]] = []
    open_ids: list[str] = []  # of calls without a result
    for message in messages:
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = []
            open_ids = [f"call_{len(made)}_{number}" for number in range(len(calls))]
            for id_, call in zip(open_ids, calls, strict=True):
                arguments = call["arguments"]
                if not isinstance(arguments, str):
                    arguments = json.dumps(arguments, ensure_ascii=False)
                function = {"name": call["name"], "arguments": arguments}
                message["tool_calls"].append({"id": id_, "type": "function", "function": function})
        elif message["role"] == "tool" and open_ids:
            message["tool_call_id"] = open_ids.pop(0)
        made.append(message)
    return made


def answers_conversations(name: str) -> bool:
    """Whether a server's model answers conversations, by its name; a folder may stand before it."""
    return not name.rpartition("/")[2].startswith(PRETRAINED)


Backend = LocalModels | Endpoint
