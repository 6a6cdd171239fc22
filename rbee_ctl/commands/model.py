"""``rbee-ctl model``: the catalogs of the machines, and fetching more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rbee_ctl import completion
from rbee_ctl.commands.options import Json, Node, Nodes, SeveralNodes, Verbose, Yes, session
from rbee_ctl.result import OperationResult

if TYPE_CHECKING:
    from rbee_ctl.session import Session

app = typer.Typer(help="Models: list, get, download, delete.", no_args_is_help=True)

_Id = Annotated[
    str, typer.Argument(metavar="MODEL", autocompletion=completion.models, help="id in the catalog, or the reference it came by")
]


@app.command()
def download(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="hf:org/repo[:file or quantisation], https://host/file.gguf#sha256=DIGEST or file:///path.gguf"
        ),
    ],
    node: SeveralNodes = None,
    via: Annotated[
        str,
        typer.Option(
            "--via",
            metavar="WAY",
            help="fleet: one machine fetches, the others get it from that one; controller: copied over SSH",
        ),
    ] = "fleet",
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Fetch a model once and bring it onto machines; where it is already it is left alone."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import InvalidRequest
    from rbee_serve.contract.references import check_model

    s = session(ctx, json=json, verbose=verbose)
    check_model(model)
    if via not in ("fleet", "controller"):
        raise InvalidRequest(f"--via {via!r} is no way; known: fleet, controller", hint="--via controller", field="via")
    if via == "controller" and model.startswith("file:"):
        words = f"{model} is a file that each machine has for itself: the controller has nothing to fetch"
        raise InvalidRequest(
            words, hint="without --via; a file of the controller: src in rbee_models, rbee-ctl apply", field="via"
        )
    names = [s.inventory.get(name).name for part in node or [] for name in part.split(",")]
    variables = {"rbee_model_ref": model, "rbee_model_via": via}
    play = s.play("model_download", tries=3, limit=",".join(names) or None, extra_vars=variables)
    return per_host("model download", play, "model_downloaded")


@app.command("list")
def list_(
    ctx: typer.Context,
    node: Nodes = None,
    provider: Annotated[str | None, typer.Option("--provider", metavar="NAME", help="only hf, https or file")] = None,
    served: Annotated[bool, typer.Option("--served", help="only what live workers serve, as the queen knows it")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """List the models that machines have."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import InvalidRequest

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    if served:
        return _served(s, node)
    if provider not in (None, "hf", "https", "file"):
        raise InvalidRequest(f"provider {provider!r} does not exist; known: hf, https, file", hint="--provider hf")
    play = s.look("model_list", limit=node, extra_vars={"rbee_model_provider": provider} if provider else None)
    return per_host("model list", play, "models")


def _served(s: Session, node: str | None) -> OperationResult:
    with s.queen() as queen:
        found = {
            (str(w.get("hive_id")), str(w.get("model_id"))): {
                "node": w.get("hive_id"),
                "id": w.get("model_id"),
                "reference": w.get("model_ref"),
                "size_bytes": (w.get("model_info") or {}).get("size_bytes"),
                "status": "served",
            }
            for w in queen.workers(node=node)
        }
    return OperationResult("model list", data={"models": [found[k] for k in sorted(found)]}, view="models_served")


@app.command()
def get(ctx: typer.Context, model: _Id, node: Nodes = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Show one model: path, size, digest, and what its header says."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.references import check_model

    s = session(ctx, json=json, verbose=verbose)
    check_model(model)
    s.known_node(node)
    return per_host("model get", s.look("model_get", limit=node, extra_vars={"rbee_model_ref": model}), "model_record")


@app.command()
def delete(
    ctx: typer.Context,
    model: _Id,
    node: Node = None,
    force: Annotated[bool, typer.Option("--force", help="also while a worker uses it")] = False,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Delete a model of one machine, its files and its entry; refused while a worker uses it."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.references import check_model

    s = session(ctx, json=json, verbose=verbose)
    check_model(model)
    node = s.one_node(node)
    s.ui.confirm(f"delete model {model} on {node}?", yes=yes)
    variables = {"rbee_model_ref": model, "rbee_model_force": force}
    return per_host("model delete", s.play("model_delete", limit=node, extra_vars=variables), "model_deleted")
