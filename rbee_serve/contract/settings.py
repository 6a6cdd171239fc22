"""Settings of queen and worker: one table each, frozen after loading, every value with its default, range and unit.

A file is flat TOML; an environment variable ``RBEE_<NAME>`` overrides it (SPEC 3.9, E-36). Names end in their unit
(``_s``, ``_bytes``, ``_tokens``). Unknown keys are refused by name: a misspelt key never silently means the default.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rbee_serve.contract.errors import ConfigInvalid
from rbee_serve.contract.references import NODE_NAME

Backend = Literal["cpu", "cuda", "rocm", "vulkan"]
#: Names that a request may use. ``metal`` is a valid name that no managed node can serve (SPEC X-24).
BACKEND_NAMES: tuple[str, ...] = ("cpu", "cuda", "rocm", "vulkan", "metal")
KvType = Literal["f16", "q8_0"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "text"]

Port = Annotated[int, Field(ge=1024, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
SecondsOrNever = Annotated[float, Field(ge=0, le=86400)]
#: 26: with "rbee-" before it this is the account that the worker runs as.
InstanceName = Annotated[str, Field(pattern=r"^[a-z]+[0-9]+(-[a-z0-9]+)?$", max_length=26)]
HiveName = Annotated[str, Field(pattern=f"^{NODE_NAME.pattern}$")]


def _adapter(text: str) -> tuple[str, float]:
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0  # a path with a colon in it


def _adapter_path(text: str) -> str:
    path, scale = _adapter(text)
    if not path.startswith("/") or not math.isfinite(scale):
        raise ValueError("an absolute path is expected, or path:scale with a finite scale")
    return text


def _as_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Adapters = Annotated[list[Annotated[str, AfterValidator(_adapter_path)]], Field(max_length=16), BeforeValidator(_as_list)]


class Settings(BaseModel):
    """What queen and worker have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), defer_build=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    log_level: LogLevel = Field("info", description="lowest level that is logged")
    log_format: LogFormat = Field("auto", description="lines of the log: json, or text for people; auto: text on a terminal")
    fleet_token_file: Path | None = Field(
        None,
        description="file with the token that queen and workers share; "
        "default: fleet-token in $CREDENTIALS_DIRECTORY (systemd LoadCredential=)",
    )
    body_max_bytes: int = Field(1_048_576, ge=1024, description="largest request body accepted (SPEC 3.8)")
    headers_max_bytes: int = Field(32_768, ge=1024, description="largest request head (request line and headers) accepted")
    receive_timeout_s: Seconds = Field(30.0, description="time that a client has to send a request's head, and then its body")
    unread_timeout_s: Seconds = Field(
        300.0, description="a client that takes nothing of its answer for so long, or is cut off, is let go and its request ended"
    )
    requests_max: int = Field(1000, ge=1, description="requests in progress at a time; beyond it: 503 OVERLOADED")
    ping_interval_s: Seconds = Field(10.0, description="pause between comment pings on a silent stream (<= 15 s, SPEC 3.5)")

    @classmethod
    def load(cls, path: Path, environ: Mapping[str, str] = os.environ) -> Self:
        """Read ``path``, apply ``RBEE_*`` overrides and validate.

        Raises ConfigInvalid naming file, key, value and what was expected.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigInvalid(f"cannot read settings file {path}: {e.strerror}", path=str(path)) from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ConfigInvalid(f"{path} is not valid TOML: {e}", path=str(path)) from e
        return cls.from_values(values, environ, origin=str(path))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], environ: Mapping[str, str], *, origin: str) -> Self:
        """Validate ``values`` with the overrides of ``environ`` on top; ``origin`` names the source in errors."""
        merged = dict(values)
        for name in cls.model_fields:
            if (override := environ.get(f"RBEE_{name.upper()}")) is not None:
                merged[name] = override
        try:
            return cls.model_validate(merged)
        except ValidationError as e:
            problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']} (got {p['input']!r})" for p in e.errors()]
            raise ConfigInvalid(
                f"{origin}: " + "; ".join(problems),
                hint=f"correct the keys named above in {origin}; docs/settings.md lists all of them",
                problems=problems,
            ) from e


class WorkerSettings(Settings):
    """``/etc/rbee/workers/NAME.toml``: one process, one device, one model, N slots."""

    name: InstanceName = Field(description="instance name, `<backend><device>` with an optional suffix: cpu0, cuda1-b")
    hive: HiveName = Field(description="name of this machine in the inventory")
    port: Port = Field(8001, description="port to listen on: 8001 + ordinal of the instance (SPEC X-01)")
    url: str | None = Field(None, description="address under which the queen reaches this worker; default http://host:port")

    backend: Backend = Field("cpu", description="accelerator that must hold the weights; there is no fall-back")
    device: int = Field(0, ge=0, le=63, description="index of the device within the backend")

    model_id: str = Field(min_length=1, max_length=200, description="name under which clients ask for the model")
    model_ref: str | None = Field(None, max_length=500, description="where the model came from: hf:org/repo:file or file:///path")
    model_path: Path = Field(description="GGUF file")
    model_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="digest of the file, from the catalog")

    slots: int = Field(4, ge=1, le=64, description="streams decoded in parallel")
    context_tokens: int = Field(
        4096, ge=64, le=1_048_576, description="context of each slot; cut to what the model was trained for"
    )
    threads: int = Field(0, ge=0, le=512, description="compute threads; 0: as many as the process may use")
    prompt_block_tokens: int = Field(
        128,
        ge=32,
        le=4096,
        description="prompt tokens evaluated in one call; smaller ones are taken where stream_gap_s asks for it",
    )
    stream_gap_s: Seconds = Field(
        0.14,
        description="longest pause that prompts of others make between two tokens of a running stream, "
        "as far as a block of 64 prompt tokens (32 with kv_type q8_0) takes no longer; between a stream's first two tokens up to "
        "60 times as long, for newcomers with short prompts",
    )
    draft_tokens: int = Field(
        7,
        ge=0,
        le=15,
        description="most tokens of a stream that are guessed from its text so far (prompt look-up) and checked in one call, "
        "where its last guesses were right: answers that repeat their prompt or themselves come faster; 0: no guessing",
    )
    prefix_store_dir: Path | None = Field(
        None,
        description="folder in which an engine that ends leaves the prompt prefixes it holds for the next one, each instance "
        "in a folder of its name; under systemd one of CacheDirectory=. Holds prompts' tokens in plain. None: nothing is kept",
    )
    prefix_store_max_bytes: int = Field(
        1 << 30, ge=1 << 20, description="size of the files in prefix_store_dir; the least recently used are removed"
    )
    kv_type: KvType = Field("f16", description="type of the KV cache; q8_0 takes half the memory and makes streams exact")
    deterministic: bool = Field(
        False,
        description="every stream can be continued elsewhere token for token, at any length (takes kv_type q8_0); "
        "weights that do not allow it are refused",
    )
    memory_check: bool = Field(
        True,
        description="refuse to load a model that the free memory can not hold by the model's own figures; false leaves it to "
        "llama.cpp and the kernel: mapped models larger than the RAM, swap, a cache that the kernel does not count as free",
    )
    lora: Adapters = Field(default_factory=list, description="LoRA adapter files (GGUF) put on the model: path or path:scale")
    cpu_variant: str | None = Field(
        None,
        pattern=r"^[a-z0-9]+$",
        description="llama.cpp CPU build variant (haswell, zen4, ...); default: best the machine has",
    )
    queue_max: int = Field(0, ge=0, le=1024, description="requests that wait for a slot; beyond it: 503 ALL_SLOTS_BUSY")
    max_tokens_limit: int = Field(2048, ge=1, description="largest max_tokens that a request may ask for (SPEC 3.8)")

    queen_url: str | None = Field(None, description="queen to send heartbeats to; none: stand-alone")
    queen_ca_file: Path | None = Field(None, description="certificates (PEM) to trust for an https queen; default: the system's")
    heartbeat_interval_s: Seconds = Field(
        10.0, description="pause between heartbeats (SPEC X-09); each change of state beats at once"
    )
    idle_timeout_s: SecondsOrNever = Field(
        300.0, description="a worker whose socket systemd holds exits 0 after so long without work; 0: never"
    )
    idle_exit_without_socket: bool = Field(
        False, description="exit when idle although no socket is there that would start the worker again"
    )
    queen_lease_s: SecondsOrNever = Field(
        900.0, description="the queen silent for longer: an idle worker exits as by idle_timeout_s (SPEC X-07); 0: never"
    )
    drain_timeout_s: Seconds = Field(
        30.0, description="how long running streams may finish after SIGTERM; TimeoutStopSec= is longer"
    )
    load_timeout_s: Seconds = Field(300.0, description="longest time to load the model (SPEC 3.8)")
    stall_timeout_s: Seconds = Field(60.0, description="longest engine step before the watchdog is no longer fed")

    @model_validator(mode="after")
    def _exact_needs_q8_0(self) -> Self:
        if self.deterministic and "kv_type" in self.model_fields_set and self.kv_type != "q8_0":
            raise ValueError(f'deterministic = true needs kv_type = "q8_0", not "{self.kv_type}": take kv_type out')
        return self

    @property
    def adapters(self) -> list[tuple[str, float]]:
        """The LoRA adapters as (path, scale)."""
        return [_adapter(text) for text in self.lora]

    @property
    def worker_id(self) -> str:
        """Fleet-wide id: ``<hive>-<name>``; two nodes with the same instance name are two workers."""
        return f"{self.hive}-{self.name}"

    @property
    def public_url(self) -> str:
        """Address to advertise, without a trailing slash."""
        return (self.url or f"http://{self.host}:{self.port}").rstrip("/")


class QueenSettings(Settings):
    """``/etc/rbee/queen.toml``."""

    port: Port = Field(8080, description="port to listen on (SPEC X-01)")
    client_keys_file: Path | None = Field(
        None,
        description="client API keys, hashed; default: client-keys in $CREDENTIALS_DIRECTORY. None on loopback: no key asked for",
    )
    tls_cert_file: Path | None = Field(None, description="certificate chain (PEM); with tls_key_file: https instead of http")
    tls_key_file: Path | None = Field(None, description="key of the certificate; default: tls-key in $CREDENTIALS_DIRECTORY")
    bad_requests_per_minute: int = Field(
        600, ge=0, description="requests that one key, or address without a key, may get wrong; beyond it: 429; 0: not counted"
    )
    fleet_file: Path | None = Field(
        None,
        description="machines and workers that the inventory declares (JSON, written by site.yml)",
    )
    ctl_command: str | None = Field(
        None,
        min_length=1,
        description="program that runs the fleet operations of jobs; default: rbee-ctl beside rbee-queen, or on PATH",
    )
    audit_file: Path | None = Field(
        None, description="audit log (JSON lines, hash-chained); default: audit.jsonl in $STATE_DIRECTORY, none without one"
    )
    audit_max_bytes: int = Field(16_777_216, ge=4096, description="size at which the audit log is rotated")
    audit_keep: int = Field(8, ge=1, le=1000, description="rotated audit logs that are kept")
    state_dir: Path | None = Field(
        None,
        description="folder for what heartbeats will not tell again after a restart: dormant and retired workers; "
        "default: $STATE_DIRECTORY (systemd StateDirectory=); none: it is forgotten",
    )
    stale_after_s: Seconds = Field(30.0, description="a worker silent for longer is not routed to (SPEC X-09)")
    forget_after_s: Seconds = Field(120.0, description="a worker silent for longer is forgotten (SPEC X-09)")
    connect_timeout_s: Seconds = Field(5.0, description="time to connect to a worker (SPEC 3.8)")
    first_byte_timeout_s: Seconds = Field(10.0, description="time until a worker answers with headers")
    dead_peer_timeout_s: Seconds = Field(
        5.0, description="a machine that acknowledges nothing for so long is cut off (TCP keep-alive; SPEC 3.8)"
    )
    stall_timeout_s: Seconds = Field(
        60.0,
        description="longest time without a token from a worker that decodes, or without a ping from one that reads a prompt",
    )
    request_timeout_s: Seconds = Field(300.0, description="deadline of a request that names none (SPEC 3.8)")
    queue_max: int = Field(
        128, ge=0, le=100_000, description="requests of one model that wait for a slot; beyond it: 503 ALL_SLOTS_BUSY"
    )
    queue_timeout_s: Seconds = Field(60.0, description="longest wait for a slot; then ALL_SLOTS_BUSY")
    load_timeout_s: Seconds = Field(300.0, description="longest wait for a worker that was woken or loads its model (SPEC 3.8)")
    reattach_timeout_s: Seconds = Field(
        60.0, description="longest time for which a stream whose client asked for it is kept without a connection"
    )
    drain_timeout_s: Seconds = Field(
        30.0, description="how long running streams may finish after SIGTERM; TimeoutStopSec= is longer"
    )


_S = TypeVar("_S", bound=Settings)


def describe(cls: type[_S]) -> list[dict[str, str]]:
    """Return one row a setting for the docs: ``{"name", "type", "default", "description"}``."""
    rows = []
    for name, field in cls.model_fields.items():
        annotation = field.annotation
        kind = getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
        value = field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else ("none" if value is None or value == [] else str(value))
        rows.append({"name": name, "type": kind, "default": default, "description": field.description or ""})
    return rows
