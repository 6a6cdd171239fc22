"""The 28 operations (SPEC 2) as they travel in ``POST /v1/jobs``: one model each, told apart by ``operation``.

Field names are those of the original; ``hive_id`` and ``alias`` name a machine of the inventory.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from rbee_serve.contract.api import PROMPT_MAX_CHARS, Message
from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.contract.references import NODE_NAME, check_model

Node = Annotated[str, Field(pattern=f"^{NODE_NAME.pattern}$", description="a machine of the inventory")]
#: A name that may stand in a command line: no control characters, and no leading hyphen.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", max_length=400)]
ModelRef = Annotated[str, Field(pattern=r"^[A-Za-z0-9][^\x00-\x1f\x7f]*$", max_length=500), AfterValidator(check_model)]
WorkerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]{1,128}$")]
Pid = Annotated[int, Field(ge=1, le=4_194_304)]


class Operation(Message):
    """Base: every operation says which machine it concerns, None for the whole fleet or none of it."""

    operation: str

    @property
    def node(self) -> str | None:
        """The machine that the operation works on."""
        return getattr(self, "hive_id", None) or getattr(self, "alias", None)


class _OnHive(Operation):
    hive_id: Node = "localhost"


class _OfHive(Operation):
    alias: Node = "localhost"


class WorkerDownload(_OnHive):
    """Bring a runtime onto a machine."""

    operation: Literal["worker_download"]
    worker_type: Word


class WorkerBuild(_OnHive):
    """Compile a runtime on a machine."""

    operation: Literal["worker_build"]
    worker_type: Word


class WorkerBinaryList(_OnHive):
    """List the runtimes of a machine."""

    operation: Literal["worker_binary_list"]


class WorkerBinaryGet(_OnHive):
    """Show a runtime."""

    operation: Literal["worker_binary_get"]
    worker_type: Word


class WorkerBinaryDelete(_OnHive):
    """Delete a runtime that nothing uses."""

    operation: Literal["worker_binary_delete"]
    worker_type: Word


class WorkerSpawn(_OnHive):
    """Start a worker; ``worker`` is the backend or the worker type (``cpu``, ``cuda-llm-worker``)."""

    operation: Literal["worker_spawn"]
    model: ModelRef
    worker: Word | None = None
    device: Annotated[int, Field(ge=0, le=63)] | None = None
    name: Annotated[str, Field(pattern=r"^[a-z]+[0-9]+(-[a-z0-9]+)?$")] | None = None
    slots: Annotated[int, Field(ge=1, le=64)] | None = None


class WorkerProcessList(_OnHive):
    """List the worker processes of a machine."""

    operation: Literal["worker_process_list"]


class WorkerProcessGet(_OnHive):
    """Show a worker process."""

    operation: Literal["worker_process_get"]
    pid: Pid


class WorkerProcessDelete(_OnHive):
    """End a worker process."""

    operation: Literal["worker_process_delete"]
    pid: Pid


class ModelDownload(_OnHive):
    """Download a model onto a machine."""

    operation: Literal["model_download"]
    model: ModelRef


class ModelList(_OnHive):
    """List the models of a machine."""

    operation: Literal["model_list"]


class ModelGet(_OnHive):
    """Show a model."""

    operation: Literal["model_get"]
    id: ModelRef


class ModelDelete(_OnHive):
    """Delete a model that no worker has loaded."""

    operation: Literal["model_delete"]
    id: ModelRef


class Status(Operation):
    """Show queen, machines and workers."""

    operation: Literal["status"]


class HiveList(Operation):
    """List the machines of the inventory."""

    operation: Literal["hive_list"]


class HiveGet(_OfHive):
    """Show a machine."""

    operation: Literal["hive_get"]


class HiveInstall(_OfHive):
    """Make a machine fit for workers."""

    operation: Literal["hive_install"]


class HiveUninstall(_OfHive):
    """Remove rbee from a machine."""

    operation: Literal["hive_uninstall"]
    purge: bool = False


class HiveStart(_OfHive):
    """Start a hive."""

    operation: Literal["hive_start"]


class HiveStop(_OfHive):
    """Stop a hive."""

    operation: Literal["hive_stop"]


class HiveStatus(_OfHive):
    """Ask systemd on a machine."""

    operation: Literal["hive_status"]


class HiveRefreshCapabilities(_OfHive):
    """Ask a machine for its devices."""

    operation: Literal["hive_refresh_capabilities"]


class SshTest(_OfHive):
    """Reach a machine by SSH."""

    operation: Literal["ssh_test"]


class HiveImportSsh(Operation):
    """Take over the hosts of an OpenSSH configuration; there is no hive port, so that field means nothing."""

    operation: Literal["hive_import_ssh"]
    ssh_config_path: Annotated[str, Field(pattern=r"^[~/][^\x00-\x1f\x7f]*$", max_length=400)] = "~/.ssh/config"
    default_hive_port: int | None = None


class ActiveWorkerList(Operation):
    """List the live workers."""

    operation: Literal["active_worker_list"]
    hive_id: Node | None = None


class ActiveWorkerGet(Operation):
    """Show a live worker."""

    operation: Literal["active_worker_get"]
    worker_id: WorkerId


class ActiveWorkerRetire(Operation):
    """Give a worker no more requests."""

    operation: Literal["active_worker_retire"]
    worker_id: WorkerId


class Infer(Operation):
    """Generate text; with ``hive_id`` a worker is started there when none serves the model."""

    operation: Literal["infer"]
    hive_id: Node | None = None
    model: ModelRef | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=PROMPT_MAX_CHARS)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    device: Annotated[int, Field(ge=0, le=63)] | None = None
    worker_id: WorkerId | None = None
    stream: bool = True


AnyOperation = Annotated[
    WorkerDownload
    | WorkerBuild
    | WorkerBinaryList
    | WorkerBinaryGet
    | WorkerBinaryDelete
    | WorkerSpawn
    | WorkerProcessList
    | WorkerProcessGet
    | WorkerProcessDelete
    | ModelDownload
    | ModelList
    | ModelGet
    | ModelDelete
    | Status
    | HiveList
    | HiveGet
    | HiveInstall
    | HiveUninstall
    | HiveStart
    | HiveStop
    | HiveStatus
    | HiveRefreshCapabilities
    | SshTest
    | HiveImportSsh
    | ActiveWorkerList
    | ActiveWorkerGet
    | ActiveWorkerRetire
    | Infer,
    Field(discriminator="operation"),
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyOperation)

#: name -> model of every operation, in the order of SPEC 2.
OPERATIONS: dict[str, type[Operation]] = {
    get_args(model.model_fields["operation"].annotation)[0]: model for model in get_args(get_args(AnyOperation)[0])
}


def parse_operation(data: dict[str, Any]) -> Operation:
    """Validate a job's body; raises InvalidRequest naming the field, or the operations there are."""
    name = data.get("operation")
    if not isinstance(name, str) or name not in OPERATIONS:
        raise InvalidRequest(
            "operation: one of the 28 operations expected",
            hint="docs/operations.md lists them",
            field="operation",
            known=list(OPERATIONS),
        )
    try:
        found: Operation = _ADAPTER.validate_python(data)
    except ValidationError as e:
        problems = [{"field": ".".join(map(str, p["loc"][1:])) or "body", "problem": p["msg"]} for p in e.errors()]
        first = problems[0]
        raise InvalidRequest(f"{name}: {first['field']}: {first['problem']}", field=first["field"], problems=problems) from e
    return found
