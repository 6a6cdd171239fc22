"""Commands that show and start nothing: status, env, version."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import ErrorItem, OperationResult, exit_code_of
from rbee_ctl.session import Session
from rbee_serve.contract.errors import RbeeError


def status(
    ctx: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="ask the queen alone, whatever is missing")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Show queen, machines and workers at one glance. Asks the queen; machines only where a declared worker is silent."""
    s = session(ctx, json=json, verbose=verbose)
    url, seen, problem = None, None, None
    try:
        url = s.settings.queen
        with s.queen() as queen:
            seen = queen.get("/v1/status")
    except RbeeError as e:
        problem = e
    data = {
        "queen_url": url,
        "queen": seen["queen"] if seen else None,
        "hives": _hives(s, seen),
        "workers": seen["workers"] if seen else [],
        "models": seen["models"] if seen else [],
        "silent": _silent(s, seen["workers"]) if seen and not quick else {},
    }
    if problem is None:
        return OperationResult("status", data=data, view="status")
    return OperationResult(
        "status",
        data=data,
        view="status",
        exit_code=exit_code_of(problem),
        errors=(ErrorItem.of(problem),),
        partial=bool(data["hives"]),
    )


def _silent(s: Session, live: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what systemd says of declared workers that the queen does not hear: {machine: {status, error?, units}}."""
    if s.settings.inventory.value is None:
        return {}
    heard = {w["id"] for w in live}
    missing = {h.name: sorted(h.started - {i.removeprefix(f"{h.name}-") for i in heard}) for h in s.inventory.hives}
    missing = {name: workers for name, workers in missing.items() if workers}
    if not missing:
        return {}
    who = ", ".join(f"{name}-{worker}" for name, workers in missing.items() for worker in workers)
    s.ui.narrate("ctl", "status", f"declared and not heard: {who}; asking {', '.join(missing)} (--quick does not)")
    found: dict[str, Any] = {n: {"status": "not asked", "workers": w, "target": None, "units": []} for n, w in missing.items()}
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
    """Merge the inventory's machines with those that the queen hears from."""
    live = {h["name"]: h for h in (seen or {}).get("hives", [])}
    addresses: dict[str, str | None] = {}
    if s.settings.inventory.value is not None:
        addresses = {h.name: h.address for h in s.inventory.hives}
    addresses |= {name: hive.get("address") for name, hive in live.items() if name not in addresses}
    silent = "unknown" if seen is None else "no live worker"
    return [
        {
            "name": name,
            "address": address,
            "state": "live" if live.get(name, {}).get("workers") else silent,
            "workers": live.get(name, {}).get("workers", []),
            "models": live.get(name, {}).get("models", []),
            "slots": live.get(name, {}).get("slots"),
        }
        for name, address in addresses.items()
    ]


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
