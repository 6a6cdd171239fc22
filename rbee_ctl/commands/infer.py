"""``rbee-ctl infer``: tokens alone on stdout, as they come; everything else on stderr.

Warm: one HTTP stream from the queen. Cold (no worker for the model, node given): a worker is started there by playbook,
then the same stream. Ctrl+C cancels at the queen and keeps what has come.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rbee_ctl import completion
from rbee_ctl.commands.options import Backend, Device, Json, Node, Verbose, session
from rbee_ctl.result import OperationResult


def infer(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="the prompt; - reads it from stdin")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="REF", autocompletion=completion.models, help="model id or hf:org/repo[:file]"),
    ] = None,
    node: Node = None,
    backend: Backend = None,
    device: Device = None,
    worker_id: Annotated[
        str | None, typer.Option("--worker-id", metavar="ID", autocompletion=completion.workers, help="this worker and no other")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="as a conversation: the model's own chat template is applied")] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="system message; implies --chat")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="tokens to generate at most")] = 20,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="0: always the likeliest token")] = 0.7,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0, max=1)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="0: no limit")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", min=0, max=1)] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="same seed, same text")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="end before this text (up to 4)")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0.001, metavar="S", help="deadline in seconds")] = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="stop afterwards what of queen, hive and worker had to be started for this")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Generate text, streamed token by token."""
    from rbee_ctl.ephemeral import Ephemeral, ensure_queen
    from rbee_ctl.inference import Inference
    from rbee_ctl.references import check_backend
    from rbee_serve.contract.references import check_model

    s = session(ctx, json=json, verbose=verbose)
    if model is not None:
        check_model(model)
    check_backend(backend)
    if node is not None and s.settings.inventory.value is not None:
        s.known_node(node)
    if prompt == "-":
        prompt = sys.stdin.read()
    wanted: dict[str, Any] = {
        "model": model,
        "node": node,
        "device": device,
        "worker_id": worker_id,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or None,
        "timeout_s": timeout,
    }
    body = {k: v for k, v in wanted.items() if v is not None}
    if chat or system is not None:
        opening = [{"role": "system", "content": system}] if system is not None else []
        body["messages"] = [*opening, {"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if not ephemeral:
        with s.queen() as queen:
            ensure_queen(s, queen)
            return Inference(s, queen, body, backend=backend).run()
    with Ephemeral(s) as owner, s.queen() as queen:
        owner.ensure_queen(queen)
        return Inference(s, queen, body, backend=backend, ephemeral=owner).run()
