"""Requests of OpenAI's API, as far as this project understands them.

https://platform.openai.com/docs/api-reference/chat/create and …/completions/create. What would
change the answer and is not offered is refused by name, unless it is null, empty or at its default;
what would not change it is taken and not used. Beyond OpenAI's parameters there are top_k, min_p
and repetition_penalty.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model import Sampling


def encodable(text: str) -> str:
    """The text. Raises ValueError for half a surrogate pair, which no UTF-8 text holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not a text: it holds half a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(encodable)]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]


def only(*values: Any) -> Any:
    """The type of a parameter that is not offered: null, or one of the values that do nothing."""

    def check(value: Any) -> Any:
        taken = [None, *values]
        if not any(type(value) is type(one) and value == one for one in taken):
            allowed = " or ".join(json.dumps(one) for one in taken)
            raise PydanticCustomError("unsupported", "may only be {allowed}", {"allowed": allowed})
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *values]})]


class Part(BaseModel):
    """A part of a conversation.

    Clients send answers back with all fields that some server gave them: one that is null or empty
    says nothing.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def drop_empty(cls, fields: Any) -> Any:
        """Leave out what is empty and has no meaning here."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if name in cls.model_fields or value not in (None, "", [], {})
        }


class TextPart(Part):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = None  # prompts are cached without it


class Message(Part):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None  # of the speaker; the chat format has no place for it
    annotations: list[Any] | None = None  # where an answer's facts come from: no part of its text

    @model_validator(mode="before")
    @classmethod
    def fill_content(cls, fields: Any) -> Any:
        """An answer may have no content, which is an empty one."""
        if isinstance(fields, dict) and fields.get("role") == "assistant":
            return {**fields, "content": "" if (c := fields.get("content")) is None else c}
        return fields

    def record(self) -> dict[str, str]:
        """As the chat format has it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(BaseModel):
    """Only text is written."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class Request(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=10_000)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: only({}) = None
    user: str | None = None  # names a user to OpenAI; not needed here

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, fields: Any) -> Any:
        """A parameter that is null was left out, also one that is not known here."""
        if not isinstance(fields, dict):
            return fields
        return {n: v for n, v in fields.items() if n in cls.model_fields or v is not None}

    def sampling(self) -> Sampling:
        """How tokens are chosen; temperature 0 takes the likeliest."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            do_sample=temperature > 1e-5,
            temperature=max(temperature, 1e-5),
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
        )

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    # Not offered:
    audio: only({}) = None
    function_call: only("none", "auto") = None
    functions: only([]) = None
    modalities: only([], ["text"]) = None
    moderation: only({}) = None
    reasoning_effort: only("none") = None
    store: only(False) = None
    tool_choice: only("none", "auto") = None
    tools: only([]) = None
    verbosity: only("medium") = None
    web_search_options: only() = None  # an empty one asks for a search
    # Not used, for they change no answer:
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1)]
        | None
    )
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    # Not offered:
    best_of: only(1) = None
    suffix: only("") = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The beginnings of texts, as texts or as ids; null begins a document, as "" does."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
