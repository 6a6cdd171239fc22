"""Operation -> the command line of rbee-ctl that does it. Pure; every value is one argument that can be no option."""

from __future__ import annotations

from rbee_serve.contract import operations as op


def arguments(operation: op.Operation) -> list[str] | None:
    """Return rbee-ctl's arguments, None for an operation that the queen answers itself."""
    node = f"--node={operation.node}" if operation.node is not None else ""
    match operation:
        case op.WorkerDownload(worker_type=kind):
            return ["worker", "download", node, f"--type={kind}"]
        case op.WorkerBuild(worker_type=kind):
            return ["worker", "build", node, f"--type={kind}"]
        case op.WorkerBinaryList():
            return ["worker", "binary", "list", node]
        case op.WorkerBinaryGet(worker_type=kind):
            return ["worker", "binary", "get", node, f"--type={kind}"]
        case op.WorkerBinaryDelete(worker_type=kind):
            return ["worker", "binary", "delete", node, f"--type={kind}", "--yes"]
        case op.WorkerSpawn():
            return _spawn(operation, node)
        case op.WorkerProcessList():
            return ["worker", "process", "list", node]
        case op.WorkerProcessGet(pid=pid):
            return ["worker", "process", "get", node, f"--pid={pid}"]
        case op.WorkerProcessDelete(pid=pid):
            return ["worker", "process", "delete", node, f"--pid={pid}", "--yes"]
        case op.ModelDownload(model=model):
            return ["model", "download", node, "--", model]
        case op.ModelList():
            return ["model", "list", node]
        case op.ModelGet(id=model):
            return ["model", "get", node, "--", model]
        case op.ModelDelete(id=model):
            return ["model", "delete", node, "--yes", "--", model]
        case op.HiveList():
            return ["hive", "list"]
        case op.HiveGet():
            return ["hive", "get", node]
        case op.HiveInstall():
            return ["hive", "install", node]
        case op.HiveUninstall(purge=purge):
            return ["hive", "uninstall", node, "--yes", *(["--purge"] if purge else [])]
        case op.HiveStart():
            return ["hive", "start", node]
        case op.HiveStop():
            return ["hive", "stop", node]
        case op.HiveStatus():
            return ["hive", "status", node]
        case op.HiveRefreshCapabilities():
            return ["hive", "refresh", node]
        case op.SshTest():
            return ["hive", "ssh-test", node]
        case op.HiveImportSsh(ssh_config_path=path):
            return ["hive", "import-ssh", f"--ssh-config={path}"]
    return None


def _spawn(operation: op.WorkerSpawn, node: str) -> list[str]:
    command = ["worker", "start", node, f"--model={operation.model}"]
    if operation.device is not None:
        command.append(f"--device={operation.device}")
    if operation.worker is not None:
        command.append(f"--backend={operation.worker.partition('-')[0]}")
    if operation.name is not None:
        command.append(f"--name={operation.name}")
    if operation.slots is not None:
        command.append(f"--slots={operation.slots}")
    return command


def lane(operation: op.Operation) -> str | None:
    """Return what the operation has to itself while it runs: a machine, or the inventory; None for neither.

    Different machines go in parallel, one machine's operations one after the other. Reading needs no lane.
    """
    match operation:
        case op.HiveImportSsh():
            return "inventory"
        case op.HiveList() | op.HiveGet() | op.Status() | op.ActiveWorkerList() | op.ActiveWorkerGet() | op.Infer():
            return None
    return operation.node


#: Operations that change nothing and tell no more than the queen's other routes do.
READ_ONLY = (op.Status, op.ActiveWorkerList, op.ActiveWorkerGet)
