"""``python -m bench``: measure, keep the results in docs/benchmarks.json, write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from bench import build_cases, ctl_cases, engine_cases, fleet_cases, queen_cases
from bench.engine_cases import Run
from bench.results import Results
from rbee_ctl import demo_model
from rbee_serve.worker.engine.libs import cpu_limit

CASES = engine_cases.CASES | queen_cases.CASES | ctl_cases.CASES | fleet_cases.CASES | build_cases.CASES


def main() -> int:
    """Return 0 when every case could be measured; a missed goal is a figure, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", metavar="CASE", help="cases whose name begins so; may be repeated")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of each case (3)")
    parser.add_argument("--quick", action="store_true", help="one short round; writes no page")
    parser.add_argument("--backend", default="cpu", choices=["cpu", "cuda", "rocm", "vulkan"], help="where the weights are")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    args = parser.parse_args()
    chosen = [n for n in CASES if not args.only or any(n.startswith(o) for o in args.only)]
    if args.list or not chosen:
        for name, case in CASES.items():
            sys.stdout.write(f"{name:16} {(case.__doc__ or '').strip()}\n")
        return 0 if args.list else 2
    cache = demo_model.default_cache()
    results = Results(cache, quick=args.quick, backend=args.backend)
    rounds = args.rounds or (1 if args.quick else 3)
    run = Run(cache, results, rounds, args.quick, cpu_limit(), args.backend)
    failed = []
    for name in chosen:
        began = time.monotonic()
        print(f"{name}: {(CASES[name].__doc__ or '').strip()}", flush=True)
        try:
            CASES[name](run)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
        if not args.quick:
            results.page_path.write_text(results.page(list(CASES)), encoding="utf-8")
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
