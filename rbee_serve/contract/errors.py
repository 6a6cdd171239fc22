"""Every error that rbee reports, with its code, HTTP status and exit code (SPEC 3.7).

    RbeeError                      INTERNAL_ERROR            500
    ├── RequestError               what the caller sent      4xx
    │   ├── InvalidRequest, InvalidModelRef, InvalidBackend, DeviceOutOfRange, PromptTooLong
    │   ├── MissingApiKey, InvalidApiKey, ModelAccessDenied, OperationNotAllowed
    │   ├── NodeNotFound, ModelNotFound, WorkerNotFound, WorkerBinaryNotFound, RequestNotFound, RouteNotFound, MethodNotAllowed
    │   ├── NodeExists, WorkerAlreadyRegistered, JobNotFound, BodyTooLarge, HeadersTooLarge, RateLimited
    │   ├── ModelInUse, WorkerBinaryInUse, ConfirmationRequired
    │   └── RequestTimeout, RequestCanceled
    ├── CapacityError              nothing free or too small 503, 507
    │   ├── AllSlotsBusy, Overloaded, WorkerDraining, WorkerLoading, NoWorkerAvailable, BackendUnavailable
    │   └── InsufficientRam, InsufficientVram, InsufficientDisk, GpuTooHot
    ├── UpstreamError              a worker or a node failed 502, 504
    │   ├── WorkerCrashed, CudaDeviceFailed, MalformedResponse, ConnectionTimeout, VersionMismatch, InferenceFailed
    │   └── NodeUnreachable, SshTimeout, SshAuthFailed, SshHostKeyRefused, SudoRefused, SshKeyNotFound, SshCommandFailed
    └── OperationError             a fleet operation failed  500
        ├── PlaybookFailed, UnitStartFailed, UnitMasked, PortTaken, SelfTestFailed, DiskFull, NodeLocked
        ├── LoadingTimeout, ConfigInvalid, InventoryReadOnly, MissingDependency
        └── DownloadFailed, DownloadTimeout, ChecksumMismatch, ModelFileInvalid, AuditBroken, BuildFailed, BundleInvalid

An error carries what failed, with the figures in ``details``, and in ``hint`` the next command to type.
"""

from __future__ import annotations

import copy
from enum import IntEnum
from typing import Any, ClassVar, Self


class ExitCode(IntEnum):
    """Exit codes of rbee-ctl (SPEC 3.7) and, from 64 on, of the services (sysexits.h). What each means: EXIT_MEANINGS."""

    OK = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    UNREACHABLE = 4
    REFUSED = 5
    CHANGES = 6
    LOCKED = 7
    KEY_REFUSED = 8
    HOST_KEY = 9
    SUDO_REFUSED = 10
    DISK_FULL = 11
    PORT_TAKEN = 12
    UNIT_MASKED = 13
    SELF_TEST = 14
    TRY_LATER = 75
    CONFIG = 78
    INTERRUPTED = 130


#: Every other failure is 1: a code of its own has what a script, or a person's next step, depends on.
EXIT_MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "done, or there was nothing to do; `logs -f` that was ended by the other side",
    ExitCode.FAILED: "failed; also what is wrong with a name, a value or a file (`NODE_NOT_FOUND`, `INVALID_REQUEST`, ...)",
    ExitCode.USAGE: "not understood: an unknown option, a missing argument, a question that needs `--yes`; nothing was begun",
    ExitCode.PARTIAL: "done on some machines, failed on others; of `hive status`: a hive is stopped",
    ExitCode.UNREACHABLE: "a machine or the queen does not answer, and nothing else is wrong; the same command may work later",
    ExitCode.REFUSED: "a preflight said no (memory, device, in use): nothing was changed; of `hive check`: not fit",
    ExitCode.CHANGES: "`plan` and `drift`: something differs from what is declared",
    ExitCode.LOCKED: "somebody else is changing this machine: later",
    ExitCode.KEY_REFUSED: "SSH answers and does not take the key",
    ExitCode.HOST_KEY: "the machine's SSH host key is unknown or has changed",
    ExitCode.SUDO_REFUSED: "the SSH user may not become root",
    ExitCode.DISK_FULL: "no space left on the machine",
    ExitCode.PORT_TAKEN: "another program has the port",
    ExitCode.UNIT_MASKED: "an administrator has masked the unit",
    ExitCode.SELF_TEST: "a new runtime makes no token: rolled back",
    ExitCode.TRY_LATER: "of a worker alone: no memory for the model now; its socket waits on, systemd does not restart it",
    ExitCode.CONFIG: "of queen and worker alone: the settings are wrong; systemd does not restart them",
    ExitCode.INTERRUPTED: "ended by Ctrl+C or SIGTERM, at whatever stage; of `logs -f` too",
}


class RbeeError(Exception):
    """Root of the tree: one message for a person, ``details`` for a program, ``hint`` for the next step."""

    code: ClassVar[str] = "INTERNAL_ERROR"
    status: ClassVar[int] = 500
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def with_details(self, **more: Any) -> Self:
        """Return this error with more details, as an object of its own: one error may be raised for several requests."""
        found = copy.copy(self)
        found.details = {**self.details, **more}
        return found

    def envelope(self, correlation_id: str | None = None) -> dict[str, Any]:
        """Return the one error shape on the wire.

        ``{"error": {"code": str, "message": str, "details": dict, "hint"?: str, "correlation_id"?: str}}``
        """
        error: dict[str, Any] = {"code": self.code, "message": self.message, "details": self.details}
        if self.hint:
            error["hint"] = self.hint
        if correlation_id:
            error["correlation_id"] = correlation_id
        return {"error": error}


# --- what the caller sent -------------------------------------------------------------------------------------------


class RequestError(RbeeError):
    """The request itself is at fault; sending it again unchanged can not work."""

    code = "INVALID_REQUEST"
    status = 400


class InvalidRequest(RequestError):
    """A field is missing, of the wrong type or out of range; ``details["field"]`` names it."""


class InvalidModelRef(RequestError):
    """Not one of ``hf:org/repo[:file]``, ``file:///path.gguf`` or a known model id."""

    code = "INVALID_MODEL_REF"
    exit_code = ExitCode.REFUSED


class InvalidBackend(RequestError):
    """Not the name of a backend."""

    code = "INVALID_BACKEND"
    exit_code = ExitCode.REFUSED


class DeviceOutOfRange(RequestError):
    """The node has no such device."""

    code = "DEVICE_OUT_OF_RANGE"
    exit_code = ExitCode.REFUSED


class PromptTooLong(RequestError):
    """Prompt and requested tokens do not fit the context; ``details`` has both numbers, or how many it has at least."""

    code = "PROMPT_TOO_LONG"


class MissingApiKey(RequestError):
    """No bearer token in the request."""

    code = "MISSING_API_KEY"
    status = 401


class InvalidApiKey(RequestError):
    """A bearer token that nobody knows."""

    code = "INVALID_API_KEY"
    status = 401


class ModelAccessDenied(RequestError):
    """The key or the hub account may not use this model."""

    code = "MODEL_ACCESS_DENIED"
    status = 403


class OperationNotAllowed(RequestError):
    """The key may infer, but not run operations of the fleet."""

    code = "OPERATION_NOT_ALLOWED"
    status = 403


class RequestNotFound(RequestError):
    """No stream of this request is kept for being fetched again."""

    code = "REQUEST_NOT_FOUND"
    status = 404


class RouteNotFound(RequestError):
    """No such path."""

    code = "NOT_FOUND"
    status = 404


class NodeNotFound(RequestError):
    """The inventory has no such host."""

    code = "NODE_NOT_FOUND"
    status = 404


class ModelNotFound(RequestError):
    """Nobody serves this model; ``details["known"]`` lists those served."""

    code = "MODEL_NOT_FOUND"
    status = 404


class WorkerNotFound(RequestError):
    """No such live worker."""

    code = "WORKER_NOT_FOUND"
    status = 404


class WorkerBinaryNotFound(RequestError):
    """The runtime (virtual environment with llama.cpp) is not on the node."""

    code = "WORKER_BINARY_NOT_FOUND"
    status = 404


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    code = "METHOD_NOT_ALLOWED"
    status = 405


class RequestTimeout(RequestError):
    """The request's deadline passed before it was answered."""

    code = "REQUEST_TIMEOUT"
    status = 408


class NodeExists(RequestError):
    """The inventory has that host already."""

    code = "NODE_EXISTS"
    status = 409


class WorkerAlreadyRegistered(RequestError):
    """The same worker id beats from another address."""

    code = "WORKER_ALREADY_REGISTERED"
    status = 409


class ModelInUse(RequestError):
    """A worker uses the model; ``details["workers"]`` names it."""

    code = "MODEL_IN_USE"
    status = 409
    exit_code = ExitCode.REFUSED


class WorkerBinaryInUse(RequestError):
    """A worker uses the runtime, or it is the current one; ``details["workers"]`` names it."""

    code = "WORKER_BINARY_IN_USE"
    status = 409
    exit_code = ExitCode.REFUSED


class JobNotFound(RequestError):
    """No such job, or it ended so long ago that the queen has forgotten it."""

    code = "JOB_NOT_FOUND"
    status = 404


class BodyTooLarge(RequestError):
    """The body is over the limit that ``details`` names."""

    code = "BODY_TOO_LARGE"
    status = 413


class HeadersTooLarge(RequestError):
    """Request line and headers are over the limit."""

    code = "HEADERS_TOO_LARGE"
    status = 431


class RateLimited(RequestError):
    """The key has used up its requests for now; ``details`` has ``limit`` and ``retry_after_s``."""

    code = "RATE_LIMITED"
    status = 429
    retryable = True


class ConfirmationRequired(RequestError):
    """A destructive command was not confirmed, or there was nobody to ask and no ``--yes``; nothing was changed."""

    code = "CONFIRMATION_REQUIRED"
    exit_code = ExitCode.USAGE


class RequestCanceled(RequestError):
    """The caller cancelled it."""

    code = "REQUEST_CANCELED"
    status = 499


# --- nothing free, or too small -------------------------------------------------------------------------------------


class CapacityError(RbeeError):
    """Nothing is wrong with the request; what it needs is not free or not there."""

    status = 503
    retryable = True


class AllSlotsBusy(CapacityError):
    """Every slot (and the queue) is taken: ``details`` has slots_total and slots_busy."""

    code = "ALL_SLOTS_BUSY"


class Overloaded(CapacityError):
    """More requests are in progress than the service takes at a time."""

    code = "OVERLOADED"


class WorkerDraining(CapacityError):
    """The worker finishes what it has and takes nothing new."""

    code = "WORKER_DRAINING"


class WorkerLoading(CapacityError):
    """The worker is loading its model."""

    code = "WORKER_LOADING"


class NoWorkerAvailable(CapacityError):
    """No live worker fits the request."""

    code = "NO_WORKER_AVAILABLE"


class BackendUnavailable(CapacityError):
    """The node or the build can not run that backend. There is no fall-back to the CPU."""

    code = "BACKEND_UNAVAILABLE"
    exit_code = ExitCode.REFUSED
    retryable = False


class InsufficientRam(CapacityError):
    """Less memory free than the model needs."""

    code = "INSUFFICIENT_RAM"
    status = 507
    exit_code = ExitCode.REFUSED
    retryable = False


class InsufficientVram(InsufficientRam):
    """Less device memory free than the model needs."""

    code = "VRAM_EXHAUSTED"


class GpuTooHot(InsufficientRam):
    """The device is over the temperature at which new work is refused; ``details`` has both figures."""

    code = "GPU_TOO_HOT"
    status = 503
    retryable = True


class InsufficientDisk(InsufficientRam):
    """Less disk free than the download needs."""

    code = "INSUFFICIENT_DISK"


# --- a worker or a node failed --------------------------------------------------------------------------------------


class UpstreamError(RbeeError):
    """Somebody behind the queen or the CLI failed."""

    status = 502
    retryable = True


class WorkerCrashed(UpstreamError):
    """The worker or its engine went away during the request."""

    code = "WORKER_CRASHED"


class CudaDeviceFailed(UpstreamError):
    """A GPU or its driver (CUDA, ROCm, Vulkan) failed while the model was being loaded. There is no fall-back to the CPU."""

    code = "CUDA_DEVICE_FAILED"
    status = 500


class InferenceFailed(UpstreamError):
    """llama.cpp reported an error for this request."""

    code = "INFERENCE_FAILED"
    status = 500
    retryable = False


class MalformedResponse(UpstreamError):
    """The answer could not be parsed."""

    code = "MALFORMED_RESPONSE"


class VersionMismatch(UpstreamError):
    """Two parts of rbee are of versions that do not work together."""

    code = "VERSION_MISMATCH"
    retryable = False


class ConnectionTimeout(UpstreamError):
    """Nothing answered in time (also: connection refused)."""

    code = "CONNECTION_TIMEOUT"
    status = 504
    exit_code = ExitCode.UNREACHABLE


class NodeUnreachable(UpstreamError):
    """Ansible could not reach the host."""

    code = "NODE_UNREACHABLE"
    exit_code = ExitCode.UNREACHABLE


class SshTimeout(NodeUnreachable):
    """SSH did not answer in time."""

    code = "SSH_TIMEOUT"


class SshAuthFailed(NodeUnreachable):
    """SSH answered and refused the key."""

    code = "SSH_AUTH_FAILED"
    exit_code = ExitCode.KEY_REFUSED
    retryable = False


class SshHostKeyRefused(SshAuthFailed):
    """The node's SSH host key is unknown or has changed: it may be another machine."""

    code = "SSH_HOST_KEY_REFUSED"
    exit_code = ExitCode.HOST_KEY


class SshKeyNotFound(NodeUnreachable):
    """The private key's file is not there; no connection was tried."""

    code = "SSH_KEY_NOT_FOUND"
    exit_code = ExitCode.FAILED
    retryable = False


class SshCommandFailed(NodeUnreachable):
    """SSH works, the command or sudo does not."""

    code = "SSH_COMMAND_FAILED"
    exit_code = ExitCode.FAILED
    retryable = False


class SudoRefused(SshCommandFailed):
    """SSH works, sudo does not: no right, or it asks for a password."""

    code = "SUDO_REFUSED"
    exit_code = ExitCode.SUDO_REFUSED


# --- a fleet operation failed ---------------------------------------------------------------------------------------


class OperationError(RbeeError):
    """A fleet operation did not do what it was asked to."""


class AuditBroken(OperationError):
    """A line of an audit log does not follow from the one before it; ``details["line"]`` counts from 1 in its file."""

    code = "AUDIT_BROKEN"


class PlaybookFailed(OperationError):
    """A task failed on at least one host."""

    code = "PLAYBOOK_FAILED"


class UnitStartFailed(OperationError):
    """systemd could not bring the unit up; ``details["journal"]`` has its last lines."""

    code = "UNIT_START_FAILED"


class UnitMasked(UnitStartFailed):
    """The administrator has masked the unit: rbee does not undo that."""

    code = "UNIT_MASKED"
    exit_code = ExitCode.UNIT_MASKED


class PortTaken(UnitStartFailed):
    """Another program listens on the worker's port; ``details`` names it."""

    code = "PORT_TAKEN"
    exit_code = ExitCode.PORT_TAKEN


class SelfTestFailed(OperationError):
    """A new runtime does not load the model or makes no token; the worker runs on with the old one."""

    code = "SELF_TEST_FAILED"
    exit_code = ExitCode.SELF_TEST


class DiskFull(OperationError):
    """A file system of the node (or of this machine) is full; what was begun is done again by the next run."""

    code = "DISK_FULL"
    exit_code = ExitCode.DISK_FULL


class NodeLocked(OperationError):
    """Another run is changing this node; ``details`` says who, from where and since when."""

    code = "NODE_LOCKED"
    status = 409
    exit_code = ExitCode.LOCKED
    retryable = True


class LoadingTimeout(OperationError):
    """The model was not loaded in time."""

    code = "LOADING_TIMEOUT"
    status = 408


class ConfigInvalid(OperationError):
    """A settings file has a wrong or unknown key, or a value out of range. Services exit 78."""

    code = "CONFIG_INVALID"
    exit_code = ExitCode.CONFIG


class InventoryReadOnly(OperationError):
    """The inventory is one that only its owner can change; the message has what to write by hand."""

    code = "INVENTORY_READ_ONLY"


class MissingDependency(OperationError):
    """A program or package that this command needs is not installed."""

    code = "MISSING_DEPENDENCY"


class ModelFileInvalid(OperationError):
    """The model file is missing, unreadable or no GGUF. Services exit 78."""

    code = "MODEL_FILE_INVALID"
    exit_code = ExitCode.CONFIG


class DownloadFailed(OperationError):
    """The download broke and the tries are used up."""

    code = "DOWNLOAD_FAILED"


class DownloadTimeout(DownloadFailed):
    """The hub stopped sending."""

    code = "DOWNLOAD_TIMEOUT"


class ChecksumMismatch(DownloadFailed):
    """The file is whole and its SHA-256 is wrong."""

    code = "CHECKSUM_MISMATCH"


class BuildFailed(OperationError):
    """The compiler gave up; ``details["output"]`` has its last lines. Nothing was registered."""

    code = "BUILD_FAILED"


class BundleInvalid(OperationError):
    """A file of the bundle is missing, too much or has another digest."""

    code = "BUNDLE_INVALID"


def _subclasses(cls: type[RbeeError]) -> list[type[RbeeError]]:
    return [cls, *(s for child in cls.__subclasses__() for s in _subclasses(child))]


#: code -> class, the most general class of each code.
BY_CODE: dict[str, type[RbeeError]] = {}
for _cls in _subclasses(RbeeError):
    BY_CODE.setdefault(_cls.code, _cls)


def from_envelope(body: Any, *, fallback: str) -> RbeeError:
    """Rebuild the error that a peer reported.

    ``body`` is the decoded JSON of the answer, of any shape; ``fallback`` is the message when it is no envelope.
    Unknown codes become a plain RbeeError whose details keep the peer's code.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("code"), str):
        return MalformedResponse(fallback)
    details = error.get("details")
    details = {str(k): v for k, v in details.items()} if isinstance(details, dict) else {}
    details.pop("hint", None)
    cls = BY_CODE.get(error["code"])
    if cls is None:
        cls, details = RbeeError, {**details, "peer_code": error["code"]}
    details.pop("message", None)
    return cls(str(error.get("message", fallback)), hint=error.get("hint"), **details)
