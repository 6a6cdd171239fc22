"""What ``worker start`` decides before it touches anything: pure functions from findings to a plan, or a NodeError.

A request is ``{"backend", "device", "model", "name"?, "slots"?, "context_tokens"?, "threads"?, "port"?}``.
"""

from __future__ import annotations

import re
import string

from ansible.module_utils.rbee_devices import BACKENDS
from ansible.module_utils.rbee_node import FIRST_PORT, NAME, NodeError, worker_unit

#: First line of the settings file of an instance that no inventory declares.
BY_HAND = "# made by worker_start"
#: Settings that a request may give; one that is not given keeps its present or default value.
OPTIONAL = ("slots", "context_tokens", "threads", "port")
#: What an inventory may say of an instance besides, and a request does not speak of.
DECLARED_ONLY = ("socket", "memory_max", "cpu_affinity", "cpu_quota", "cpu_weight", "settings")


def check_version(controller, hive):
    """Raise NodeError VERSION_MISMATCH where rbee-ctl and the node are of different versions; the older side is to follow."""
    here = hive.get("version")
    if not controller or not here or controller == here:
        return
    name = hive.get("name") or "NODE"
    older = _version_key(here) < _version_key(controller)
    upgrade = f"rbee-ctl upgrade --node {name}" if older else f"pip install --upgrade 'rbee[ctl]=={here}'"
    raise NodeError(
        "VERSION_MISMATCH",
        f"this machine has rbee {here}, rbee-ctl is {controller}: the {'machine' if older else 'controller'} is older",
        upgrade,
        node_version=here,
        controller_version=controller,
    )


def _version_key(text):
    return [int(part) for part in re.findall(r"\d+", text)]


def cool(device, limit_celsius):
    """Return whether a device takes new work: it is below the limit, or nobody tells its temperature."""
    return limit_celsius is None or (device.get("temperature_celsius") or 0) < limit_celsius


def check_device(request, devices, limit_celsius=None):
    """Return the device that the request names; where it names none, the one with the most free memory (SPEC E-12) of those
    that are below ``limit_celsius``, or of all where none is.

    Raises NodeError INVALID_BACKEND, BACKEND_UNAVAILABLE, DEVICE_OUT_OF_RANGE. Never falls back to another one.
    """
    backend, number = request["backend"], request["device"]
    available = sorted({d["backend"] for d in devices})
    if backend not in BACKENDS:
        raise NodeError(
            "INVALID_BACKEND",
            f"{backend!r} is no backend, expected one of {', '.join(BACKENDS)}",
            f"--backend {available[0]}",
            expected=list(BACKENDS),
        )
    mine = [d for d in devices if d["backend"] == backend]
    if not mine:
        driver = {
            "cuda": "install the NVIDIA driver so that nvidia-smi lists a GPU, or use",
            "rocm": "install the ROCm driver so that rocm-smi lists a GPU, or use",
            "metal": "Metal needs macOS, which rbee does not manage; use",
        }.get(backend, "use")
        raise NodeError(
            "BACKEND_UNAVAILABLE",
            f"this machine has no {backend} device; available: {', '.join(available)}",
            f"{driver} --backend {available[0]}",
            backend=backend,
            available=available,
        )
    if number is None:
        return max(mine, key=lambda d: (cool(d, limit_celsius), d.get("memory_free_bytes") or 0, -d["device"]))
    for device in mine:
        if device["device"] == number:
            return device
    listed = ", ".join(f"{d['device']} ({d['name']})" for d in mine)
    raise NodeError(
        "DEVICE_OUT_OF_RANGE",
        f"{backend} device {number} is not there; this machine has {listed}",
        f"--device {mine[0]['device']}",
        device=number,
        available=[d["device"] for d in mine],
    )


def check_runtime(backend, paths, install_path, install_hint):
    """Return the newest runtime; raises NodeError WORKER_BINARY_NOT_FOUND with the path that was expected (SPEC S-44)."""
    if paths:
        return paths[0]
    expected = f"{install_path}/runtimes/{backend}/VERSION/bin/rbee-worker"
    raise NodeError(
        "WORKER_BINARY_NOT_FOUND",
        f"no {backend} runtime on this machine, expected {expected}",
        install_hint,
        expected_path=expected,
    )


def preferred_device(request, instances, model_id):
    """Return the device of the instance that has the model already, for a request that names no device; else None."""
    for _, settings in sorted(instances.items()):
        if (settings.get("backend"), settings.get("model_id")) == (request["backend"], model_id):
            return settings.get("device")
    return None


def check_temperature(device, limit_celsius):
    """Return the narration or None; raises NodeError GPU_TOO_HOT at or over the limit (SPEC E-14). Unknown is no refusal."""
    temperature = device.get("temperature_celsius")
    if temperature is None:
        return None
    if temperature >= limit_celsius:
        raise NodeError(
            "GPU_TOO_HOT",
            f"{device['id']} ({device['name']}) is at {temperature} C, the limit for new work is {limit_celsius} C",
            "wait until it has cooled down, or take another device; rbee_preflight_gpu_max_celsius sets the limit",
            temperature_celsius=temperature,
            limit_celsius=limit_celsius,
        )
    return f"{device['id']} is at {temperature} C"


def declared_names(workers):
    """Return the instance names of an inventory's ``rbee_workers``."""
    return [w.get("name") or f"{w['backend']}{w.get('device', 0)}" for w in workers]


def declared_extras(workers, name):
    """Return what the inventory says of an instance beyond what a request may: it stays in force."""
    entry = dict(zip(declared_names(workers), workers, strict=True)).get(name, {})
    return {k: entry[k] for k in DECLARED_ONLY if entry.get(k) is not None}


def choose_name(request, model_id, instances, by_hand, declared):
    """Return (name, present settings or None): the instance that is asked for, there already or to be made.

    Without a name in the request: the instance of this device that has the model, else the first of
    ``<backend><device>``, ``<backend><device>-b``, ... that is neither there nor ``declared``.
    Raises NodeError INVALID_REQUEST for a name that cannot be used.
    """
    base = f"{request['backend']}{request['device']}"
    name = request.get("name")
    if name is None:
        for other, settings in sorted(instances.items()):
            same_device = (settings.get("backend"), settings.get("device")) == (request["backend"], request["device"])
            if same_device and settings.get("model_id") == model_id:
                return other, settings
        names = [base, *(f"{base}-{c}" for c in string.ascii_lowercase[1:])]
        free = [n for n in names if n not in instances and n not in declared]
        if not free:
            raise NodeError("INVALID_REQUEST", f"{base} and {base}-b to {base}-z are all taken", "give another --name")
        return free[0], None
    if not NAME.match(name) or not (name == base or name.startswith(f"{base}-")):
        raise NodeError(
            "INVALID_REQUEST",
            f"{name!r} can not be the name of a worker on {request['backend']} device {request['device']}",
            f"--name {base} or --name {base}-b",
            field="name",
        )
    settings = instances.get(name)
    if settings and settings.get("model_id") != model_id and name not in by_hand:
        raise NodeError(
            "INVALID_REQUEST",
            f"{name} is declared in the inventory with model {settings.get('model_id')}, asked for is {model_id}",
            f"change rbee_workers there and run site.yml, or start a second one: --name {base}-b",
            field="name",
            declared_model=settings.get("model_id"),
        )
    return name, settings


def is_identical(request, settings, model_id):
    """Return whether the instance has everything that the request asks for."""
    wanted = {"backend": request["backend"], "device": request["device"], "model_id": model_id}
    wanted.update({k: request[k] for k in OPTIONAL if request.get(k) is not None})
    return all(settings.get(k) == v for k, v in wanted.items())


def choose_port(request, settings, instances, listening, declared):
    """Return (port, narration or None): the present one, the one asked for, or the next that is free (SPEC 3.1, S-45).

    ``declared`` are the names that the inventory declares: their ports, 8001 + ordinal, are left to them.
    """
    if request.get("port"):
        return request["port"], None
    if settings and settings.get("port"):
        return settings["port"], None
    taken = {s.get("port") for s in instances.values()}
    first = port = FIRST_PORT + max(len(declared), len(instances))
    while port in taken or port in listening:
        port += 1
        if port > 65535:
            raise NodeError("INVALID_REQUEST", f"no TCP port is free from {first} on", "give one: --port", field="port")
    foreign = [str(p) for p in range(first, port) if p in listening and p not in taken]
    return port, f"port {', '.join(foreign)} is taken by another process; using {port}" if foreign else None


def instance(request, model, settings, name, port, declared):
    """Return the normalised instance that the role rbee_worker renders; ``by_hand``: no inventory declares it."""
    keep = settings or {}
    return {
        "name": name,
        "unit": worker_unit(name),
        "backend": request["backend"],
        "device": request["device"],
        "model": model["id"],
        "port": port,
        **{k: request.get(k) or keep[k] for k in OPTIONAL if k != "port" and (request.get(k) or k in keep)},
        "state": "present",
        "by_hand": name not in declared,
    }
