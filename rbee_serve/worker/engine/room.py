"""Is there room for this model? Asked of its header before llama.cpp loads it, also where no preflight has looked: a worker
that its socket wakes, a hive that starts (SPEC S-34, S-37). Standard library alone; well under a millisecond.

Refused is only what can not fit by the model's own figures: weights, KV cache and compute buffers. What the processes take is
there already when this is asked. A model whose header does not tell enough is loaded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rbee_serve.contract.errors import InsufficientRam, InsufficientVram
from rbee_serve.models import gguf, memory, ram
from rbee_serve.worker.engine.model_file import other_parts, read_header

if TYPE_CHECKING:
    from rbee_serve.worker.engine.protocol import EngineConfig

_HINT = (
    'fewer slots, a smaller context_tokens or kv_type = "q8_0" take less; or stop another worker: rbee-ctl worker list; '
    "with memory_check = false it is loaded all the same"
)


def headers_of(first: gguf.Header, path: str) -> list[gguf.Header]:
    """Return the headers of all parts of a model; parts that are not there are llama.cpp's to complain of."""
    return [first, *(read_header(p) for p in other_parts(Path(path), first) if p.is_file())]


def check(config: EngineConfig, header: gguf.Header) -> None:
    """Raise InsufficientRam when the machine, or the unit's MemoryMax=, has less than loading takes."""
    needed = _needed(config, header)
    if needed is None or not config.memory_check:
        return
    parts, facts = needed
    take = memory.host_need(facts, {**_settings(config)}) - memory.PROCESS_BYTES if config.backend != "cpu" else _sum(parts)
    free = ram.room(config.model_path)
    if free < take:
        raise InsufficientRam(_words(take, free, "memory", parts, config), hint=_HINT, required_bytes=take, available_bytes=free)


def check_device(config: EngineConfig, header: gguf.Header, name: str, free: int) -> None:
    """Raise InsufficientVram when the device ``name`` has less than ``free`` bytes; 0: its driver does not tell."""
    needed = _needed(config, header)
    if needed is None or not free or not config.memory_check:
        return
    take = _sum(needed[0])
    if free < take:
        words = _words(take, free, f"memory of {name}", needed[0], config)
        raise InsufficientVram(words, hint=_HINT, required_bytes=take, available_bytes=free)


def _settings(config: EngineConfig) -> dict[str, object]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in memory.DEFAULTS}


def _needed(config: EngineConfig, header: gguf.Header) -> tuple[dict[str, int], memory.Facts] | None:
    facts = gguf.facts_of(headers_of(header, config.model_path))
    parts = memory.need(facts, _settings(config), on_device=config.backend != "cpu")
    return None if parts is None else (parts, facts)


def _sum(parts: dict[str, int]) -> int:
    return parts["total"] - parts["process"]


def _words(take: int, free: int, what: str, parts: dict[str, int], config: EngineConfig) -> str:
    figures = ", ".join(f"{name} {parts[key] / 1e6:.0f} MB" for name, key in (("weights", "weights"), ("KV cache", "kv")))
    return (
        f"out of memory, nothing was loaded: the model needs {take / 1e6:.0f} MB of {what} "
        f"({figures} for {config.slots} slots x {config.context_tokens} tokens), {free / 1e6:.0f} MB are available"
    )
