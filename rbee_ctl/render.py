"""The only module that prints. Answers go to stdout, everything else to stderr (SPEC CAP-25)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from rbee_ctl import events
from rbee_ctl.result import ErrorItem, OperationResult
from rbee_serve.contract.errors import ConfirmationRequired
from rbee_serve.contract.events import narration_line

if TYPE_CHECKING:
    from rbee_ctl.views import Table

#: Seconds between two lines of progress that differ in their figures alone, where stderr is no terminal.
PROGRESS_PAUSE_S = 1.0
#: Numbers by themselves; those in names (lab1, cpu0) tell one machine's progress from another's.
_FIGURES = re.compile(r"(?<![\w.-])[\d.]+")
_DIM, _RED, _RESET = "\x1b[2m", "\x1b[31m", "\x1b[0m"


class Ui:
    """Where a person (or a script) sees what happens. Colours only on a terminal and without NO_COLOR."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.json = False
        self.verbose = False
        self.quiet = False
        self.events = False  # one JSON object a line on stdout, for programs that follow: jobs of the queen
        self._tty_out, self._tty_err = self.out.isatty(), self.err.isatty()
        self._colour = self._tty_err and not os.environ.get("NO_COLOR")
        self._open_line = False  # stdout stands in the middle of a line
        self._last_progress = ""
        self._progress_shown = False  # stderr stands in a line of progress
        self._progress_at = 0.0
        self._progress_kind = ""  # its text without the figures

    # --- while a command runs ---------------------------------------------------------------------------------------

    def token(self, text: str) -> None:
        """Write generated text to stdout at once."""
        if self.events:
            self._event("token", t=text)
        elif text:
            _write(self.out, text)
            self._open_line = not text.endswith("\n")

    def end_of_tokens(self) -> None:
        """End the line on a terminal; a file or pipe gets the tokens and nothing else."""
        if self._open_line and self._tty_out:
            self.out.write("\n")
            self.out.flush()
        self._open_line = False

    def narrate(self, actor: str, action: str, text: str) -> None:
        """Say on stderr what is happening."""
        if self.events:
            self._event("narration", actor=actor, action=action, human=text)
        elif not self.quiet:
            line = narration_line(actor, action, text)
            self.note(f"{_DIM}{line}{_RESET}" if self._colour else line)

    def progress(self, actor: str, action: str, text: str) -> None:
        """Say how far something is: on a terminal in one line that is rewritten, else what is new but for its figures
        or complete at once and the rest at most once a second."""
        if self.quiet or text == self._last_progress:
            return
        self._last_progress = text
        if self.events:
            self._event("progress", actor=actor, action=action, human=text)
            return
        if self._tty_err:
            drawn = bar(text, fancy=(self.err.encoding or "").lower().startswith("utf"))
            line = narration_line(actor, action, f"{drawn} {text}" if drawn else text)[: self._columns() - 1]
            _write(self.err, f"\r\x1b[K{_DIM if self._colour else ''}{line}{_RESET if self._colour else ''}")
            self._progress_shown = True
        else:
            line = narration_line(actor, action, text)
            now, kind = time.monotonic(), _FIGURES.sub("", text)
            if kind != self._progress_kind or now - self._progress_at >= PROGRESS_PAUSE_S or "(100 %)" in text:
                self._progress_at, self._progress_kind = now, kind
                self.note(line)

    def _columns(self) -> int:
        """Width of the terminal: a line that is longer could not be written over."""
        try:
            return os.get_terminal_size(self.err.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def unwritten(self, error: OSError) -> None:
        """Say that standard output takes no more, unless standard error takes nothing either."""
        with contextlib.suppress(OSError):
            self.err.write(f"error: the answer can not be written to standard output: {error.strerror or error}\n")
            self.err.flush()

    def note(self, text: str) -> None:
        """Write a line to stderr."""
        if self.events:
            self._event("note", text=text)
            return
        before = ""
        if self._progress_shown:
            before = "\r\x1b[K"
            self._progress_shown = False
        if self._open_line and self._tty_out and self._tty_err:
            before += "\n"
            self._open_line = False
        _write(self.err, f"{before}{text}\n")

    def _event(self, kind: str, **fields: Any) -> None:
        _write(self.out, json.dumps({"type": kind, **fields}, ensure_ascii=False, default=str) + "\n")

    def narrator(self, actor: str, action: str) -> events.OnEvent:
        """Return a listener that narrates a playbook; with ``verbose`` it shows Ansible's own output instead.

        A task is named once it has done something: one that is skipped on every host is not worth a line. On a terminal
        the running task stands in the line of progress meanwhile.
        """
        waiting: list[str] = []

        def on_event(event: events.Event) -> None:
            if isinstance(event, events.Output):
                if self.verbose:
                    self.note(event.text)
            elif isinstance(event, events.StillRunning):
                self.progress(actor, action, f"{event.task.rpartition(' : ')[2]}: {event.seconds:.0f} s")
            elif self.verbose:
                return
            elif isinstance(event, events.TaskStarted):
                waiting[:] = [event.task.rpartition(" : ")[2]]  # without the role's name
                if self._tty_err:
                    self.progress(actor, action, waiting[0])
            elif isinstance(event, events.Progress):
                self._say(waiting, actor, action)
                self.progress(actor, action, event.text)
            elif isinstance(event, events.TaskDone) and event.status != "skipped":
                self._say(waiting, actor, action)
                if event.status == "unreachable":
                    self.narrate(event.host, action, "not reachable")

        return on_event

    def _say(self, waiting: list[str], actor: str, action: str) -> None:
        """Narrate what waits to be said, once."""
        while waiting:
            self.narrate(actor, action, waiting.pop(0))

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask on the terminal before something is destroyed; returns when the answer is yes (``yes``: it was given as --yes).

        Raises ConfirmationRequired where there is nobody to ask or the answer is no.
        """
        if yes:
            return
        if not (sys.stdin.isatty() and self._tty_err):
            raise ConfirmationRequired(f"{question} Nobody can be asked here.", hint="say so beforehand: --yes")
        self.err.write(f"{question} [y/N] ")
        self.err.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise ConfirmationRequired("not confirmed; nothing was changed")

    # --- at the end -------------------------------------------------------------------------------------------------

    def finish(self, result: OperationResult) -> None:
        """Print the result: one JSON envelope, or tables on stdout with messages and errors on stderr."""
        if self.events:
            self._event("result", **result.envelope())
            return
        if result.answered:
            return
        if self.json:
            self.out.write(json.dumps(result.envelope(), ensure_ascii=False, default=str) + "\n")
            self.out.flush()
            return
        if result.view is not None and (result.partial or not result.errors):
            self._show(result)
        for message in result.messages:
            self.note(message)
        for error in result.errors:
            self._error(error)

    def _show(self, result: OperationResult) -> None:
        from rbee_ctl import views

        for part in getattr(views, result.view or "")(result.data):
            if isinstance(part, str):
                self.out.write(part + "\n")
            elif self._tty_out:
                self._rich_table(part)
            else:
                self.out.write(part.plain())
        self.out.flush()

    def _rich_table(self, table: Table) -> None:
        import rich.box
        import rich.console
        import rich.table
        from rich.markup import escape

        shown = rich.table.Table(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for column in table.columns:
            shown.add_column(column, overflow="fold")
        for row in table.rows:
            shown.add_row(*(escape(cell) for cell in row))
        rich.console.Console(file=self.out).print(shown)

    def _error(self, error: ErrorItem) -> None:
        head = f"{_RED}error{_RESET}" if self._colour else "error"
        self.note(f"{head}: {error.message} [{error.code}]")
        if facts := _facts(error.details):
            self.note(f"  {facts}")
        if isinstance(journal := error.details.get("journal"), list | str):
            for line in journal.splitlines() if isinstance(journal, str) else journal:
                self.note(f"  | {line}")
        if error.hint:
            self.note(f"  try: {error.hint}")


def _write(stream: TextIO, text: str) -> None:
    """Write at once. That its reader has left is raised once: what is put in order because of it is told to nobody."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise


#: "15.2 of 98.4 MB", "12 of 30 layers", "[17/120]": how far something is.
_SHARE = re.compile(r"(?<![\w./:-])(\d+(?:\.\d+)?)(?: of |/)(\d+(?:\.\d+)?)(?![\w./:-]*\w/)")
BAR_WIDTH = 20


def bar(text: str, *, fancy: bool = True) -> str:
    """Return a bar with per cent for a line that says how much of how much; "" for any other."""
    for match in _SHARE.finditer(text):
        done, total = float(match[1]), float(match[2])
        if total > 0 and done <= total:
            full = int(BAR_WIDTH * done / total)
            on, off = ("━", "─") if fancy else ("#", "-")
            percent = "" if "%" in text else f" {100 * done / total:3.0f}%"
            return f"{on * full}{off * (BAR_WIDTH - full)}{percent}"
    return ""


#: Details that the message or the lines above say already.
_UNSHOWN = frozenset(
    {
        "known",
        "by_hand",
        "problems",
        "journal",
        "node",
        "model",
        "backend",
        "url",
        "field",
        "task",
        "output",
        "path",
        "partial_text_file",
    }
)


def _facts(details: Any) -> str:
    plain = {k: v for k, v in details.items() if k not in _UNSHOWN and isinstance(v, str | int | float) and v != ""}
    return ", ".join(f"{k}: {v}" for k, v in plain.items())
