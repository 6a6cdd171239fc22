"""Messages on the wire: native inference (SPEC 3.4), OpenAI requests, heartbeats and worker records (SPEC 3.5, 3.6)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rbee_serve.contract.errors import InvalidRequest

API_VERSION = "v1"
SERVICE_NAME = "rbee"

#: Header that carries the correlation id through queen and worker (SPEC E-27).
CORRELATION_HEADER = "X-Correlation-ID"
#: Header by which a worker names a request; DELETE /v1/inference/{id} takes it.
REQUEST_ID_HEADER = "X-Request-Id"
#: Header with the absolute deadline, seconds since the epoch (SPEC E-31).
DEADLINE_HEADER = "X-Request-Deadline"
#: Headers by which the queen says what it did.
WORKER_HEADER = "X-Rbee-Worker"
PLACEMENT_HEADER = "X-Rbee-Placement"
QUEUED_HEADER = "X-Rbee-Queued-Ms"
#: Seconds for which a client that loses its connection may come back for the rest of its stream.
REATTACH_HEADER = "X-Rbee-Reattach"
CACHED_HEADER = "X-Rbee-Cached-Tokens"

PROMPT_MAX_CHARS = 32_768


class WorkerState(StrEnum):
    """Life of a worker as the registry shows it."""

    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"  # every slot taken
    DRAINING = "draining"
    RETIRING = "retiring"
    DORMANT = "dormant"
    FAILED = "failed"
    STOPPED = "stopped"


#: States in which a worker takes new requests.
ROUTABLE_STATES = frozenset({WorkerState.IDLE, WorkerState.BUSY})


class StopReason(StrEnum):
    """Why a generation ended (SPEC 3.5)."""

    EOS = "EOS"
    MAX_TOKENS = "MAX_TOKENS"
    STOP_SEQUENCE = "STOP_SEQUENCE"
    CANCELLED = "CANCELLED"
    ERROR = "ERROR"


class Message(BaseModel):
    """Base of all messages of ours: unknown fields are refused by name.

    Built when one is first read (defer_build): a start does not wait for the messages of APIs that nobody asks.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), defer_build=True)


class TolerantMessage(BaseModel):
    """Base of messages whose senders we do not control (OpenAI clients): unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), defer_build=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=4), BeforeValidator(_as_list)]

LogitBias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
]


class SamplingParams(Message):
    """How the next token is chosen; defaults are SPEC 3.8's. ``temperature`` 0 is greedy."""

    max_tokens: int = Field(20, ge=1, le=1_000_000)
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000, description="0: no limit")
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: float = Field(1.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="none: drawn at random and reported in `started`")
    stop: StopStrings = Field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: LogitBias = Field(default_factory=dict, description="token id -> added to its logit; -100 bans, 100 forces")
    logprobs: int | None = Field(None, ge=0, le=20, description="report the log probability of each token and of so many others")
    grammar: str | None = Field(None, min_length=1, max_length=65_536, description="GBNF that the text must follow")
    json_schema: dict[str, Any] | None = Field(None, description="JSON schema that the text must follow; {} is any JSON value")

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        if self.grammar is not None and self.json_schema is not None:
            raise ValueError("at most one of grammar and json_schema is possible")
        return self


class ChatMessage(TolerantMessage):
    """One turn of a conversation. ``content`` may be text or OpenAI's list of text parts."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        """Return the text of all parts; raises InvalidRequest for a part that is not text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InvalidRequest(
                    f"messages.content: only text parts are supported, got {part.get('type')!r}", field="messages"
                )
        return "".join(part["text"] for part in self.content)


class Function(TolerantMessage):
    """What a tool is called and takes."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments; none: no arguments")
    strict: bool | None = None


class Tool(TolerantMessage):
    """A function that the model may call (OpenAI's form)."""

    type: Literal["function"]
    function: Function


class FunctionName(TolerantMessage):
    """The function that must be called."""

    name: str


class NamedTool(TolerantMessage):
    """The tool that must be called (OpenAI's form)."""

    type: Literal["function"]
    function: FunctionName


class Continuation(Message):
    """A stream that began elsewhere: what was generated so far, as token ids (SPEC X-14)."""

    generated_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    rendered_at: AwareDatetime | None = Field(
        None, description="with messages: the time that the chat template sees, as `started` told it; none: now"
    )


class InferenceRequest(SamplingParams):
    """``POST /v1/inference`` of worker and queen: exactly one of ``prompt``, ``prompt_ids`` and ``messages``."""

    prompt: str | None = Field(None, min_length=1, max_length=PROMPT_MAX_CHARS)
    prompt_ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, max_length=1_048_576, description="the prompt as token ids, taken as they are"
    )
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=1024)
    stream: bool = True
    continue_from: Continuation | None = None
    timeout_s: float | None = Field(None, gt=0, le=86_400)

    # With ``messages``: the model's own template renders them.
    tools: list[Tool] | None = Field(None, max_length=128, description="OpenAI's function tools")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    # Routing, read by the queen alone; a worker ignores them.
    model: str | None = Field(None, max_length=200)
    node: str | None = Field(None, max_length=64)
    backend: str | None = Field(None, max_length=16)
    device: int | None = Field(None, ge=0, le=63)
    worker_id: str | None = Field(None, pattern=r"^[A-Za-z0-9.-]{1,128}$")
    labels: dict[str, str] = Field(default_factory=dict, max_length=16, description="labels that the worker must have")
    priority: int = Field(0, ge=-10, le=10, description="greater goes first in the queue")
    queue_timeout_s: float | None = Field(
        None,
        ge=0,
        le=86_400,
        description="longest wait for a slot, at most the queen's own; 0: refused at once when all are busy",
    )
    failover: Literal["auto", "off"] = Field("auto", description="off: a stream broken after its first token ends (SPEC X-14)")

    @model_validator(mode="after")
    def _one_input(self) -> InferenceRequest:
        if sum(x is not None for x in (self.prompt, self.prompt_ids, self.messages)) != 1:
            raise ValueError("exactly one of prompt, prompt_ids and messages is required")
        if self.tools and self.messages is None:
            raise ValueError("tools are rendered by the chat template and need messages")
        if self.tool_choice not in (None, "none", "auto"):
            if not self.tools:
                raise ValueError("tool_choice names a call, and there are no tools")
            if self.grammar is not None or self.json_schema is not None:
                raise ValueError("a tool call that is required leaves no room for grammar or json_schema")
        return self


class WorkerRecord(TolerantMessage):
    """A worker as it describes itself in a heartbeat and as ``GET /v1/workers`` lists it (SPEC 3.5, 3.6)."""

    id: str = Field(pattern=r"^[A-Za-z0-9.-]{1,128}$")
    hive_id: str
    name: str
    url: str = Field(pattern=r"^https?://")
    model_id: str
    model_ref: str | None = None
    backend: str
    device: int
    port: int
    pid: int
    status: WorkerState
    slots_total: int = Field(ge=0)
    slots_available: int = Field(ge=0)
    implementation: str
    version: str
    started_at: float = Field(description="seconds since the epoch, worker's clock")
    context_tokens: int | None = None
    vram_bytes: int | None = None
    labels: dict[str, str] = Field(default_factory=dict, description="free labels from the inventory, for placement")
    continuation_class: str | None = Field(None, description="equal classes continue each other's streams exactly (SPEC X-14)")
    model_info: dict[str, Any] = Field(default_factory=dict)


class Heartbeat(TolerantMessage):
    """``POST /v1/worker-heartbeat``. ``seq`` grows with each beat of one process: an older one never overwrites."""

    worker: WorkerRecord
    timestamp: float = Field(description="seconds since the epoch, worker's clock")
    seq: int = Field(0, ge=0)


_M = TypeVar("_M", bound=BaseModel)


def parse(model: type[_M], data: Any) -> _M:
    """Validate decoded JSON as ``model``; raises InvalidRequest naming the first wrong field and all problems.

    Values are not echoed (SPEC E-26).
    """
    try:
        return model.model_validate(data)
    except ValidationError as e:
        problems = [{"field": ".".join(map(str, p["loc"])) or "body", "problem": p["msg"]} for p in e.errors()]
        first = problems[0]
        raise InvalidRequest(f"{first['field']}: {first['problem']}", field=first["field"], problems=problems) from e
