"""Requests of OpenAI's API, as far as this project understands them.

https://platform.openai.com/docs/api-reference/chat/create and …/completions/create. A parameter
that is not here is refused by name. Beyond OpenAI's there are top_k, min_p and repetition_penalty.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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


class TextPart(BaseModel):
    """A part of a message's content; only text is understood."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None  # of the speaker; the chat format has no place for it
    refusal: str | None = None
    annotations: list[Any] | None = None

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
    include_usage: bool = False
    include_obfuscation: bool = False


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
    user: str | None = None  # names a user to OpenAI; not needed here

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


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None

    def prompts(self) -> list[str]:
        """The beginnings of texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt
