"""What a machine can compute on. Standard library only; ``parse_*`` take a program's output, ``devices`` asks the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

#: Names that a request may use; ``metal`` is one, but no managed node is a Mac (SPEC X-24).
BACKENDS = ("cpu", "cuda", "rocm", "vulkan", "metal")
CPU_FLAGS = frozenset(["avx", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "f16c", "fma", "bmi2"])
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/opt/rocm/bin:/usr/lib/wsl/lib"
_NVIDIA_QUERY = "index,uuid,name,memory.total,memory.free,driver_version,compute_cap,temperature.gpu"


def _run(*argv):
    exe = shutil.which(argv[0], path=os.environ.get("PATH", "") + ":" + _PATH)
    if not exe:
        return ""
    try:
        done = subprocess.run([exe, *argv[1:]], capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # a driver that hangs is a driver that does not work
    return done.stdout if done.returncode == 0 else ""


def _mib(text):
    try:
        return int(float(text)) << 20
    except ValueError:
        return None  # "[N/A]" on boards whose memory is the machine's


def parse_nvidia(text):
    """Parse nvidia-smi's CSV of index, uuid, name, memory.total[, memory.free], driver_version, compute_cap[,
    temperature.gpu] (MiB and degrees Celsius, no units)."""
    found = []
    for line in text.splitlines():
        f = [x.strip() for x in line.split(",")]
        if len(f) == 6:
            f.insert(4, "")
        if len(f) == 7:
            f.append("")
        if len(f) == 8 and f[0].isdigit():
            found.append(
                {
                    "id": f"cuda:{f[0]}",
                    "backend": "cuda",
                    "device": int(f[0]),
                    "name": f[2],
                    "uuid": f[1],
                    "memory_bytes": _mib(f[3]),
                    "memory_free_bytes": _mib(f[4]),
                    "driver": f[5],
                    "compute_capability": f[6],
                    "temperature_celsius": int(f[7]) if f[7].isdigit() else None,
                }
            )
    return found


def parse_rocm(text):
    """Parse ``rocm-smi --showproductname --showmeminfo vram --json``."""
    try:
        data = json.loads(text or "{}")
    except ValueError:
        return []
    found = []
    for key, value in sorted(data.items()):
        number = key[len("card") :]
        if not key.startswith("card") or not number.isdigit() or not isinstance(value, dict):
            continue
        total, used = (str(value.get(f"VRAM Total {what}Memory (B)", "")) for what in ("", "Used "))
        total_bytes = int(total) if total.isdigit() else None
        found.append(
            {
                "id": f"rocm:{number}",
                "backend": "rocm",
                "device": int(number),
                "name": value.get("Card Series") or value.get("Card series") or "AMD GPU",
                "memory_bytes": total_bytes,
                "memory_free_bytes": total_bytes - int(used) if total_bytes is not None and used.isdigit() else None,
            }
        )
    return found


def parse_vulkan(text):
    """Parse ``vulkaninfo --summary``; software renderers are no devices."""
    names = []
    for line in text.splitlines():
        key, _, value = (x.strip() for x in line.partition("="))
        if key == "deviceName" and not value.lower().startswith("llvmpipe"):
            names.append(value)
    return [
        {"id": f"vulkan:{i}", "backend": "vulkan", "device": i, "name": n, "memory_bytes": None, "memory_free_bytes": None}
        for i, n in enumerate(names)
    ]


def parse_cpu(cpuinfo, meminfo, cores):
    """Build the one CPU device from /proc/cpuinfo and /proc/meminfo."""
    fields = {}
    for line in cpuinfo.splitlines():
        key, _, value = (x.strip() for x in line.partition(":"))
        fields.setdefault(key, value)
    memory = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in meminfo.splitlines() if row.endswith("kB")}
    return {
        "id": "cpu:0",
        "backend": "cpu",
        "device": 0,
        "name": fields.get("model name", os.uname().machine),
        "cores": cores,
        "memory_bytes": memory.get("MemTotal"),
        "memory_free_bytes": memory.get("MemAvailable"),
        "flags": sorted(CPU_FLAGS & set(fields.get("flags", "").split())),
    }


def devices():
    """Return all devices of this machine, accelerators first."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    cpu = parse_cpu(cpuinfo, Path("/proc/meminfo").read_text(encoding="ascii"), len(os.sched_getaffinity(0)))
    return [
        *parse_nvidia(_run("nvidia-smi", f"--query-gpu={_NVIDIA_QUERY}", "--format=csv,noheader,nounits")),
        *parse_rocm(_run("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")),
        *parse_vulkan(_run("vulkaninfo", "--summary")),
        cpu,
    ]
