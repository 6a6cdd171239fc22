"""What is free on a machine: read from it, then reckoned on while workers come and go."""

from __future__ import annotations

import os

from ansible.module_utils.rbee_fit import KEYS, already_there, check_memory, demands, required_memory
from ansible.module_utils.rbee_memory import is_mapped, need
from ansible.module_utils.rbee_ram import mapped, mem_available, own_bytes


class Ledger:
    """What is free on a machine while the workers of one run are gone through in order: who leaves, who comes, who changes."""

    def __init__(self, ram, devices, shared):
        """``ram``: bytes free; ``devices``: as rbee_devices tells them; ``shared``: {path: bytes} of the mapped model files."""
        self.ram, self.shared = ram, dict(shared)
        self.devices = {d["id"]: dict(d) for d in devices}

    @classmethod
    def of_machine(cls, devices, told_bytes=None):
        """Return what is free here now; ``told_bytes`` of RAM instead where somebody says so."""
        shared = mapped()
        return cls(told_bytes or max(0, mem_available() - sum(shared.values())), devices, shared)

    def end(self, pid, name, known, entries):
        """The instance ``name`` of ``known`` ({name: settings}), whose main process is ``pid``, ends."""
        settings = known.get(name, {})
        path = settings.get("model_path")
        alone = path and all(s.get("model_path") != path for n, s in known.items() if n != name)
        model = next((e for e in entries if e["id"] == settings.get("model_id")), None)
        device = f"{settings.get('backend')}:{settings.get('device', 0)}"
        self.give_back(own_bytes(pid), model, device, settings, [path] if alone else [])

    def give_back(self, own, model=None, device_id=None, wanted=None, paths=()):
        """A worker ends. ``own``: bytes that its processes hold; ``paths``: model files that nobody else has mapped."""
        self.ram += own + sum(self.shared.pop(path, 0) for path in paths)
        device = self.devices.get(device_id)
        if model and device and device["backend"] != "cpu" and device.get("memory_free_bytes") is not None:
            device["memory_free_bytes"] += required_memory(model, wanted or {}, True)[0]

    def take(self, model, device_id, wanted, entries=(), limit=None):
        """A worker comes: raises check_memory's NodeError, or counts what it will take."""
        device, others = self.devices[device_id], list(self.devices.values())
        check_memory(model, device, max(0, self.ram), wanted, entries, (), self.shared, limit, devices=others, style=KEYS)
        rows = demands(model, device, wanted, self.ram, self.shared)
        if device["backend"] == "cpu":
            parts = need(model.get("metadata") or {}, wanted)
            self.ram -= (parts["total"] if parts else rows[0][2]) - already_there(model, self.shared)
            if parts and is_mapped(model.get("metadata") or {}):
                for f in model.get("files") or [model]:
                    self.shared[os.path.realpath(f["path"])] = f.get("size_bytes") or 0
            return
        self.ram -= rows[1][2]
        if device.get("memory_free_bytes") is not None:
            device["memory_free_bytes"] -= rows[0][2]
