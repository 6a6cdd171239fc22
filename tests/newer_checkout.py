"""Another version of rbee to upgrade to: a checkout that differs in its version alone. ``newer_checkout.py FOLDER`` makes one.

The same checkout always gives the same version, so that its wheels are built once for all tests that upgrade.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the wheel is made of (pyproject.toml).
PARTS = ("rbee_serve", "rbee_ctl", "roles", "playbooks", "systemd", "requirements", "inventory")
FILES = ("pyproject.toml", "README.md", "LICENSE", "site.yml", "ansible.cfg")
VERSION, NEWER = "0.1.0", "0.1.99"


def newer_checkout(folder: Path) -> Path:
    """Make ``folder``, which must not exist, a checkout of version ``NEWER``."""
    folder.mkdir(parents=True)
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, folder / file)
    for file in ("pyproject.toml", "rbee_serve/__init__.py"):
        text = (folder / file).read_text(encoding="utf-8")
        changed = text.replace(f'"{VERSION}"', f'"{NEWER}"', 1)
        if changed == text:
            raise SystemExit(f"{file}: no version {VERSION}: say the present one in {__file__}")
        (folder / file).write_text(changed, encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(newer_checkout(Path(sys.argv[1])))
