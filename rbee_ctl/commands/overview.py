"""Commands that show and start nothing: status, env, version."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import ErrorItem, OperationResult, exit_code_of
from rbee_ctl.session import Session
from rbee_serve.contract.errors import RbeeError
from rbee_serve.contract.hives import UNKNOWN, hive_status


def status(
    ctx: typer.Context,
    ask: Annotated[bool, typer.Option("--ask", help="ask the machines of silent workers, too; takes seconds")] = False,
    quick: Annotated[bool, typer.Option("--quick", hidden=True, help="ask the queen alone, also with --verbose")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Show queen, machines and workers at one glance, as the queen hears of them. Machines are asked with --ask or --verbose."""
    s = session(ctx, json=json, verbose=verbose)
    url, seen, problem = None, None, None
    try:
        url = s.settings.queen
        with s.queen() as queen:
            seen = queen.get("/v1/status")
    except RbeeError as e:
        problem = e
    missing = _missing(s, seen["workers"]) if seen else {}
    asked = bool(missing) and (ask or s.ui.verbose) and not quick
    data = {
        "queen_url": url,
        "queen": seen["queen"] if seen else None,
        "hives": _hives(s, seen),
        "workers": seen["workers"] if seen else [],
        "models": seen["models"] if seen else [],
        "silent": _asked(s, missing) if asked else _not_asked(missing),
    }
    if problem is None:
        return OperationResult(
            "status", data=data, view="status", messages=() if asked or not missing else (_how_to_ask(missing),)
        )
    return OperationResult(
        "status",
        data=data,
        view="status",
        exit_code=exit_code_of(problem),
        errors=(ErrorItem.of(problem),),
        partial=bool(data["hives"]),
    )


def _missing(s: Session, live: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the declared workers that the queen does not hear: {machine: names}."""
    if s.settings.inventory.value is None:
        return {}
    heard = {w["id"] for w in live}
    missing = {h.name: sorted(h.started - {i.removeprefix(f"{h.name}-") for i in heard}) for h in s.inventory.hives}
    return {name: workers for name, workers in missing.items() if workers}


def _names(missing: dict[str, list[str]]) -> str:
    return ", ".join(f"{name}-{worker}" for name, workers in missing.items() for worker in workers)


def _how_to_ask(missing: dict[str, list[str]]) -> str:
    where = f"--node {next(iter(missing))}" if len(missing) == 1 else ""
    ways = f"rbee-ctl status --ask, or rbee-ctl hive status {where}".rstrip()
    return f"declared and not heard: {_names(missing)}; {', '.join(missing)} not asked; to ask: {ways}"


def _not_asked(missing: dict[str, list[str]]) -> dict[str, Any]:
    return {name: {"status": "not asked", "workers": names, "target": None, "units": []} for name, names in missing.items()}


def _asked(s: Session, missing: dict[str, list[str]]) -> dict[str, Any]:
    """Return what systemd says of the silent workers: {machine: {status, error?, units}}."""
    s.ui.narrate("ctl", "status", f"declared and not heard: {_names(missing)}; asking {', '.join(missing)}")
    found = _not_asked(missing)
    try:
        hosts = s.play("status", limit=",".join(missing), silent=True).hosts
    except RbeeError as e:  # without Ansible the queen's view is what there is
        s.ui.narrate("ctl", "status", e.message)
        return found
    for name, outcome in hosts.items():
        hive = outcome.result.get("hive", {})
        units = [u for u in hive.get("units", []) if u.get("name") in missing[name] or u.get("active_state") == "failed"]
        found[name] = {"status": outcome.status, "workers": missing[name], "target": hive.get("target"), "units": units}
        if outcome.error is not None:
            found[name]["error"] = ErrorItem.of(outcome.error, name).as_dict()
    return found


def _hives(s: Session, seen: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the queen's machines, as she tells them, and those of the inventory that she was not told of, by the same rule."""
    views: dict[str, dict[str, Any]] = {}
    for host in s.inventory.hives if s.settings.inventory.value is not None else []:
        status = UNKNOWN if seen is None else hive_status((), bool(host.started))
        nothing: dict[str, Any] = {"workers": [], "models": [], "slots": None, "status": status}
        views[host.name] = {"name": host.name, "address": host.address, **nothing}
    for hive in (seen or {}).get("hives", []):
        address = views.get(hive["name"], {}).get("address") or hive.get("address")
        views[hive["name"]] = {**hive, "address": address}
    # ``state``: what ``status`` was called here before the queen told it.
    return [{**view, "state": view["status"]} for view in views.values()]


def env(ctx: typer.Context, json: Json = False) -> OperationResult:
    """Print shell lines that point any OpenAI client at the queen: eval "$(rbee-ctl env)"."""
    s = session(ctx, json=json)
    # OpenAI's client refuses to start without a key, so a queen that asks for none gets a word that says so.
    variables = {"OPENAI_BASE_URL": f"{s.settings.queen}/v1", "OPENAI_API_KEY": s.settings.api_key() or "not-needed"}
    return OperationResult("env", data={"variables": variables}, view="exports")


def version(ctx: typer.Context, json: Json = False) -> OperationResult:
    """Show the version."""
    import platform

    from rbee_ctl import content
    from rbee_serve import __version__

    session(ctx, json=json)
    try:
        where = str(content.root())
    except RbeeError:
        where = None
    data = {"version": __version__, "python": platform.python_version(), "content": where}
    return OperationResult("version", data=data, view="version")
