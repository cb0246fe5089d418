"""What clients may send: the OpenAI API's fields with their limits, and common extensions.

Mirrors the OpenAI specification (August 2026) for completions and chat completions. A field this
server does not know is refused by name; one it knows of but does not support is refused unless
its value asks for nothing. Nothing is ignored, except where a field cannot change the answer
(`user`, `metadata`, `safety_identifier`, `prompt_cache_key`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.api.errors import ABOUT_A_FIELD, quote

_INT64 = 2**63


def _problem_of(field: str, message: str) -> PydanticCustomError:
    """Return a problem that is found by looking at the whole body but is about one field."""
    return PydanticCustomError(ABOUT_A_FIELD, "{message}", {"message": message, "field": field})


def _is_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and cannot be tokenised."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: {quote(text[error.start : error.end])} at "
                f"character {error.start} is half of a surrogate pair"
            ) from None
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]
Count = Annotated[int, Field(ge=0, lt=_INT64)]
TokenId = Annotated[int, Field(ge=0, lt=_INT64, strict=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
BiasedToken = Annotated[int, Field(ge=0, lt=_INT64)]
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
                raise _problem_of(name, f"the field {name!r} is not supported by this server")
        return {key: value for key, value in data.items() if key not in cls.unsupported}


class StreamOptions(Body):
    unsupported = {"include_obfuscation": (None, False)}

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM: every chunk carries the usage so far."""


def _as_list_of_stops(value: Any) -> Any:
    """Return what `stop` means as a list: a string is a list of one, and "" asks for nothing."""
    if value is None or isinstance(value, list):
        return value or None
    if isinstance(value, str):
        return [value] if value else None
    raise ValueError(f"'stop' must be a string or a list of up to 4 strings, not {quote(value)}")


class Generation(Body):
    """What completions and chat completions have in common."""

    model: str | None = Field(default=None, max_length=512)
    n: int | None = Field(default=1, ge=1, le=128)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[BiasedToken, Bias] | None = Field(default=None, max_length=1024)
    stop: Annotated[
        Annotated[list[StopString], Field(max_length=4)] | None, BeforeValidator(_as_list_of_stops)
    ] = None
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)

    top_k: int | None = Field(default=None, ge=-1, lt=_INT64)
    """-1 and 0 mean all tokens."""
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(default=1.0, gt=0, le=10)
    ignore_eos: bool | None = False
    min_tokens: Count | None = 0
    stop_token_ids: TokenIds | None = Field(default=None, max_length=128)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def stream_options_need_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise _problem_of(
                "stream_options", "'stream_options' is only allowed when 'stream' is true"
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def _one_problem_for_a_prompt(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Say once what a prompt may be, not once for each of its forms."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            "'prompt' must be a string of valid Unicode, a list of such strings, a list of token "
            f"ids or a list of lists of token ids, not {quote(value)}"
        ) from None


Texts = Annotated[list[Text], Field(fail_fast=True)]
Prompt = Text | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] | None


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
    max_tokens: Count | None = 16
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = False
    best_of: int | None = Field(default=None, ge=1, le=20)

    @property
    def drafts(self) -> int:
        """Choices generated for each prompt."""
        return max(self.best_of or 1, self.n or 1)

    @model_validator(mode="after")
    def best_of_fits(self) -> CompletionRequest:
        if self.best_of is None:
            return self
        if self.best_of < (self.n or 1):
            raise _problem_of(
                "best_of", f"'best_of' ({self.best_of}) must be at least 'n' ({self.n or 1})"
            )
        if self.stream and self.best_of > (self.n or 1):
            raise _problem_of("best_of", "'best_of' above 'n' cannot be combined with 'stream'")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Text


def _as_parts(value: Any) -> Any:
    """Return what `content` means as a list of parts: a string is a list of one."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise ValueError(f"'content' must be a string or a list of text parts, not {quote(value)}")


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
    content: Annotated[
        list[TextPart], Field(min_length=1, fail_fast=True), BeforeValidator(_as_parts)
    ]
    name: str | None = Field(default=None, max_length=128)

    @property
    def text(self) -> str:
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
        "moderation": (None,),
        "prompt_cache_options": (None,),
        "prompt_cache_retention": (None,),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=1, lt=_INT64)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=_INT64)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)

    @model_validator(mode="after")
    def logprobs_and_limits_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _problem_of(
                "top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true"
            )
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise _problem_of(
                "max_tokens", "'max_tokens' and 'max_completion_tokens' contradict each other"
            )
        return self


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: str | None = Field(default=None, max_length=512)
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = Field(default=None, max_length=512)
    tokens: TokenIds
