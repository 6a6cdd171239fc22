"""Whether a worker fits into what a machine has free, and what would fit instead. Figures in, a verdict out.

A worker on a CPU takes RAM; one on an accelerator takes the device's memory, and a share of RAM besides. ``wanted`` are a
worker's settings as far as they are known, ``shared`` {path: bytes} the model files that are mapped already: who maps one of
them as well shares it.
"""

from __future__ import annotations

import os

from ansible.module_utils.rbee_gguf import GgufError, facts
from ansible.module_utils.rbee_memory import DEFAULTS, host_need, is_mapped, need
from ansible.module_utils.rbee_node import NodeError
from ansible.module_utils.rbee_store import parts

#: Memory that must be free at the very least, as a multiple of the model's file (SPEC 3.8).
MEMORY_FACTOR = 1.2
#: How a remedy is written: for ``worker start``, and for an entry of rbee_workers.
OPTIONS = {"slots": "--slots {}", "context_tokens": "--context-tokens {}", "model": "--model {}", "device": "--device {}"}
KEYS = {"slots": "slots: {}", "context_tokens": "context_tokens: {}", "model": "model: {}", "device": "device: {}"}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def mb(size):
    """Return a number of bytes as people read it."""
    return f"{size / 1e6:.0f} MB"


def parse_size(text):
    """Return systemd's ``12G`` in bytes; None for no limit, and for a share of the machine's memory (``50%``)."""
    text = str(text or "").strip()
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return int(float(number) * (_UNITS[unit] if unit else 1))
    except (KeyError, ValueError):
        return None


def with_figures(entry):
    """Return a catalog entry that has its header's figures: one that was catalogued before they were kept gets them now."""
    if "matrix_types" in ((entry.get("metadata") or {}).get("memory") or {}):
        return entry
    try:
        return {**entry, "metadata": {**(entry.get("metadata") or {}), **facts(*[p["path"] for p in parts(entry)])}}
    except (OSError, GgufError):
        return entry


def required_memory(model, wanted, on_device):
    """Return (bytes, words): what the model needs by its own figures, and of RAM never less than 1.2 times its file."""
    floor = int(model["size_bytes"] * MEMORY_FACTOR)
    words = f"1.2 x {mb(model['size_bytes'])}"
    parts = need(model.get("metadata") or {}, wanted, on_device=on_device)
    if parts is None:
        return floor, words
    chosen = {**DEFAULTS, **{k: v for k, v in wanted.items() if v is not None}}
    words = (
        f"weights {mb(parts['weights'])}, KV cache of {chosen['slots']} x {chosen['context_tokens']} tokens {mb(parts['kv'])}, "
        f"compute {mb(parts['compute'])}, process {mb(parts['process'])}" + ("" if on_device else f"; at least {words}")
    )
    return parts["total"] if on_device else max(floor, parts["total"]), words


def already_there(model, shared):
    """Return how many bytes of the model's file this machine has mapped, for a worker on a CPU that would map it too."""
    if not shared or not is_mapped(model.get("metadata") or {}):
        return 0
    files = model.get("files") or [model]
    return sum(shared.get(os.path.realpath(f["path"]), 0) for f in files if f.get("path"))


def demands(model, device, wanted, ram, shared=None, limit=None):
    """Return what must be there, the first row being what decides: [(code, of what, bytes needed, bytes free or None, words)].

    ``ram``: bytes of RAM that are free. ``limit``: the unit's MemoryMax=, bytes.
    """
    on_device = device["backend"] != "cpu"
    required, words = required_memory(model, wanted, on_device)
    if not on_device:
        there = already_there(model, shared)
        rows = [("INSUFFICIENT_RAM", "RAM", required, ram + there, words)]
        mine = need(model.get("metadata") or {}, wanted)
        own, own_words = (mine["total"], words) if mine else (required, words)
    else:
        own = host_need(model.get("metadata") or {}, wanted)
        own_words = "the worker's processes, the driver's libraries, the token embedding"
        rows = [
            ("VRAM_EXHAUSTED", f"memory of {device['id']}", required, device.get("memory_free_bytes"), words),
            ("INSUFFICIENT_RAM", "RAM", own, ram, own_words),
        ]
    if limit is not None:
        rows.append(("INSUFFICIENT_RAM", "RAM under its memory_max", own, limit, own_words))
    return rows


def _fits(rows):
    return all(free is None or free >= required for _, _, required, free, _ in rows)


def check_memory(
    model, device, available_bytes, wanted=None, entries=(), elsewhere=(), shared=None, limit=None, devices=(), style=OPTIONS
):
    """Return (narration, required, free); raises NodeError INSUFFICIENT_RAM or VRAM_EXHAUSTED (SPEC S-33, S-34, S-37).

    For an accelerator the device's free memory counts, where the driver tells it, and a share of ``available_bytes`` of RAM; else
    ``available_bytes`` alone. ``entries``: the catalog, ``devices`` the machine's, ``elsewhere`` the machines that could take the
    worker: the hint names what would work.
    """
    wanted = wanted or {}
    rows = demands(model, device, wanted, available_bytes, shared, limit)
    said = []
    for code, what, required, free, words in rows:
        if free is None:
            said.append(f"{what}: needs {mb(required)} ({words}); the driver does not tell what is free")
        elif free >= required:
            said.append(f"{what}: needs {mb(required)} ({words}), {mb(free)} available")
        elif wanted.get("memory_check") is False:
            said.append(
                f"{what}: needs {mb(required)} ({words}), {mb(free)} available; loaded all the same (memory_check = false)"
            )
        else:

            def works(changes, other=model, on=device):
                return _fits(demands(other, on, {**wanted, **changes}, available_bytes, shared, limit))

            raise NodeError(
                code,
                f"{model['id']} needs {mb(required)} of {what} ({words}), {mb(free)} are available",
                "; or ".join(remedies(model, device, wanted, works, entries, elsewhere, devices, style)),
                required_bytes=required,
                available_bytes=free,
                model_size_bytes=model["size_bytes"],
                elsewhere=list(elsewhere),
                needs={"ram": rows[-1][2], "device": rows[0][2] if device["backend"] != "cpu" else 0},
            )
    return "; ".join(said), rows[0][2], rows[0][3]


def remedies(model, device, wanted, works, entries, elsewhere, devices, style):
    """Return what would work, each one tried with ``works(changed settings, other model, other device)``."""
    found = []
    slots = wanted.get("slots") or DEFAULTS["slots"]
    context = wanted.get("context_tokens") or DEFAULTS["context_tokens"]
    shorter = [c for c in (16384, 8192, 4096, 2048, 1024, 512) if c < context]
    fewer = next((n for n in range(slots - 1, 0, -1) if works({"slots": n})), None)
    if fewer:
        found.append(f"{style['slots'].format(fewer)} fits")
    fitting = next((c for c in shorter if works({"context_tokens": c})), None)
    if fitting:
        found.append(f"{style['context_tokens'].format(fitting)} fits")
    if not found and slots > 1:
        both = next((c for c in shorter if works({"slots": 1, "context_tokens": c})), None)
        if both:
            found.append(f"{style['slots'].format(1)} with {style['context_tokens'].format(both)} fits")
    mine = model.get("metadata") or {}
    same = [
        e
        for e in entries
        if e["id"] != model["id"]
        and e["status"] == "Ready"
        and mine.get("parameters")
        and (e.get("metadata") or {}).get("parameters") == mine["parameters"]
        and works({}, e)
    ]
    if same:
        best = max(same, key=lambda e: e["size_bytes"])
        kind = (best.get("metadata") or {}).get("quantization") or "smaller"
        found.append(f"{style['model'].format(best['id'])} ({kind}, {mb(best['size_bytes'])}) fits")
    others = [d for d in devices if d["backend"] == device["backend"] and d["id"] != device["id"] and d.get("memory_free_bytes")]
    roomy = next((d for d in others if works({}, model, d)), None)
    if roomy:
        found.append(f"{style['device'].format(roomy['device'])} ({roomy['name']}) has room")
    if elsewhere:
        found.append(f"--node {elsewhere[0]} has room")
    return found or ["stop another worker (rbee-ctl worker list), or use a smaller model or quantisation"]
