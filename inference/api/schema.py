"""Request bodies of OpenAI's API, and beyond it top_k, min_p, repetition_penalty, and thoughts.

https://platform.openai.com/docs/api-reference/chat/create and …/completions/create. A parameter
that would change the answer and is not offered is refused by name, unless it is null, empty or at
its default; one that would not change it is accepted and not used.
"""

import dataclasses
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from model import Sampling

SAMPLING = {field.name for field in dataclasses.fields(Sampling)}


# With a length to check, pydantic also refuses half a surrogate pair, which UTF-8 cannot encode.
Text = Annotated[str, Field(min_length=0)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


def only(*values: Any) -> Any:
    """The type of a parameter that is not offered: null, or a value that changes nothing."""
    allowed = [None, *values]

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            names = " or ".join(json.dumps(one) for one in allowed)
            raise PydanticCustomError("unsupported", "may only be {allowed}", {"allowed": names})
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": allowed})]


class Body(BaseModel):
    """An object of a request, in which unknown fields are errors unless they are empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def drop_empty(cls, fields: Any) -> Any:
        """Leave out unknown fields that are empty, as clients send them for what is not set."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if name in cls.model_fields or value not in (None, "", [], {})
        }


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = None  # prompts are cached without it


class CalledFunction(Body):
    """The function of a call, and its arguments as the model wrote them: JSON, if it is right."""

    name: Text
    arguments: Text
    parsed_arguments: Any = None  # what the openai client adds


class ToolCall(Body):
    """A call that an assistant's message makes."""

    type: Literal["function"] = "function"
    function: CalledFunction
    id: str | None = None  # results follow the order of their calls
    index: int | None = None  # a client may leave it from a stream


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart]
    name: str | None = None  # the speaker's; the chat format has no place for it
    tool_call_id: str | None = None  # results follow the order of their calls
    reasoning_content: Text | None = None
    tool_calls: list[ToolCall] | None = None
    parsed: Any = None  # what the openai client adds to an answer by a schema
    annotations: list[Any] | None = None  # sources of an answer, which are no part of its text

    @model_validator(mode="before")
    @classmethod
    def fill_content(cls, fields: Any) -> Any:
        """Make the content of an answer without content empty."""
        is_answer = isinstance(fields, dict) and fields.get("role") == "assistant"
        if is_answer and fields.get("content") is None:
            return {**fields, "content": ""}
        return fields

    @model_validator(mode="after")
    def check_role(self) -> "Message":
        """Refuse what only an assistant's message may have."""
        if self.role != "assistant" and (self.reasoning_content or self.tool_calls):
            reason = "only an assistant's message has reasoning_content or tool_calls"
            raise PydanticCustomError("role", reason)
        return self

    def record(self) -> dict[str, Any]:
        """The message as `dataset.render_chat` takes it."""
        is_text = isinstance(self.content, str)
        content = self.content if is_text else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        record: dict[str, Any] = {"role": role, "content": content}
        if self.reasoning_content is not None:
            record["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            record["tool_calls"] = [
                {"name": call.function.name, "arguments": call.function.arguments}
                for call in self.tool_calls
            ]
        return record


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Body):
    """A function that the model may call; its parameters are a JSON schema."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls have arguments of the schema


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def record(self) -> dict[str, Any]:
        """The tool as `dataset.render_chat` takes it."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": self.type, "function": function}


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """The schema of an answer."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None  # refuse keywords of the schema that cannot be enforced


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "ResponseFormat":
        """Refuse a schema without its type, and the type without a schema."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            reason = "json_schema belongs to the type of that name"
            raise PydanticCustomError("schema", reason)
        return self


class TemplateOptions(Body):
    """Options of the chat template; true opens a thought, false closes an empty one."""

    enable_thinking: bool | None = None


class StreamOptions(Body):
    """Settings of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Biases = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=300),  # so that no request slows down the others
]


class BaseRequest(Body):
    """The parameters that both kinds of request have."""

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
    logit_bias: Biases | None = None
    user: str | None = None  # identifies a user to OpenAI; not needed here

    def sampling(self) -> Sampling:
        """How tokens are chosen; temperature 0 is greedy."""
        settings = self.model_dump(include=SAMPLING - {"logit_bias"}, exclude_none=True)
        bias = (self.logit_bias or {}).items()
        settings["logit_bias"] = tuple((int(token), value) for token, value in bias)
        return Sampling(do_sample=settings.get("temperature", 1.0) > 1e-5, **settings)

    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(BaseRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None  # false: one call at most
    chat_template_kwargs: TemplateOptions | None = None
    # Not offered:
    audio: only({}) = None
    function_call: only("none", "auto") = None
    functions: only([]) = None
    modalities: only([], ["text"]) = None
    moderation: only({}) = None
    reasoning_effort: only("none") = None
    store: only(False) = None
    verbosity: only("medium") = None
    web_search_options: only() = None  # an empty one asks for a search
    # Not used, since they change no answer:
    metadata: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None

    @property
    def n_logprobs(self) -> int | None:
        """How many of the top tokens to give with each token; None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def max_new_tokens(self, limit: int) -> int:
        """The most new tokens of a choice, by default the server's limit."""
        return self.max_completion_tokens or self.max_tokens or limit


Item = TypeVar("Item")
NonEmpty = Annotated[list[Item], Field(min_length=1)]
Ids = NonEmpty[Annotated[int, Field(ge=0)]]


class CompletionRequest(BaseRequest):
    """POST /v1/completions."""

    prompt: Text | NonEmpty[Text] | Ids | NonEmpty[Ids] | None
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    # Not offered:
    best_of: only(1) = None
    suffix: only("") = None

    @property
    def n_logprobs(self) -> int | None:
        """How many of the top tokens to give with each token; None for no logprobs."""
        return self.logprobs

    def max_new_tokens(self, limit: int) -> int:
        """The most new tokens of a choice, by default OpenAI's 16 or the server's limit."""
        return min(16, limit) if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as texts or as ids; null begins a document, as "" does."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
