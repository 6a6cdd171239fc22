"""What the settings will most likely tell the engine, said 0.1 s before pydantic has been imported to read them.

Only a guess: the worker reads its settings as ever, and an engine that was told anything else than they say is ended and begun
anew (main.py); before they are read it loads weights and does nothing else. So this may give up on whatever is unusual, and must
do so where a value might do harm that the settings would refuse.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Defaults of contract.settings.WorkerSettings, of what the engine needs and with the least and most that is guessed for.
_NUMBERS: dict[str, tuple[float, float, float]] = {
    "slots": (4, 1, 64),
    "context_tokens": (4096, 64, 1_048_576),
    "threads": (0, 0, 512),
    "prompt_block_tokens": (128, 32, 4096),
    "stream_gap_s": (0.14, 0.001, 86400),
    "draft_tokens": (7, 0, 15),
    "prefix_store_max_bytes": (1 << 30, 1 << 20, 1 << 60),
}
_SWITCHES = {"deterministic": False, "memory_check": True}
_OTHERS = ("backend", "device", "model_path", "model_sha256", "kv_type", "cpu_variant", "lora", "prefix_store_dir", "name")


def configuration(arguments: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the fields of protocol.EngineConfig for ``--config FILE``; None where they can not be told without the settings.

    CPU alone: a GPU's engine begins when it is known for certain which device it may touch.
    """
    overridden = {f"RBEE_{name.upper()}" for name in (*_NUMBERS, *_SWITCHES, *_OTHERS)}
    if len(arguments) != 2 or arguments[0] != "--config" or overridden & environ.keys():
        return None
    try:
        return _guess(tomllib.loads(Path(arguments[1]).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _guess(values: Mapping[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for name, (usual, least, most) in _NUMBERS.items():
        value = values.get(name, usual)
        if type(value) is not type(usual) or not least <= value <= most:
            return None
        found[name] = value
    for name, switch in _SWITCHES.items():
        found[name] = values.get(name, switch)
        if type(found[name]) is not bool:
            return None
    path, kv_type, store = values.get("model_path"), values.get("kv_type", "f16"), values.get("prefix_store_dir")
    texts = [values.get(name, "") for name in ("model_path", "model_sha256", "cpu_variant", "prefix_store_dir", "name")]
    usual_kind = values.get("backend", "cpu") == "cpu" and values.get("device", 0) == 0 and kv_type in ("f16", "q8_0")
    if not path or not usual_kind or "lora" in values or not all(isinstance(text, str) for text in texts):
        return None
    name = str(values.get("name", ""))
    return found | {
        "model_path": str(Path(path)),
        "model_sha256": values.get("model_sha256"),
        "backend": "cpu",
        "device": 0,
        "kv_type": "q8_0" if found["deterministic"] else kv_type,
        "cpu_variant": values.get("cpu_variant"),
        "lora": [],
        "prefix_store_dir": str(Path(store) / name) if store else None,
    }
