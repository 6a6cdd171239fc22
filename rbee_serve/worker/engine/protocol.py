"""The engine as the worker's front sees it: one interface, plain data, no llama.cpp.

The engine is a process of its own (llama.cpp aborts on asserts and C++ exceptions): the front outlives it, reports
its death, and still holds the token ids of every stream. ``process.ProcessEngine`` is the implementation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:  # the engine process reads this module and must not pay for pydantic at a cold start
    from rbee_serve.contract.api import SamplingParams

LoadStage = Literal["starting", "loading_to_vram", "ready", "failed"]


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs to load a model; values from WorkerSettings."""

    model_path: str
    model_sha256: str | None
    backend: str
    device: int
    slots: int
    context_tokens: int  # per slot, before cutting to what the model was trained for
    threads: int  # 0: as many as the process may use
    prompt_block_tokens: int
    kv_type: str
    cpu_variant: str | None = None
    memory_check: bool = True  # refuse to load what has no room
    deterministic: bool = False  # refuse to load what can not be made exact
    lora: list[tuple[str, float]] = field(default_factory=list)  # adapter file, scale
    stream_gap_s: float = 0.14  # longest pause that prompts make in running streams
    draft_tokens: int = 0  # tokens of a stream guessed from its text so far and checked in one call
    prefix_store_dir: str | None = None  # where prefixes are kept for the next process; None: nowhere
    prefix_store_max_bytes: int = 0


class EngineTotals(NamedTuple):
    """What the engine has done since it was loaded."""

    busy_s: float = 0.0  # time that it has worked
    decode_s: float = 0.0  # of it in llama.cpp's decode
    drafted: int = 0  # tokens guessed and evaluated
    accepted: int = 0  # of them what was drawn anyway


@dataclass(frozen=True)
class EngineInfo:
    """What was loaded, read back from llama.cpp."""

    architecture: str
    quantization: str
    parameters: int
    size_bytes: int
    layers: int
    vocab_size: int
    context_trained: int
    context_tokens: int  # per slot, in force
    slots: int
    bos_token: str
    eos_token: str
    eos_id: int
    chat_template: str | None
    backend: str  # where the weights are
    devices: list[str]
    device_memory_bytes: int  # weights + KV + compute buffers on the device; 0 for cpu
    threads: int
    engine_version: str  # llama-cpp-python version + llama.cpp build
    continuation_class: str  # digest of model, build, instruction set, weights, KV type, chunking
    metadata: dict[str, Any] = field(default_factory=dict)  # selected general.* keys


@dataclass(frozen=True)
class LoadProgress:
    """State of loading; ``layers_total`` is the GGUF's block count, known from the header on."""

    stage: LoadStage
    layers_loaded: int = 0
    layers_total: int = 0
    error: str | None = None  # when failed: reason for a person
    error_code: str | None = None  # code of contract.errors
    required_bytes: int = 0  # when failed for want of memory: what must be free


@dataclass(frozen=True)
class GenerateRequest:
    """One generation. ``text`` is tokenised by the engine; special tokens are parsed when ``parse_special``."""

    request_id: str
    text: str
    parse_special: bool  # True for rendered chat templates
    add_bos: bool  # False where the rendered template already begins with it
    params: SamplingParams  # seed is set
    generated_ids: list[int] = field(default_factory=list)  # continuation: ids already delivered elsewhere
    prompt_ids: list[int] | None = None  # the prompt itself; ``text`` is then not used


@dataclass(frozen=True)
class Queued:
    """The request is taken and nothing is wrong with it; it waits for a slot, or for the beginning of its prompt that another
    request evaluates or that is being copied. Comes first or not at all."""


@dataclass(frozen=True)
class Started:
    """The request holds a slot. Sent before prompt evaluation."""

    prompt_tokens: int
    cached_tokens: int
    cached_from: str = ""  # "memory" or "disk"


@dataclass(frozen=True)
class TokenOut:
    """One token: index (continuations go on counting), id, and the text that became complete with it."""

    index: int
    token_id: int
    text: str
    logprobs: dict[str, Any] | None = None  # where asked for: as contract.events.token has it


@dataclass(frozen=True)
class Finished:
    """Generation is over. ``stop_reason`` is a contract.api.StopReason value; times in ms.

    ``stop_sequence``: which of the stop strings has come, if one has.
    """

    stop_reason: str
    tokens_out: int
    prompt_ms: float
    decode_ms: float
    stop_sequence: str | None = None


@dataclass(frozen=True)
class Embeddings:
    """One vector of length 1 for each input, as float32 (little-endian), and how many tokens it had."""

    vectors: list[bytes]
    tokens: list[int]


EngineEvent = Queued | Started | TokenOut | Finished


class Engine(Protocol):
    """All methods are called from the front's event loop."""

    async def start(self) -> None:
        """Spawn the process and begin loading; returns at once."""

    @property
    def progress(self) -> LoadProgress:
        """Current state of loading. After a crash: stage ``failed`` with the reason."""

    async def wait_progress(self, seen: LoadProgress) -> LoadProgress:
        """Return the progress as soon as it differs from ``seen``."""

    @property
    def info(self) -> EngineInfo | None:
        """What was loaded; None before ``ready``."""

    @property
    def slots_busy(self) -> int:
        """Requests that hold a slot or wait for one."""

    @property
    def step_age_s(self) -> float:
        """Seconds since the engine's own loop last reported that it moves (it does so at least every second, from
        that loop and no side thread). The watchdog is fed from this."""

    @property
    def totals(self) -> EngineTotals:
        """What the engine has done, reported twice a second."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Sequence[EngineEvent]]:
        """Submit and yield perhaps Queued, then Started, TokenOut*, Finished (alone after a cancellation); each time all that
        has come since.

        Closing the iterator cancels the request and frees its slot within one engine step. Raises PromptTooLong,
        AllSlotsBusy (admission is atomic and happens before the first event), InferenceFailed, WorkerCrashed.
        A slow consumer never slows other streams.
        """

    async def tokenize(self, text: str, *, parse_special: bool, add_bos: bool) -> list[int]:
        """Return token ids."""

    async def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return their text; control tokens are left out, or spelled with ``special``. Raises InvalidRequest."""

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> Embeddings:
        """Return a vector for each text (or list of token ids), pooled as the model says, else the mean of its tokens.

        Runs beside the streams, which wait for at most one block. Raises InvalidRequest, PromptTooLong, AllSlotsBusy (as many
        embedding requests as slots and queue hold are running), InsufficientRam, InsufficientVram, WorkerCrashed.
        """

    async def wait_dead(self) -> str:
        """Return when the process has ended without having been asked to: the reason for a person."""

    async def close(self) -> None:
        """End the process (idempotent): ask, wait 2 s, kill."""
