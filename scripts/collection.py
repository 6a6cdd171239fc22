#!/usr/bin/env python3
"""Build the Ansible collection ``rbee.rbee`` from this tree; prints the path of the tarball: ``collection.py [OUTPUT_DIR]``.

Roles, playbooks and modules are the same files. A collection wants modules, their common code and plugins in ``plugins/``
instead of in the roles, their common code imported and filters called under its own name: that is all that differs. The wheel
of this tree travels along, because the role rbee_wheels makes the nodes' archive from it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = NAME = "rbee"
#: Folder of a role -> folder of a collection's plugins.
PLUGINS = {
    "library": "modules",
    "module_utils": "module_utils",
    "action_plugins": "action",
    "callback_plugins": "callback",
    "filter_plugins": "filter",
}
#: What is taken as it is.
TAKEN = (
    "systemd",
    "requirements",
    "playbooks",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)
#: In a collection only modules and actions are found by their short names.
_FILTER = re.compile(r"\| (rbee_\w+)")
_IMPORT = re.compile(r"\bansible\.module_utils\.(rbee_\w+)")
_JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def stage(target: Path) -> None:
    """Lay the collection out in ``target``."""
    for name in TAKEN:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_JUNK)
        else:
            shutil.copy2(source, target / name)
    for role in sorted(p for p in (ROOT / "roles").iterdir() if p.is_dir()):
        if left := [p.name for p in role.glob("*_plugins") if p.name not in PLUGINS]:
            raise SystemExit(f"{role}: a collection has no place for {', '.join(left)}: add it to PLUGINS")
        staged = target / "roles" / role.name
        shutil.copytree(role, staged, ignore=_but(*PLUGINS))
        for path in staged.rglob("*.yml"):
            path.write_text(_FILTER.sub(rf"| {NAMESPACE}.{NAME}.\1", path.read_text(encoding="utf-8")), encoding="utf-8")
        for folder, kind in PLUGINS.items():
            if (role / folder).is_dir() and not (role / folder).is_symlink():
                _plugins(role / folder, target / "plugins" / kind)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    (target / "galaxy.yml").write_text(
        f"namespace: {NAMESPACE}\nname: {NAME}\nversion: {version}\nreadme: README.md\nauthors: [rbee]\n"
        "description: Several Linux machines become one private LLM service\nlicense_file: LICENSE\n",
        encoding="utf-8",
    )
    (target / "meta").mkdir()
    (target / "meta/runtime.yml").write_text('---\nrequires_ansible: ">=2.19.0"\n', encoding="utf-8")


def _but(*names: str) -> Callable[[str, list[str]], set[str]]:
    return lambda _, found: {n for n in found if n in names or n == "__pycache__" or n.startswith(".")}


def _plugins(source: Path, target: Path) -> None:
    """Copy plugins with the names that they have in a collection; links become files."""
    target.mkdir(parents=True, exist_ok=True)
    ours = rf"ansible_collections.{NAMESPACE}.{NAME}.plugins.module_utils.\1"
    for path in sorted(source.glob("*.py")):
        (target / path.name).write_text(_IMPORT.sub(ours, path.read_text(encoding="utf-8")), encoding="utf-8")


def build(output: Path) -> Path:
    """Return the tarball."""
    with tempfile.TemporaryDirectory(prefix="rbee-collection-") as folder:
        staged = Path(folder, NAME)
        staged.mkdir()
        stage(staged)
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(staged / "wheel"), str(ROOT)]
        subprocess.run(wheel, check=True)
        command = ["ansible-galaxy", "collection", "build", "--force", "--output-path", str(output), str(staged)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return max(output.glob(f"{NAMESPACE}-{NAME}-*.tar.gz"), key=lambda p: p.stat().st_mtime)


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
