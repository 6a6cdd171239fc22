"""How data looks to a person: pure functions from a command's ``data`` to tables and lines. ``render`` prints them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of text; ``plain`` is its form for pipes and files."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str | None = None

    def plain(self) -> str:
        """Return aligned columns, two spaces apart, with a header line."""
        lines = [tuple(c.upper() for c in self.columns), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        body = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return (f"{self.title}\n" if self.title else "") + body + "\n"


View = Iterable[Table | str]


def _table(columns: tuple[str, ...], rows: Iterable[Iterable[Any]], title: str | None = None) -> Table:
    return Table(columns, tuple(tuple("-" if cell is None or cell == "" else str(cell) for cell in row) for row in rows), title)


def duration(seconds: float) -> str:
    """Return a length of time in the two largest units: ``4s``, ``3m 10s``, ``2h 5m``, ``3d 4h``."""
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (secs, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{n}{unit}" for n, unit in parts[:2])


def size(count: float | None) -> str | None:
    """Return bytes in decimal megabytes."""
    return None if count is None else f"{count / 1e6:.1f} MB"


def _worker_rows(workers: Iterable[Data]) -> list[tuple[Any, ...]]:
    return [
        (
            w.get("id"),
            w.get("hive_id"),
            w.get("model_id"),
            f"{w.get('backend')}:{w.get('device')}",
            w.get("status"),
            f"{w.get('slots_available')}/{w.get('slots_total')}",
            f"{w['last_heartbeat_age_s']}s" if "last_heartbeat_age_s" in w else None,
            w.get("url"),
        )
        for w in workers
    ]


_WORKER_COLUMNS = ("worker", "node", "model", "device", "state", "free", "heard", "url")


def workers(data: Data) -> View:
    """Live workers."""
    if not data["workers"]:
        return ["no live workers"]
    return [_table(_WORKER_COLUMNS, _worker_rows(data["workers"]))]


def record(data: Data) -> View:
    """One record, key by key."""
    (inner,) = data.values()
    return [_table(("field", "value"), ((k, v) for k, v in inner.items() if not isinstance(v, dict)))]


def status(data: Data) -> View:
    """The fleet at one glance: queen, hives, workers."""
    queen = data["queen"]
    if queen is None:
        yield f"queen {data['queen_url'] or 'not set'}: no answer"
    else:
        running = queen.get("requests_in_progress")
        up = duration(queen.get("uptime_s", 0))
        yield f"queen {data['queen_url']}: up {up}, version {queen.get('version')}, {running} running"
    rows = []
    for hive in data["hives"]:
        slots = hive["slots"]
        free = f"{slots['total'] - slots['busy']}/{slots['total']}" if slots else None
        rows.append((hive["name"], hive["address"], hive["status"], ", ".join(hive["workers"]), ", ".join(hive["models"]), free))
    if rows:
        yield _table(("node", "address", "state", "workers", "models", "free"), rows)
    if data["workers"]:
        yield _table(_WORKER_COLUMNS, _worker_rows(data["workers"]))
    yield from _silent(data.get("silent", {}))


def _silent(silent: Mapping[str, Data]) -> View:
    """Workers that are declared and that the queen does not hear, with what their machine says of them."""
    rows: list[tuple[Any, ...]] = []
    for host, found in silent.items():
        units = {u.get("name"): u for u in found["units"]}
        for name in [*found["workers"], *(n for n in units if n not in found["workers"])]:
            unit = units.get(name, {})
            state = f"{unit.get('active_state')} ({unit.get('sub_state')})" if unit else "not there"
            if found["status"] != "ok":
                state = found["status"]
            rows.append((f"{host}-{name}", host, state, unit.get("result"), unit.get("n_restarts"), found["target"]))
    if rows:
        yield _table(("silent worker", "node", "unit", "result", "restarts", "hive"), rows)
    for host, found in silent.items():
        if error := found.get("error"):
            yield f"{error['message']}\n  next: {error['hint']}"
        elif found["target"] == "inactive":
            yield f"{host}: the hive is stopped; next: rbee-ctl hive start --node {host}"
        yield from _journals(host, found["units"])


def hives(data: Data) -> View:
    """Hosts of the inventory."""
    if not data["hives"]:
        return ["the inventory has no hosts in group rbee_hives"]
    rows = (
        (
            h["name"],
            h["address"],
            h["status"],
            ago(h["last_contact"]),
            ", ".join(h["backends"]),
            ", ".join(h["workers"]),
            h["install_path"],
            "yes" if h["queen"] else "",
        )
        for h in data["hives"]
    )
    return [_table(("node", "address", "status", "contact", "backends", "declared workers", "install path", "queen"), rows)]


def ago(epoch: float | None) -> str | None:
    """Return how long ago a time was."""
    return None if epoch is None else f"{duration(max(0.0, time.time() - epoch))} ago"


def _device_rows(devices: Iterable[Data]) -> list[tuple[Any, ...]]:
    return [
        (d["id"], d.get("name"), size(d.get("memory_bytes")), d.get("compute_capability") or d.get("driver")) for d in devices
    ]


def hive(data: Data) -> View:
    """One machine: what the inventory says and what is remembered."""
    inner = data["hive"]
    rows: list[tuple[Any, ...]] = [
        (k, inner[k]) for k in ("name", "address", "install_path", "status", "last_error") if k in inner
    ]
    rows += [("groups", ", ".join(inner["groups"])), ("last contact", ago(inner["last_contact"]))]
    rows += [(k, v) for k, v in inner["variables"].items() if k not in ("ansible_host", "rbee_install_path")]
    yield _table(("field", "value"), rows)
    if inner["devices"]:
        yield _table(("device", "name", "memory", "capability"), _device_rows(inner["devices"]))


def capabilities(data: Data) -> View:
    """Devices, machine by machine."""
    rows: list[tuple[Any, ...]] = []
    for host, outcome in data["hosts"].items():
        if outcome["status"] != "ok":
            rows.append((host, outcome["status"], None, None, None))
        rows += [(host, *row) for row in _device_rows(outcome.get("devices", []))]
    return [_table(("node", "device", "name", "memory", "capability"), rows)]


def checks(data: Data) -> View:
    """Named checks of one machine, one line each."""
    marks = {(True, True): "ok", (True, False): "ok", (False, True): "FAILED", (False, False): "not yet"}
    rows = [(c["name"], marks[c["ok"], c["required"]], c["got"], c.get("expected"), c.get("hint")) for c in data["checks"]]
    return [_table(("check", "result", "got", "expected", "try"), rows, title=data["node"])]


def ssh_tested(data: Data) -> View:
    """A machine that answered."""
    yield f"{data['node']}: ok, {data['latency_ms']} ms"


def imported(data: Data) -> View:
    """What came out of ~/.ssh/config."""
    refused = f", {len(data['refused'])} passed over for their names ({', '.join(data['refused'])})" if data["refused"] else ""
    yield f"{len(data['imported'])} new, {len(data['already_there'])} there already{refused}, in {data['inventory']}"


def hive_status(data: Data) -> View:
    """State of each machine's target and units, as systemd tells it."""
    rows: list[tuple[Any, ...]] = []
    for host, outcome in data["hosts"].items():
        if outcome["status"] != "ok":
            rows.append((host, outcome["status"], None, None, None, None, None, None))
            continue
        hive = outcome.get("hive", {})
        rows.append((host, hive.get("target"), hive.get("version"), "rbee-hive.target", hive.get("target"), None, None, None))
        for unit in [*hive.get("units", []), *([hive["queen"]] if hive.get("queen") else [])]:
            state = f"{unit.get('active_state')} ({unit.get('sub_state')})"
            if unit.get("active_state") == "inactive" and unit.get("socket") == "active":
                state = "dormant (socket listens)"
            age = unit.get("heartbeat_age_s")
            beat = None if age is None else f"{age:.0f} s ago"
            rows.append((host, None, None, unit.get("unit"), state, unit.get("n_restarts"), beat, unit.get("status_text")))
    yield _table(("node", "hive", "version", "unit", "state", "restarts", "heartbeat", "status"), rows)
    for host, outcome in data["hosts"].items():
        hive = outcome.get("hive", {})
        yield from _journals(host, [*hive.get("units", []), *([hive["queen"]] if hive.get("queen") else [])])


def _journals(host: str, units: Iterable[Data]) -> Iterator[str]:
    """The last lines of the units that are in trouble."""
    for unit in units:
        if lines := unit.get("journal"):
            yield f"{host} {unit['unit']}: {unit.get('result')}, the last lines of its journal:"
            yield from (f"    {line}" for line in lines)
            yield f"  next: journalctl -u {unit['unit']} -n 50 on {host}; then rbee-ctl hive start --node {host}, or a deploy"


def hosts(data: Data) -> View:
    """Outcome of a fleet verb, host by host."""
    rows = []
    for host, outcome in data["hosts"].items():
        done = outcome["status"] if outcome["status"] != "ok" else ("changed" if outcome.get("changed") else "unchanged")
        rows.append((host, done, outcome.get("target")))
    yield _table(("node", "outcome", "hive"), rows)
    for host, outcome in data["hosts"].items():
        yield from _killed(host, outcome)


def _killed(host: str, outcome: Data) -> Iterator[str]:
    for kill in outcome.get("forced", []):
        yield f"{host}-{kill['name']}: killed (pid {kill['pid']}, {kill['signal']}): {kill['reason']}"


def plan(data: Data) -> View:
    """What would change, one table a machine; and how."""
    yield from _differences(data, "would change nothing")


def drift(data: Data) -> View:
    """Where machines differ, one table each."""
    yield from _differences(data, "as declared")


def _differences(data: Data, none: str) -> View:
    for host, found in data["hosts"].items():
        if found["status"] != "ok":
            continue
        if not (found["drift"] or found["changes"]):
            yield f"{host}: {none}"
        if found["drift"]:
            rows = ((d["kind"], d["what"], d["expected"], d["found"], d["next"]) for d in found["drift"])
            yield _table(("differs", "what", "expected", "found", "next"), rows, f"{host}: differs")
        if found["changes"]:
            yield _table(("task", "what"), ((c["task"], c["what"]) for c in found["changes"]), f"{host}: would change")
            for change in found["changes"]:
                if change["diff"]:
                    yield f"{host}: {change['what'] or change['task']}\n{change['diff'].rstrip()}"


def upgraded(data: Data) -> View:
    """Outcome of an upgrade, machine by machine."""
    for host, found in data["hosts"].items():
        if found["status"] != "ok":
            yield f"{host}: {found['status']}"
        elif found["upgraded"]:
            yield f"{host}: runs {found['runs']}"
        else:
            yield f"{host}: not begun, its workers run what they ran: the roll stopped before"


def removed(data: Data) -> View:
    """What was taken off each machine."""
    for host, found in data["hosts"].items():
        if found["status"] != "ok":
            continue
        gone = found.get("removed", [])
        kept = f"; models stay in {found['models_kept']}" if found.get("models_kept") else ""
        yield f"{host}: {'removed ' + ', '.join(gone) if gone else 'nothing of rbee was there'}{kept}"


def worker_started(data: Data) -> View:
    """A worker that was started, or ran already."""
    w = data["worker"]
    verb = "started" if data.get("changed") else "already running"
    where = f"{w.get('backend')}:{w.get('device')}"
    yield f"{w.get('worker_id')}: {verb}, {w.get('state')}, {w.get('model_id')} on {where}, {w.get('url')}"


def workers_stopped(data: Data) -> View:
    """Workers that were stopped, or were not running."""
    for host, outcome in data["hosts"].items():
        for verb, key in (("stopped", "stopped"), ("was not running", "already_stopped")):
            for name in outcome.get(key, []):
                yield f"{host}-{name}: {verb}"
        yield from _killed(host, outcome)


def models(data: Data) -> View:
    """Catalogs of machines: models, broken entries, free disk."""
    rows: list[tuple[Any, ...]] = []
    notes: list[str] = []
    for host, outcome in data["hosts"].items():
        if outcome["status"] != "ok":
            continue
        for m in outcome.get("models", []):
            facts = m.get("metadata", {})
            used = ", ".join(m.get("used_by", []))
            status = f"{m['status']}: {m['problem']}" if m.get("problem") else m.get("status")
            rows.append((host, m["id"], facts.get("quantization"), size(m.get("size_bytes")), status, used, m.get("reference")))
        notes += [f"{host}: broken: {p['path']}: {p['problem']}" for p in outcome.get("problems", [])]
        if disk := outcome.get("disk"):
            used_bytes = sum(m.get("size_bytes", 0) for m in outcome.get("models", []) if m.get("status") == "Ready")
            count = len(outcome.get("models", []))
            notes.append(f"{host}: {count} models, {size(used_bytes)}; {size(disk['free_bytes'])} of the disk are free")
    if rows:
        yield _table(("node", "model", "quant", "size", "status", "used by", "reference"), rows)
    else:
        yield "no models"
    yield from notes


def models_served(data: Data) -> View:
    """Models that live workers serve."""
    if not data["models"]:
        return ["no models"]
    rows = ((m.get("node"), m.get("id"), size(m.get("size_bytes")), m.get("status"), m.get("reference")) for m in data["models"])
    return [_table(("node", "model", "size", "status", "reference"), rows)]


def model_record(data: Data) -> View:
    """One model, key by key, on each machine that has it."""
    for host, outcome in data["hosts"].items():
        if not (m := outcome.get("model")):
            continue
        facts = dict(m.get("metadata", {}))
        template = facts.pop("chat_template", None)
        reckoned = facts.pop("memory", None) or {}
        rows: list[tuple[str, Any]] = [(k, v) for k, v in m.items() if k not in ("metadata", "used_by", "files")]
        rows += [("parts", len(m["files"]))] if m.get("files") else []
        rows += list(facts.items())
        rows += [("weight_bytes", reckoned.get("weight_bytes")), ("used_by", ", ".join(m.get("used_by", [])))]
        rows += [("chat_template", " ".join(template.split())[:60] + " ...")] if template else []
        yield _table(("field", "value"), rows, title=host)


def model_deleted(data: Data) -> View:
    """A model that was deleted, with what that freed."""
    for host, outcome in data["hosts"].items():
        if not (m := outcome.get("model")):
            continue
        yield f"{host}: {m['id']} deleted, {size(outcome.get('freed_bytes'))} freed"
        yield from (f"{host}: {path} lies outside of the models directory and was left" for path in outcome.get("left", []))
        if outcome.get("used_by"):
            yield f"{host}: still set to it: {', '.join(outcome['used_by'])}"


def runtimes(data: Data) -> View:
    """Runtimes of machines."""
    rows = [
        (
            host,
            r["type"],
            r["version"],
            "current" if r["current"] else None,
            size(r.get("size_bytes")),
            ", ".join(r["used_by"]),
            r["path"],
        )
        for host, outcome in data["hosts"].items()
        for r in outcome.get("runtimes", [])
    ]
    return [_table(("node", "type", "version", "", "size", "used by", "path"), rows)] if rows else ["no runtimes"]


def runtime_record(data: Data) -> View:
    """One runtime, key by key, on each machine that has it."""
    for host, outcome in data["hosts"].items():
        if r := outcome.get("runtime"):
            build = {f"build {k}": v for k, v in (r.get("build") or {}).items() if k != "cmake_hook"}
            shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in r.items() if k != "build"}
            shown |= {k: " ".join(v) if isinstance(v, list) else v for k, v in build.items()}
            yield _table(("field", "value"), shown.items(), title=host)


def runtime_made(data: Data) -> View:
    """A runtime that was built or fetched, or was there."""
    for host, outcome in data["hosts"].items():
        if r := outcome.get("runtime"):
            kind = str(r["worker_type"]).removesuffix("-llm-worker")
            yield f"{host}: {kind} {r['version']} {'installed' if r.get('made') else 'here already'}"
            yield f"  switch to it: rbee-ctl runtime use --node {host} --type {kind} --version {r['version']}"


def runtime_used(data: Data) -> View:
    """A switch to a runtime."""
    for host, outcome in data["hosts"].items():
        if r := outcome.get("runtime"):
            moved = ", ".join(outcome.get("moved", []))
            yield f"{host}: {r['type']} {r['version']} is current" + (f"; moved: {moved}" if moved else "")


def runtime_deleted(data: Data) -> View:
    """A runtime that was deleted."""
    for host, outcome in data["hosts"].items():
        if r := outcome.get("runtime"):
            yield f"{host}: {r['type']} {r['version']} deleted, {size(outcome.get('freed_bytes'))} freed"


def model_downloaded(data: Data) -> View:
    """A model that was fetched, or was there."""
    for host, outcome in data["hosts"].items():
        if not (model := outcome.get("model")):
            continue  # its error says why
        verb = "downloaded" if outcome.get("downloaded") else "already there"
        yield f"{host}: {model.get('id')} {verb}, {size(model.get('size_bytes'))}, {model.get('path')}"


def bundle(data: Data) -> View:
    """What a bundle holds."""
    found = data["bundle"]
    yield f"{found['bundle']}: {size(found['size_bytes'])}, {found['files']} files, all as its list of contents says"
    wheels = f"{found['wheels']} wheels for the controller"
    yield f"rbee {found['rbee_version']} for Python {found['python']} on {found['machine']}, {wheels}"
    for model in found["models"]:
        yield f"model {model['id']}: {size(model['size_bytes'])}, {model['reference']}"


def exports(data: Data) -> View:
    """Lines for ``eval``."""
    import shlex

    for name, value in data["variables"].items():
        yield f"export {name}={shlex.quote(value)}"


def settings(data: Data) -> View:
    """Settings with their sources."""
    return [_table(("setting", "value", "source"), ((k, s["value"], s["source"]) for k, s in data["settings"].items()))]


def key_created(data: Data) -> View:
    """The new key alone: it can be read from a pipe."""
    yield data["key"]["secret"]


def keys(data: Data) -> View:
    """Client keys with their limits."""
    if not data["keys"]:
        return ["no client keys"]

    def day(moment: float | None) -> str | None:
        if moment is None:
            return None
        text = time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
        return f"{text} (expired)" if moment <= time.time() else text

    rows = (
        (
            k["name"],
            k["id"],
            k["created_at"],
            day(k["expires_at"]),
            "yes" if k["admin"] else None,
            "all" if k["models"] is None else ", ".join(k["models"]),
            k["requests_per_minute"],
            k["concurrent_requests"],
        )
        for k in data["keys"]
    )
    return [_table(("name", "id", "created", "expires", "admin", "models", "per minute", "at once"), rows)]


def version(data: Data) -> View:
    """Version in one line."""
    yield f"rbee-ctl {data['version']}"


def lab(data: Data) -> View:
    """Machines of the lab."""
    if not data["nodes"]:
        return ["no lab machines"]
    rows = ((n["name"], n["state"], n["address"], data["lab"]["network"], data["lab"]["bridge"]) for n in data["nodes"])
    return [_table(("machine", "state", "address", "network", "bridge"), rows)]


def processes(data: Data) -> View:
    """Worker processes of one machine."""
    if not data["processes"]:
        return [f"no worker processes on {data['node']}"]
    rows = (
        (p["pid"], p["role"], p["worker_id"], p["model_id"], duration(p["uptime_s"]), f"{p['cpu_s']} s", size(p["rss_bytes"]))
        for p in data["processes"]
    )
    return [_table(("pid", "role", "worker", "model", "up", "cpu", "memory"), rows)]


def process_deleted(data: Data) -> View:
    """A process that was ended."""
    p = data["process"]
    yield f"{p['node']}: process {p['pid']} ended with {p['unit']}; rbee-ctl worker start or hive start brings the worker back"


def retired(data: Data) -> View:
    """A worker that takes no more requests."""
    yield f"{data['worker']['id']}: retiring; running requests end normally"


def health(data: Data) -> View:
    """Workers and whether they are ready."""
    if not data["workers"]:
        return ["no live workers"]
    rows = (
        (w["id"], w["node"], "yes" if w["ready"] else "no", w["state"], f"{w['last_heartbeat_age_s']}s") for w in data["workers"]
    )
    return [_table(("worker", "node", "ready", "state", "heard"), rows)]


def cleaned(data: Data) -> View:
    """Workers that nobody declared."""
    for host, outcome in data["hosts"].items():
        names = ", ".join(outcome.get("removed", [])) if outcome["status"] == "ok" else outcome["status"]
        yield f"{host}: {names or 'nothing to remove'}"
