"""A request as the engine sees it: token ids in, events out.

`SamplingParams` and the events are frozen and cross threads; `Request` is the engine thread's own
mutable record. Plain Python: no tensors, no HTTP, no text.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from server.engine.pages import Block
from server.engine.stats import Timeline


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens or the context limit was reached."""
    ABORT = "abort"
    """The client went away or the server shut down."""
    ERROR = "error"
    """The engine could not compute it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. Defaults change nothing."""

    max_tokens: int
    temperature: float = 1.0
    """0 chooses the most likely token."""
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    """Drives the request's own random numbers, whatever else is in the batch."""
    stop_token_ids: frozenset[int] = frozenset()
    """Ending tokens, the model's own end-of-sequence tokens included unless they are ignored."""
    min_tokens: int = 0
    """Ending tokens cannot be chosen before this many tokens."""
    logprobs: int | None = None
    """How many alternatives to report with each generated token."""
    prompt_logprobs: int | None = None
    """How many alternatives to report with each prompt token."""

    @property
    def uses_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities under the model's own distribution at one position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Token ids and log probabilities, the most likely first."""


class TokenEvent(NamedTuple):
    """One generated token. (A tuple: one is made for every token, and a frozen dataclass takes four
    times as long to make.)"""

    token: int
    logprobs: TokenLogprobs | None
    time: float
    finish: FinishReason | None = None
    """Set on the last token: why the request is over. `Ended` follows."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log probabilities of prompt tokens; the prompt's first token has none."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The one terminal event of a request."""

    reason: FinishReason
    timeline: Timeline
    error: str | None = None
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there when the request was first admitted."""


Event = TokenEvent | PromptScored | Ended


class Sink(Protocol):
    """Where a request's events go. Called on the engine thread, must return at once."""

    def put(self, event: Event) -> None: ...


@dataclass(slots=True, eq=False)
class Request:
    """The engine's record of a request. Only the engine thread touches it after submission."""

    id: str
    prompt: tuple[int, ...]
    variant: str
    params: SamplingParams
    sink: Sink
    arrived: float

    output: list[int] = field(default_factory=list)
    pending: int | None = None
    """Set while the next token is sampled but not known here yet: its place among the tokens of
    the step in flight."""
    pending_share: object = None
    """The request's share of the step that samples the pending token. Two steps are on their way at
    times, and only the later one's token is still pending when that of the other arrives."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the request's pages, the step in flight included."""
    pages: dict[int, array[int]] = field(default_factory=dict)
    """Layer group to block table: the page ids that hold tokens 0, 1, ... in order."""
    page_tokens: int = 0
    """Tokens that fit in its pages."""
    blocks: list[Block] = field(default_factory=list)
    """The blocks at the beginning of its block tables that it shares, or lets others share."""
    block_end: int = 0
    """Tokens up to the end of the first block that is not shared yet."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its first full blocks, as far as they were needed."""
    cached_tokens: int = 0
    """Prompt tokens that were in shared blocks when it was first admitted."""
    num_scored_tokens: int = 0
    """Prompt tokens whose log probabilities were reported, so that none is reported twice."""
    first_scheduled: float | None = None
    first_token: float | None = None
    preemptions: int = 0
    needs_last_token: bool = field(init=False)
    """Whether the next step must wait until the token before is known here: to be penalised."""

    def __post_init__(self) -> None:
        self.needs_last_token = self.params.uses_penalties

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, the pending one included."""
        return len(self.output) + (self.pending is not None)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.num_generated

    @property
    def remaining(self) -> int:
        """Tokens that are not computed yet."""
        generated = len(self.output) + (self.pending is not None)
        return len(self.prompt) + generated - self.num_computed_tokens

    @property
    def num_known(self) -> int:
        """Tokens whose ids are known here: all but the pending one."""
        return len(self.prompt) + len(self.output)

    @property
    def can_run(self) -> bool:
        """Whether a step may compute it now. Penalties need to know every token before the next;
        what has all its tokens only waits for the last one to arrive."""
        if self.pending is None:
            return True
        return not self.needs_last_token and len(self.output) + 1 < self.params.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether rows computed now still need the logits of prompt positions."""
        return (
            self.params.prompt_logprobs is not None
            and self.num_scored_tokens < len(self.prompt) - 1
        )

    def tokens(self, start: int, end: int) -> list[int]:
        """Return the tokens at positions start to end - 1; 0 stands for the pending one."""
        prompt, known = len(self.prompt), len(self.prompt) + len(self.output)
        tokens = [
            *self.prompt[start:end],
            *self.output[max(0, start - prompt) : max(0, end - prompt)],
        ]
        return tokens if end <= known else [*tokens, 0]

    @property
    def last_token(self) -> int:
        """The token at the last position; 0 stands for the pending one."""
        if self.pending is not None:
            return 0
        return self.output[-1] if self.output else self.prompt[-1]

    def timeline(self, now: float) -> Timeline:
        return Timeline(self.arrived, self.first_scheduled, self.first_token, now)
