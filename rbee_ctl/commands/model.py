"""``rbee-ctl model``: what the machines have, and fetching more."""

from __future__ import annotations

from typing import Annotated

import typer

from rbee_ctl.commands.options import Json, Node, Nodes, Verbose, session
from rbee_ctl.result import OperationResult

app = typer.Typer(help="Models: download, list.", no_args_is_help=True)


@app.command()
def download(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="REF", help="hf:org/repo[:file], or an id of the inventory's rbee_models")],
    node: Nodes = None,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Fetch a model onto machines; one that is there already is left alone."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_ctl.references import check_model

    s = session(ctx, json=json, verbose=verbose)
    check_model(model)
    s.known_node(node)
    play = s.play("model_download", limit=node, extra_vars={"rbee_model_ref": model})
    return per_host("model download", play, "model_downloaded")


@app.command("list")
def list_(ctx: typer.Context, node: Node = None, json: Json = False) -> OperationResult:
    """List the models that live workers serve, by node."""
    s = session(ctx, json=json)
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
    return OperationResult("model list", data={"models": [found[k] for k in sorted(found)]}, view="models")
