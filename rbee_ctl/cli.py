"""``rbee-ctl``: parse, dispatch, render, exit code. Every way to end passes through ``main``."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rbee_ctl import completion
from rbee_ctl.command_table import Root
from rbee_ctl.render import Ui
from rbee_ctl.result import ErrorItem, OperationResult, failure
from rbee_ctl.session import Session
from rbee_serve.contract.errors import ExitCode, RbeeError

app = typer.Typer(
    name="rbee-ctl",
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
completion.use_own_scripts()

#: Signals so close together are one request to stop, seconds.
_SAME_STOP_S = 0.5


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="settings file (see `config show`)")] = None,
    inventory: Annotated[str | None, typer.Option("--inventory", "-i", metavar="FILE", help="Ansible inventory")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no narration on stderr")] = False,
    events: Annotated[bool, typer.Option("--events", help="one JSON object a line on stdout, for programs", hidden=True)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON envelope")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show Ansible's own output")] = False,
    show_version: Annotated[bool, typer.Option("--version", help="show the version")] = False,
) -> OperationResult | None:
    """One private LLM service out of several Linux machines: Ansible in control, systemd in charge, llama.cpp underneath."""
    # What a file says is overridden by the environment, and that by what was typed.
    if config is not None:
        os.environ["RBEE_CONFIG"] = config
    if inventory is not None:
        os.environ["RBEE_INVENTORY"] = inventory
    session: Session = ctx.obj
    session.ui.quiet = quiet
    session.ui.events = events
    session.ui.json, session.ui.verbose = as_json, verbose
    if show_version:
        from rbee_ctl.commands import overview

        return overview.version(ctx)
    return None


def command_name(args: Sequence[str]) -> str:
    """Return the words of ``args`` that name the command, for results that end before a command speaks for itself."""
    words: list[str] = []
    group: Any = typer.main.get_command(app)
    for arg in args:
        if (found := getattr(group, "commands", {}).get(arg)) is not None:
            words.append(arg)
            group = found
    return " ".join(words)


def run(args: Sequence[str], ui: Ui) -> OperationResult:
    """Run one command; every failure comes back as a result."""
    try:
        value = app(args=list(args), prog_name="rbee-ctl", standalone_mode=False, obj=Session(ui))
    except typer.TyperException as e:
        ui.json = "--json" in args  # parsing ended before the command could say so
        ui.events = "--events" in args[:2]
        return _usage_error(args, e)
    except RbeeError as e:
        return failure(command_name(args), e)
    except (KeyboardInterrupt, typer.Abort):
        value = int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as e:  # a mistake of ours: said in the same shape as any other failure
        where = traceback.extract_tb(e.__traceback__)[-1]
        if isinstance(e, OSError) and Path(where.filename).name == "render.py":  # of others: standard output takes no more
            raise
        if ui.verbose or os.environ.get("RBEE_LOG") == "debug":
            traceback.print_exc()
        message = f"internal error: {type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
        return failure(command_name(args), RbeeError(message, hint="RBEE_LOG=debug shows the whole traceback; please report it"))
    if isinstance(value, OperationResult):
        return value
    if value == ExitCode.INTERRUPTED:
        return interrupted(command_name(args))
    return OperationResult(command_name(args), exit_code=value if isinstance(value, int) else ExitCode.OK)


def interrupted(command: str) -> OperationResult:
    """Return the result of a command that the user ended by Ctrl+C."""
    return OperationResult(command, exit_code=ExitCode.INTERRUPTED, errors=(ErrorItem("REQUEST_CANCELED", "interrupted"),))


def _usage_error(args: Sequence[str], error: typer.TyperException) -> OperationResult:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "rbee-ctl"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        # The message is the whole help text: a person gets it as it is.
        return OperationResult(command_name(args), messages=(text,), exit_code=ExitCode.USAGE)
    item = ErrorItem("USAGE", text, hint=f"{path} --help")
    return OperationResult(command_name(args), exit_code=ExitCode.USAGE, errors=(item,))


class _Stop:
    """Handler of Ctrl+C and SIGTERM: a command ends by KeyboardInterrupt, in order.

    One on the heels of another is the same one: timeout(1) signals its child and right after that the child's group. Taken
    for a second one, it would break off the very end that the first has begun.
    """

    def __init__(self) -> None:
        self._came = -_SAME_STOP_S

    def __call__(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._came >= _SAME_STOP_S:
            self._came = now
            raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run rbee-ctl and return its exit code."""
    args = sys.argv[1:] if argv is None else list(argv)
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever began us wants it ignored (`&` of sh)
        signal.signal(signal.SIGINT, stop)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    ui = Ui()
    try:
        result = run(args, ui)
        ui.finish(result)
    except KeyboardInterrupt:  # while the result was printed
        return ExitCode.INTERRUPTED
    except OSError as e:
        # Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(e, BrokenPipeError):  # else whoever read our output has left (`| head`)
            ui.unwritten(e)
        return ExitCode.FAILED
    return int(result.exit_code)


if __name__ == "__main__":
    sys.exit(main())
