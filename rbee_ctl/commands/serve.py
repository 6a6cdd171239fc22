"""``rbee-ctl serve``: queen and one worker on this machine, as child processes; no systemd, no Ansible, no root."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import OperationResult

if TYPE_CHECKING:
    from rbee_ctl.embedded import Embedded
    from rbee_ctl.session import Session


def serve(
    ctx: typer.Context,
    model_path: Annotated[
        Path | None, typer.Option("--model-path", metavar="FILE", help="GGUF file; default: the demonstration model")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option("--model-id", metavar="ID", help="name of the model; default: the file's")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=1024, max=65535, help="the queen's port; default: a free one")] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, max=64, help="streams decoded in parallel")] = 4,
    threads: Annotated[int, typer.Option("--threads", min=0, max=512, help="compute threads; 0: all that there are")] = 0,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Try rbee on this machine: queen and worker on 127.0.0.1 until Ctrl+C; nothing is left behind."""
    from rbee_ctl import demo_model
    from rbee_ctl.embedded import Embedded
    from rbee_serve.contract.errors import DownloadFailed, ExitCode, ModelFileInvalid

    s = session(ctx, json=json, verbose=verbose)
    digest = None
    if model_path is None:
        try:
            model_path = demo_model.ensure()
        except (OSError, ValueError) as e:
            raise DownloadFailed(
                f"the demonstration model can not be fetched: {e}", hint="rbee-ctl serve --model-path FILE.gguf"
            ) from e
        model_id, digest = model_id or demo_model.MODEL_ID, demo_model.SHA256
    elif not model_path.is_file():
        raise ModelFileInvalid(f"no model file {model_path}", hint="rbee-ctl serve alone takes the demonstration model")
    with Embedded(s.ui, model_path.absolute(), model_id, digest, port=port, slots=slots, threads=threads) as stack:
        stack.start()
        try:
            _tell(s, stack)
            stack.wait()
        except KeyboardInterrupt:  # also one that comes while "ready" is being printed: a reader may be that quick
            s.ui.narrate("ctl", "stop", "ending queen and worker")
    # Ctrl+C is how this command is meant to end.
    raise typer.Exit(ExitCode.OK)


def _tell(s: Session, stack: Embedded) -> None:
    data = stack.describe()
    if s.ui.json:
        try:
            s.ui.finish(OperationResult("serve", data=data))
        finally:
            s.ui.json = False  # one envelope is enough: what goes wrong later is told on stderr
    else:
        for line in _next_steps(stack, data):
            s.ui.note(line)


def _next_steps(stack: Embedded, data: dict[str, Any]) -> list[str]:
    config = shlex.quote(str(data["config"]))
    model = shlex.quote(data["model"])
    return [
        "",
        f"ready: {data['model']} behind {data['openai_base_url']}",
        "in another terminal:",
        "",
        f"  export RBEE_CONFIG={config}",
        f"  rbee-ctl infer --model {model} --prompt 'Once upon a time' --max-tokens 100",
        "  rbee-ctl status",
        '  eval "$(rbee-ctl env)"          # OPENAI_BASE_URL and OPENAI_API_KEY: any OpenAI client works now',
        '  curl -N "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $OPENAI_API_KEY" \\',
        "    -H 'Content-Type: application/json' \\",
        f'    -d \'{{"model": "{data["model"]}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}\'',
        "",
        "Ctrl+C ends everything.",
    ]
