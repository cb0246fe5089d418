"""What clients may send: the OpenAI API's fields with their limits, and common extensions.

Mirrors the OpenAI specification (August 2026) for completions and chat completions. A field this
server does not know is refused by name; one it knows of but does not support is refused unless
its value asks for nothing. Nothing is ignored, except where a field cannot change the answer
(`user`, `metadata`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from server.api.errors import quote

TokenId = Annotated[int, Field(ge=0, strict=True)]
BiasedToken = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class Body(BaseModel):
    """A request body: unknown fields and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Known fields that are not supported, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, harmless in cls.unsupported.items():
            if name in data and not any(
                data[name] == value and type(data[name]) is type(value) for value in harmless
            ):
                raise ValueError(f"the field {name!r} is not supported by this server")
        return {key: value for key, value in data.items() if key not in cls.unsupported}


class StreamOptions(Body):
    unsupported = {"include_obfuscation": (None, False)}

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM: every chunk carries the usage so far."""


class Generation(Body):
    """What completions and chat completions have in common."""

    model: str | None = Field(default=None, max_length=512)
    n: int | None = Field(default=1, ge=1, le=128)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[BiasedToken, Bias] | None = Field(default=None, max_length=1024)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)

    top_k: int | None = Field(default=None, ge=-1)
    """-1 and 0 mean all tokens."""
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(default=1.0, gt=0, le=10)
    ignore_eos: bool | None = False
    min_tokens: int | None = Field(default=0, ge=0)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128)
    add_special_tokens: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def an_empty_stop_is_none(cls, value: Any) -> Any:
        return None if value in ("", []) else value

    @model_validator(mode="after")
    def stream_options_need_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _one_problem_for_a_prompt(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Say once what a prompt may be, not once for each of its forms."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            "'prompt' must be a string, a list of strings, a list of token ids or a list of lists "
            f"of token ids, not {quote(value)}"
        ) from None


Prompt = str | list[str] | list[TokenId] | list[list[TokenId]] | None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    unsupported = {
        "suffix": (None, ""),
        "prompt_logprobs": (None, 0),
        "truncate_prompt_tokens": (None,),
        "return_token_ids": (None, False),
        "response_format": (None, {"type": "text"}),
        "store": (None, False),
    }

    prompt: Annotated[Prompt, WrapValidator(_one_problem_for_a_prompt)] = None
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = False
    best_of: int | None = Field(default=None, ge=1, le=20)

    @model_validator(mode="after")
    def best_of_fits(self) -> CompletionRequest:
        if self.best_of is None:
            return self
        if self.best_of < (self.n or 1):
            raise ValueError(f"'best_of' ({self.best_of}) must be at least 'n' ({self.n or 1})")
        if self.stream and self.best_of > (self.n or 1):
            raise ValueError("'best_of' above 'n' cannot be combined with 'stream'")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a chat."""

    unsupported = {
        "tool_calls": (None, []),
        "tool_call_id": (None,),
        "function_call": (None,),
        "audio": (None,),
        "refusal": (None,),
        "annotations": (None, []),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(default=None, max_length=128)

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatCompletionRequest(Generation):
    """POST /v1/chat/completions."""

    unsupported = {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "echo": (None, False),
    }

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def logprobs_and_limits_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("'max_tokens' and 'max_completion_tokens' contradict each other")
        return self


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: str | None = Field(default=None, max_length=512)
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = Field(default=None, max_length=512)
    tokens: list[TokenId]
