"""Write the pages that are generated from the code; with ``--check`` only say which are out of date (exit 1)."""

from __future__ import annotations

import sys
from pathlib import Path

from rbee_serve.contract import errors
from rbee_serve.contract.settings import QueenSettings, Settings, WorkerSettings, describe

ROOT = Path(__file__).resolve().parent.parent


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells) + "\n"


def settings_page() -> str:
    """Every setting of queen and worker with default and meaning."""
    parts = [
        "# Settings\n\nGenerated from `rbee_serve/contract/settings.py` by `make docs`.\n\n"
        "A file is flat TOML; an environment variable `RBEE_<NAME>` overrides it. Unknown keys are refused by name.\n"
        "Check a file before it is used: `rbee-worker --config FILE --check-config`, `rbee-queen --config FILE --check-config`.\n"
    ]
    shared = set(Settings.model_fields)
    for title, cls in (
        ("Worker: `/etc/rbee/workers/NAME.toml`", WorkerSettings),
        ("Queen: `/etc/rbee/queen.toml`", QueenSettings),
    ):
        rows = sorted(describe(cls), key=lambda r: (r["name"] in shared, r["default"] != "required"))
        body = [[f"`{r['name']}`", f"`{r['default']}`", r["description"]] for r in rows]
        parts.append(f"\n## {title}\n\n" + table(["setting", "default", "meaning"], body))
    return "".join(parts)


def errors_page() -> str:
    """Every error code with HTTP status, exit code and meaning, and the exit codes."""
    rows = [
        [
            f"`{code}`",
            str(cls.status),
            str(int(cls.exit_code)),
            "yes" if cls.retryable else "no",
            (cls.__doc__ or "").split("\n")[0],
        ]
        for code, cls in sorted(errors.BY_CODE.items(), key=lambda kv: (kv[1].status, kv[0]))
    ]
    exits = [[str(int(e)), e.name.lower()] for e in errors.ExitCode]
    return (
        "# Errors and exit codes\n\nGenerated from `rbee_serve/contract/errors.py` by `make docs`.\n\n"
        "Every error on the wire has one shape; `correlation_id` is also in the `X-Correlation-ID` header and in the logs of\n"
        "queen and worker:\n\n```json\n"
        '{"error": {"code": "MODEL_NOT_FOUND", "message": "...", "details": {}, "hint": "...", "correlation_id": "..."}}\n'
        "```\n\nOn the OpenAI routes the same error comes in OpenAI's shape (`message`, `type`, `code`, `param`).\n\n"
        + table(["code", "HTTP", "exit code", "retry may help", "when"], rows)
        + "\n## Exit codes\n\n"
        + table(["exit code", "meaning"], exits)
        + "\n`hive status` answers 0 when the hive runs, 3 when it is stopped and 4 when the machine can not be reached.\n"
    )


def pages() -> dict[Path, str]:
    """Return path -> text of each generated page."""
    return {ROOT / "docs/settings.md": settings_page(), ROOT / "docs/errors.md": errors_page()}


def main() -> int:
    """Write or check; return the exit code."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; next: make docs", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
