"""Which commands there are, with the line that `rbee-ctl --help` shows of each. A command's module is imported when it is used.

Importing all of them and building their options takes longer than answering (SPEC: `--help` within 0.3 s).
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
import typer.main
from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer._click import Command, Context, HelpFormatter
else:
    Command = Context = HelpFormatter = Any


class Entry(NamedTuple):
    """Where a command is (module of ``rbee_ctl.commands``, and its function or Typer); ``about`` None: an alias, not shown."""

    module: str
    name: str
    about: str | None


TABLE: dict[str, Entry] = {
    "infer": Entry("infer", "infer", "Generate text, streamed token by token"),
    "status": Entry("overview", "status", "Queen, machines and workers at one glance"),
    "init": Entry("init", "init", "Write a starter inventory for your machines"),
    "apply": Entry("init", "apply", "Make the fleet what the inventory says"),
    "plan": Entry("change", "plan", "What apply would change, touching nothing"),
    "drift": Entry("change", "drift", "Where machines differ from the inventory"),
    "upgrade": Entry("change", "upgrade", "Bring the fleet to this version while it serves"),
    "drain": Entry("change", "drain", "Take a machine out of service"),
    "setup": Entry("setup", "app", "Machines of the inventory: add, update, remove"),
    "hive": Entry("hive", "app", "Machines: install, start, stop, status, check, ..."),
    "queen": Entry("queen", "app", "The queen: start, stop with the fleet or alone, status"),
    "daemon": Entry("queen", "daemon", None),
    "worker": Entry("worker", "app", "Workers: start, stop, list, retire, processes, ..."),
    "workers": Entry("worker", "plural", None),
    "model": Entry("model", "app", "Models: list, get, download, delete"),
    "runtime": Entry("runtime", "app", "Runtimes: list, build, download, use, delete"),
    "bundle": Entry("bundle", "app", "A fleet without internet, in one file: create, verify, install"),
    "logs": Entry("logs", "logs", "The journal of rbee's units on a machine"),
    "key": Entry("key", "app", "API keys of clients: create, list, revoke, rotate"),
    "audit": Entry("audit", "app", "Audit log: verify, fetch the queen's"),
    "serve": Entry("serve", "serve", "Try rbee on this machine, until Ctrl+C"),
    "lab": Entry("lab", "app", "Throw-away systemd machines on this one"),
    "install": Entry("init", "install", "Put rbee-ctl and its settings in place here"),
    "config": Entry("settings", "app", "Settings of rbee-ctl: show, check"),
    "env": Entry("overview", "env", "Shell lines that point OpenAI clients at the queen"),
    "version": Entry("overview", "version", "Show the version"),
}


def load(name: str) -> Command:
    """Import one command and build it."""
    entry = TABLE[name]
    found = getattr(importlib.import_module(f"rbee_ctl.commands.{entry.module}"), entry.name)
    holder = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    holder.callback()(lambda: None)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name, hidden=entry.about is None)
    else:
        holder.command(name, hidden=entry.about is None)(found)
    command = typer.main.get_group(holder).commands[name]
    _add_quiet(command)
    _take_plain_values_as_they_are(command)
    return command


def _add_quiet(command: Any) -> None:
    """Give every command that has --json also --quiet: an option of rbee-ctl itself that may stand behind the command, too."""
    for below in getattr(command, "commands", {}).values():
        _add_quiet(below)
    at, like = next(((i, p) for i, p in enumerate(command.params) if p.name == "json"), (0, None))
    if like is not None:
        quiet = copy.copy(like)
        quiet.name, quiet.opts, quiet.help = "quiet", ["--quiet", "-q"], "no narration on stderr"
        quiet.expose_value, quiet.callback = False, _be_quiet
        command.params.insert(at + 1, quiet)


def _be_quiet(ctx: Any, _: Any, value: bool) -> None:
    if value and ctx.obj is not None:  # None while a shell completes
        ctx.obj.ui.quiet = True


class _AsItIs:
    """Takes a parameter's value as the parser gives it."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        return value


def _take_plain_values_as_they_are(command: Any) -> None:
    """Keep Typer (0.26 and later) from importing pydantic for flags and plain text: it takes longer than most commands do.

    Another Typer, which does not know the attribute, goes on as it would.
    """
    make_help = command.get_help_option

    def help_option(ctx: Any) -> Any:
        option = make_help(ctx)
        _plain([*command.params, *([option] if option is not None else [])])  # Typer adds some of its own late
        return option

    command.get_help_option = help_option
    for below in getattr(command, "commands", {}).values():
        _take_plain_values_as_they_are(below)


def _plain(params: Iterable[Any]) -> None:
    for param in params:
        annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
        if annotation in (bool, str) and not getattr(param, "multiple", False) and param.nargs == 1:
            param._runtime_param = _AsItIs()


class _Commands(MutableMapping[str, Any]):
    """Name -> command; each is built when it is asked for."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}
        self._names = dict.fromkeys(TABLE)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._built:
            self._built[name] = load(name)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._names[name] = None
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._names[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Root(TyperGroup):
    """`rbee-ctl` itself."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**given, "commands": {}})
        self.commands = {}
        _take_plain_values_as_they_are(self)
        self.commands = _Commands()

    def list_commands(self, ctx: Context) -> list[str]:
        """Return the names, in the order of help."""
        return list(TABLE)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write names and lines of the table: no command is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.about) for name, entry in TABLE.items() if entry.about is not None])
