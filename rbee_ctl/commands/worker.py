"""``rbee-ctl worker``: start and stop by playbook; list and get ask the queen."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rbee_ctl import completion
from rbee_ctl.commands import process, runtime
from rbee_ctl.commands.options import Backend, Json, Node, Nodes, Verbose, Yes, session
from rbee_ctl.result import OperationResult

app = typer.Typer(help="Workers: start, stop, list, get.", no_args_is_help=True)
plural = typer.Typer(help="Live workers: list, health, shutdown.", no_args_is_help=True)
app.add_typer(process.app, name="process")
app.add_typer(runtime.binary, name="binary")
app.command("build")(runtime.build)
app.command("download")(runtime.download)


@app.command("spawn", hidden=True)
@app.command()
def start(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="REF", autocompletion=completion.models, help="model id, hf:org/repo[:file] or file:///path.gguf"
        ),
    ],
    node: Annotated[
        str, typer.Option("--node", "--hive", metavar="NODE", autocompletion=completion.nodes, help="machine of the inventory")
    ],
    backend: Backend = None,
    device: Annotated[
        int | None,
        typer.Option("--device", min=0, max=63, help="index of the device within the backend; default: most free memory"),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="instance name; default: <backend><device>")] = None,
    slots: Annotated[int | None, typer.Option("--slots", min=1, max=64, help="streams decoded in parallel")] = None,
    context_tokens: Annotated[
        int | None, typer.Option("--context-tokens", min=64, help="context of each stream, in tokens")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Start a worker on a machine; the model is downloaded when it is not there."""
    from rbee_ctl import node_facts
    from rbee_ctl.commands.fleet import one_host
    from rbee_ctl.references import check_backend, unknown_model
    from rbee_serve.contract.errors import ModelNotFound
    from rbee_serve.contract.references import check_model

    s = session(ctx, json=json, verbose=verbose)
    check_model(model)
    check_backend(backend)
    host = s.inventory.get(node)
    backend = host.backend(backend)
    node_facts.check_device(s.settings.state_path, node, backend, device)
    request = start_request(model, backend, device, name, slots, context_tokens)
    play = s.play("worker_start", tries=3, limit=node, extra_vars={"rbee_worker_request": request})
    try:
        return OperationResult("worker start", data=dict(one_host(play, node, "worker")), view="worker_started")
    except ModelNotFound as e:
        raise unknown_model(e, model) from e


def start_request(
    model: str,
    backend: str,
    device: int | None,
    name: str | None = None,
    slots: int | None = None,
    context_tokens: int | None = None,
) -> dict[str, Any]:
    """Return the variable ``rbee_worker_request`` of playbooks/worker_start.yml."""
    wanted = {"backend": backend, "device": device, "model": model, "name": name, "slots": slots}
    return {k: v for k, v in {**wanted, "context_tokens": context_tokens}.items() if v is not None}


@app.command()
def stop(
    ctx: typer.Context,
    workers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORKER...", autocompletion=completion.workers, help="ids (lab1-cpu0), or names (cpu0) with --node"
        ),
    ] = None,
    node: Node = None,
    worker_id: Annotated[
        list[str] | None, typer.Option("--id", metavar="WORKER", autocompletion=completion.workers, help="the same as WORKER")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Stop workers; each finishes what it has."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import InvalidRequest

    s = session(ctx, json=json, verbose=verbose)
    named = [*(workers or []), *(worker_id or [])]
    if not named:
        raise typer.BadParameter("which worker? rbee-ctl worker list", ctx=ctx, param_hint="WORKER")
    s.known_node(node)
    pairs = {
        (node, worker.removeprefix(f"{node}-")) if node is not None else s.inventory.split_worker_id(worker) for worker in named
    }
    if len(hosts := {host for host, _ in pairs}) > 1:
        raise InvalidRequest(
            f"workers of one machine at a time; these are on {', '.join(sorted(hosts))}", hint="rbee-ctl worker stop NODE-NAME"
        )
    names = sorted(name for _, name in pairs)
    play = s.play("worker_stop", limit=hosts.pop(), extra_vars={"rbee_worker_names": names})
    return per_host("worker stop", play, "workers_stopped")


@plural.command("list")
@app.command("list")
def list_(
    ctx: typer.Context,
    node: Node = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="ID", autocompletion=completion.models, help="only workers with this model")
    ] = None,
    state: Annotated[str | None, typer.Option("--state", help="only workers in this state: idle, busy, loading, ...")] = None,
    json: Json = False,
) -> OperationResult:
    """List the live workers, as the queen hears from them."""
    s = session(ctx, json=json)
    with s.queen() as queen:
        found = s.live_workers(queen, node=node, model=model, state=state)
    return OperationResult("worker list", data={"workers": found}, view="workers")


@app.command()
def get(
    ctx: typer.Context,
    worker_id: Annotated[str, typer.Argument(metavar="WORKER", autocompletion=completion.workers)],
    json: Json = False,
) -> OperationResult:
    """Show one live worker."""
    from urllib.parse import quote

    s = session(ctx, json=json)
    with s.queen() as queen:
        return OperationResult(
            "worker get", data={"worker": queen.get(f"/v1/workers/{quote(worker_id, safe='')}")}, view="record"
        )


@app.command()
def retire(
    ctx: typer.Context,
    worker_id: Annotated[str, typer.Argument(metavar="WORKER", autocompletion=completion.workers)],
    yes: Yes = False,
    json: Json = False,
) -> OperationResult:
    """Give a worker no more requests; those that run end normally. It stays retired when the queen restarts."""
    from urllib.parse import quote

    s = session(ctx, json=json)
    s.ui.confirm(f"retire {worker_id}? It takes no more requests until it is started anew.", yes=yes)
    with s.queen() as queen:
        answer = queen.post(f"/v1/workers/{quote(worker_id, safe='')}/retire")
    return OperationResult("worker retire", data={"worker": {"id": worker_id, **answer}}, view="retired")


@plural.command("health")
@app.command()
def health(ctx: typer.Context, node: Node = None, json: Json = False) -> OperationResult:
    """Say of each live worker whether it is ready, in which state it is and when it was last heard."""
    s = session(ctx, json=json)
    with s.queen() as queen:
        found = [
            {
                "id": w.get("id"),
                "node": w.get("hive_id"),
                "ready": w.get("status") in ("idle", "busy"),
                "state": w.get("status"),
                "last_heartbeat_age_s": w.get("last_heartbeat_age_s"),
            }
            for w in s.live_workers(queen, node=node)
        ]
    return OperationResult("workers health", data={"workers": found}, view="health")


@plural.command("shutdown")
@app.command(hidden=True)
def shutdown(
    ctx: typer.Context,
    worker_id: Annotated[
        str, typer.Option("--id", metavar="WORKER", autocompletion=completion.workers, help="id of the worker: lab1-cpu0")
    ],
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Stop one worker (as `worker stop ID`)."""
    return stop(ctx, [worker_id], node=None, json=json, verbose=verbose)


@app.command()
def cleanup(
    ctx: typer.Context,
    node: Nodes = None,
    check: Annotated[bool, typer.Option("--check", help="say what would be removed and touch nothing")] = False,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Remove the workers that the inventory does not declare; models stay."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    if not check:
        s.ui.confirm(
            f"remove all workers on {node or 'every machine'} that {s.settings.inventory_path} does not declare?", yes=yes
        )
    return per_host("worker cleanup", s.play("worker_cleanup", limit=node, check=check), "cleaned")
