"""The values that travel between parts and to the user. Plain data from the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fiddler.formats.packed import Matrix

DEMO = Path(__file__).with_name("demo")
"""The built-in demo model's checkpoint folder."""

FinishReason = Literal["stop", "length"]
"""Why a request ended: an end-of-sequence token or stop string, or `max_new_tokens` reached."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens a request took and made."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    `text` is what became printable with this token: it may be empty while a multi-byte character or a possible
    stop string is incomplete, and never holds half a character. `logprob` is the natural logarithm of the
    token's probability under the distribution it was drawn from, and is set only when asked for.
    The last token of a request, and only it, has `finish_reason` and `usage`. `made_s` is when the engine picked
    the token, in seconds of `time.perf_counter`, however late it is read; it takes no part in comparisons.
    """

    id: int
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    made_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request's tokens were made, in seconds since it was submitted; 0.0 where there are none."""

    first_token_s: float
    total_s: float
    """Seconds until the last token."""
    n_tokens: int

    @classmethod
    def of(cls, tokens: Sequence[Token], submitted_s: float) -> Timing:
        """Return the timing of a request's tokens; it was submitted at `submitted_s` on their clock."""
        if not tokens:
            return cls(0.0, 0.0, 0)
        return cls(tokens[0].made_s - submitted_s, tokens[-1].made_s - submitted_s, len(tokens))

    @property
    def tokens_per_s(self) -> float:
        """Decoding rate after the first token; 0.0 where fewer than two tokens were made."""
        decode_s = self.total_s - self.first_token_s
        return (self.n_tokens - 1) / decode_s if self.n_tokens > 1 and decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request: the whole text, its token ids (an end-of-sequence token included) and what it took."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """Counts of a lane's work: loads with their rows and the bytes of weights they read, or copies."""

    n_rows: int
    n_loads: int
    n_bytes: int
    busy_s: float
    """Seconds of the wall clock it worked."""


@dataclass(frozen=True, slots=True)
class PrefetchStatistics:
    """Counts of copies made ahead."""

    n_issued: int = 0
    """Experts copied for a next layer that may want them."""
    n_landed: int = 0
    """Of these, copies that had landed when their layer began."""
    n_used: int = 0
    """Of these, experts that the layer visited, in time or late."""
    delay_s: float = 0.0
    """Seconds of the link's work that demand copies waited for them."""
    precision: float = 0.0
    """Share of all guesses, copied or not, that came true."""
    resting: bool = False
    """Whether it is switched off at present, because it lost more than it gained."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of an engine's work since it was opened, and its present state."""

    n_requests: int
    """Requests admitted."""
    n_finished: int
    """Requests that ran to a finish reason."""
    n_failed: int
    """Requests ended by a step that failed."""
    n_cancelled: int
    """Requests ended early: left, cancelled, or still in flight when the engine closed."""
    n_running: int
    """Requests admitted and not ended."""
    n_waiting: int
    """Requests submitted and not admitted yet."""
    n_steps: int
    """Packed forwards run."""
    n_prompt_tokens: int
    n_new_tokens: int
    kv_bytes: int
    """Bytes of key/value memory the running requests hold."""
    n_kv_tokens: int
    """Tokens whose keys and values the running requests have reserved room for: prompt and longest completion."""
    cpu: LaneStatistics
    """Experts run on the CPU."""
    gpu: LaneStatistics
    """Experts run from the accelerator's slots."""
    link: LaneStatistics
    """Experts copied into slots."""
    n_slots: int
    """Experts the accelerator can hold."""
    n_slots_used: int
    """Experts it holds, or has on their way in."""
    n_hits: int
    """Loads that found their expert in a slot or on its way into one, and ran there."""
    n_fetches: int
    """Copies a layer waited for."""
    n_promotions: int
    """Copies of experts that are visited often, made while the link was idle."""
    prefetch: PrefetchStatistics
    """Copies of experts that a next layer may visit, made while the link was idle."""
    n_fallbacks: int
    """Copies and loads that failed on the accelerator and went to the CPU."""
    dead_lanes: tuple[str, ...]
    """Lanes that ended early; the CPU does their work."""
    prediction_error: float
    """Median of `|predicted / measured - 1|` of the latest layers' makespans; 0.0 where nothing is predicted."""
    step_s: float
    """Seconds spent in steps, on the machine's clock: virtual ones on a simulated machine."""

    @property
    def n_expert_rows(self) -> int:
        """Visits of a token to an expert, over all layers."""
        return self.cpu.n_rows + self.gpu.n_rows

    @property
    def n_expert_loads(self) -> int:
        """Experts run, over all layers and steps; each read its weights once."""
        return self.cpu.n_loads + self.gpu.n_loads

    @property
    def expert_bytes(self) -> int:
        """Bytes of expert weights read to compute."""
        return self.cpu.n_bytes + self.gpu.n_bytes

    @property
    def expert_s(self) -> float:
        """Seconds of expert compute, over both lanes."""
        return self.cpu.busy_s + self.gpu.busy_s


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's matrices, as `[out, in]` views or packed; the store makes them, a device multiplies by them.

    `up` holds the matrices whose outputs stand side by side before the gate: one fused or ungated matrix
    `[(2)I, H]`, or gate and up `[I, H]` each. `up_bias` matches `up`; `down` is `[H, I]`.
    """

    up: tuple[Matrix, ...]
    down: Matrix
    up_bias: tuple[Tensor, ...] = ()
    down_bias: Tensor | None = None
    nbytes: int = field(init=False)
    """Bytes read when the expert runs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(part.nbytes for part in self.parts))

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix."""
        return (*self.up, self.down)

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """Every bias."""
        return self.up_bias if self.down_bias is None else (*self.up_bias, self.down_bias)

    @property
    def parts(self) -> tuple[Matrix, ...]:
        """Every matrix and bias."""
        return (*self.matrices, *self.biases)
