"""What was measured: rows kept as docs/benchmarks.json after every case, and docs/benchmarks.md made from them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.notes import NOTES

ROOT = Path(__file__).parents[1]


@dataclass
class Row:
    """One line of the table. ``ours`` and ``peer``: one value a round; the goal is on the ratio of medians, or on ours."""

    key: str
    what: str
    unit: str
    ours: list[float]
    goal: float | None = None
    at_least: bool = False  # else: at most
    peer: list[float] = field(default_factory=list)
    peer_name: str = ""
    at: str = ""
    machine: str = ""  # its CPU: rows of one page may come from several machines

    @property
    def value(self) -> float:
        """What the goal is about."""
        ours = statistics.median(self.ours)
        return ours / statistics.median(self.peer) if self.peer else ours

    @property
    def hit(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


class Results:
    """The rows measured so far, newest value of each case; kept on disk after each one, so that an interrupted run loses none."""

    def __init__(self, cache: Path, *, quick: bool, backend: str = "cpu", docs: Path = ROOT / "docs") -> None:
        device = "" if backend == "cpu" else f"-{backend}"  # figures of a GPU are kept, and shown, apart
        self.page_path = docs / f"benchmarks{device}.md"
        # In the tree, beside the page: a case measured again elsewhere must not take the others from it.
        self._path = cache / "bench" / f"quick{device}.json" if quick else self.page_path.with_suffix(".json")
        self._data: dict[str, Any] = {"rows": {}}
        if self._path.is_file():
            self._data = json.loads(self._path.read_text())
        self._data["environment"] = environment()

    def add(self, row: Row) -> None:
        """Take a row, keep it, show it."""
        row.machine = self._data["environment"]["CPU"].split(",")[0]
        row.at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
        self._data["rows"][row.key] = asdict(row)
        part = self._path.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(self._data, indent=1) + "\n")
        part.replace(self._path)
        print("  " + " | ".join(_cells(row)[:6]), flush=True)

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [Row(**values) for values in self._data["rows"].values()]

    def page(self, order: list[str]) -> str:
        """Return docs/benchmarks.md; ``order``: prefixes of keys as the cases declare them."""
        rank = {name: i for i, name in enumerate(order)}
        rows = sorted(self.rows, key=lambda r: rank.get(r.key.split("/")[0], 99))
        lines = [_HEAD.strip(), "", "## Machine and versions of the newest row", ""]
        lines += [f"- {k}: {v}" for k, v in self._data["environment"].items()]
        for title, mine in (("Engine and worker", None), ("Queen", "queen"), ("rbee-ctl", "ctl"), ("Fleet", "fleet")):
            part = [
                r for r in rows if (r.key.partition("-")[0] if r.key.startswith(("queen-", "ctl-", "fleet-")) else None) == mine
            ]
            if not part:
                continue
            lines += ["", f"## {title}", "", "| case | ours | peer | ratio | goal | reached | measured (UTC), on |"]
            lines += ["|---|---|---|---|---|---|---|"]
            lines += ["| " + " | ".join(_cells(row)) + " |" for row in part]
        missed = [r for r in rows if r.hit is False]
        if missed:
            lines += ["", "## Why a goal was missed", ""]
            lines += [f"- **{r.what}**: {NOTES.get(r.key, 'not yet explained')}" for r in missed]
        return "\n".join(lines) + "\n" + _TAIL


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spread(values: list[float], unit: str) -> str:
    if not values:
        return ""
    text = f"{_number(statistics.median(values))} {unit}"
    return text + (f" ({_number(min(values))}–{_number(max(values))})" if len(values) > 1 else "")


def _cells(row: Row) -> list[str]:
    peer = f"{_spread(row.peer, row.unit)} {row.peer_name}" if row.peer else ""
    ratio = f"{row.value:.3g} x" if row.peer else ""
    goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g} {'x' if row.peer else row.unit}"
    reached = {None: "", True: "yes", False: "**no**"}[row.hit]
    return [row.what, _spread(row.ours, row.unit), peer, ratio, goal, reached, ", ".join(filter(None, (row.at, row.machine)))]


def environment() -> dict[str, str]:
    """Return machine and versions for the page."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    packages = ("llama-cpp-python", "starlette", "uvicorn", "numpy")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    gpu = subprocess.run(
        ["sh", "-c", "nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "CPU": f"{cpu or platform.machine()}, {len(os.sched_getaffinity(0))} CPUs usable, {memory:.0f} GiB",
        "GPU": gpu.stdout.strip() or "none",
        "system": f"{platform.freedesktop_os_release().get('PRETTY_NAME', '')}, Linux {platform.release()}, "
        f"Python {platform.python_version()}",
        "versions": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages),
        "load when it began (1 min)": f"{os.getloadavg()[0]:.2f}",
        "commit": commit.stdout.strip() or "unknown",
    }


_HEAD = """
# Benchmarks

<!-- written by `make bench`: do not edit -->

Whole processes on one machine, servers taking turns within one session (interleaved rounds), the same GGUF file, the same
number of compute threads, greedy, end-of-text ignored, 64-token prompts of random words and 128 tokens of answer unless a
case says otherwise. One asyncio client for all servers. Figures are medians over the rounds, in brackets smallest and
largest. The ratio is of the medians; goals with `x` are about it. llama-server is llama.cpp's own server, built from the
source that the llama-cpp-python wheel vendors, for the same instruction set.

The worker guesses what a text may go on with (`draft_tokens`, architecture.md); llama-server, with its own defaults, does not.
These small models, asked to go on with random words, soon repeat themselves, so guesses are nearly always right here: what a
text without repetition gets are the rows "no guesses".
"""

_TAIL = """
## Commands

```
make bench                              # all cases, about 15 minutes on 2 cores
make bench ARGS="--quick"               # one short round of each: whether it works, not how fast; writes no page
make bench ARGS="--only shared"         # the cases whose names begin so
make bench ARGS="--rounds 5"            # more rounds
make bench ARGS="--list"                # the cases
```

Every case that ends is kept (docs/benchmarks.json) and this page is written again, so an interrupted run
loses nothing and single cases can be repeated. On a machine with a GPU give `ARGS="--backend cuda"`: the workers then
hold the weights there, with a CUDA build of llama-cpp-python in the environment, llama-server is built for it too, and the
page is docs/benchmarks-cuda.md.
"""
