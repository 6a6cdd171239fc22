"""What goes into a bundle and where it goes from there: wheels, and models of the inventory, of the hub, of the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rbee_ctl import content
from rbee_ctl.bundle import Contents, Source, models_of
from rbee_ctl.inventory import Inventory
from rbee_serve import process_tree
from rbee_serve.contract.errors import BY_CODE, BundleInvalid, ChecksumMismatch, DownloadFailed, InvalidRequest, MissingDependency
from rbee_serve.contract.split_models import set_of

Say = Callable[[str, str], None]

NODES = "nodes/wheels.tar"
#: Seconds that a builder has to end in order.
_GRACE_S = 3.0


@dataclass(frozen=True)
class Model:
    """A model on this machine. ``sha256`` is the model's: of a split one the digest of its parts' digests."""

    id: str
    reference: str
    sha256: str
    files: tuple[Path, ...]

    @property
    def folder(self) -> str:
        """Its place below ``models/``, in a bundle and in the cache."""
        return self.sha256[:16]


def cache() -> Path:
    """Return ``$RBEE_CACHE``, else ``~/.cache/rbee``: where the roles look too."""
    return Path(os.environ.get("RBEE_CACHE") or Path(os.environ.get("HOME") or Path.home()) / ".cache/rbee")


# --- wheels ---------------------------------------------------------------------------------------------------------


def wheelhouse(*arguments: str) -> dict[str, Any]:
    """Run the role's builder; returns what it says of the wheels. Raises MissingDependency."""
    script = content.root() / "roles/rbee_wheels/files/build_wheelhouse.py"
    command = [sys.executable, str(script), f"--source={content.root()}", f"--cache={cache()}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0:
        tail = "\n".join((err or out).strip().splitlines()[-6:])
        raise MissingDependency(f"the wheels can not be made: {tail}", hint="make the bundle on a machine with internet and gcc")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    """End a builder with pip and the compilers below it, which would go on for minutes: with time to take its scratch away."""
    below = process_tree.descendants(process.pid)
    process.send_signal(signal.SIGINT)
    process_tree.kill(below, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    below += process_tree.descendants(process.pid)
    process.kill()
    process_tree.kill(below)


def misfit(contents: Contents, here: dict[str, Any]) -> str | None:
    """Return why the bundle's wheels are not for the rbee-ctl that runs here; None if they are."""
    wheels = contents.facts["wheels"]
    for what in ("rbee_version", "python", "machine", "build"):
        if wheels[what] != here[what]:
            return f"its {what} is {wheels[what]}, here it is {here[what]}"
    if wheels["sources"] != here["sources"]:
        return f"it was made by another rbee {here['rbee_version']}: the sources differ"
    return None


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubSettings:
    """How this fleet asks its hub: flags of rbee_serve.models.download, and the token, which goes by a pipe."""

    flags: tuple[str, ...] = ()
    token: str | None = None

    @classmethod
    def of(cls, inventory: Inventory | None) -> HubSettings:
        """Return what the inventory says of the hub (``rbee_hub_*``), that of the first hive that says it.

        A token that a vault, a template or group_vars hold is not read here: rbee_hub_token_file, or HF_TOKEN, is what there
        is then.
        """
        said: dict[str, str] = {}
        for host in inventory.hives if inventory is not None else ():
            for key, value in host.variables.items():
                if key.startswith("rbee_hub_") and value is not None and "{{" not in str(value):
                    said.setdefault(key.removeprefix("rbee_hub_"), str(value))
        token = said.pop("token", "") or os.environ.get("HF_TOKEN", "")
        if not token and (file := said.get("token_file")) and Path(file).expanduser().is_file():
            token = Path(file).expanduser().read_text(encoding="utf-8").strip()
        known = ("endpoint", "tries", "pause_s", "stall_timeout_s", "bytes_per_s")
        return cls(tuple(f"--{k.replace('_', '-')}={said[k]}" for k in known if k in said), token or None)


def declared(inventory: Inventory, say: Say) -> list[Model]:
    """Return the models that the inventory declares, fetched where they are not here; raises RbeeError."""
    wanted: dict[str, dict[str, Any]] = {}
    for host in inventory.hives:
        for entry in host.variables.get("rbee_models") or []:
            wanted.setdefault(str(entry["id"]), entry)
    hub = HubSettings.of(inventory)
    return [_declared(entry, say, hub) for _, entry in sorted(wanted.items())]


def _declared(entry: dict[str, Any], say: Say, hub: HubSettings) -> Model:
    sha256, reference = entry.get("sha256"), str(entry["reference"])
    files: tuple[Path, ...] = ()
    if entry.get("src") and (src := Path(str(entry["src"])).expanduser()).is_file():
        files = whole_set(src)
    elif sha256:
        files = tuple(sorted((cache() / "models" / str(sha256)[:16]).glob("*.gguf")))
    if files:
        got = digest_of(files)
        if sha256 and got != sha256:
            words = f"SHA-256 of {files[0]} is {got}, the inventory says {sha256}"
            raise ChecksumMismatch(words, hint=f"correct sha256 of {entry['id']} in rbee_models, or bring the file again")
        return Model(str(entry["id"]), reference, got, files)
    if not reference.startswith(("hf:", "https:")):
        raise InvalidRequest(
            f"{entry['id']}: {entry.get('src')} is not here, and {reference} can not be fetched", hint="give src"
        )
    return fetched(reference, say, hub, model_id=str(entry["id"]), sha256=sha256)


def whole_set(path: Path) -> tuple[Path, ...]:
    """Return all parts of the split model that the file belongs to, or the file alone; raises InvalidRequest."""
    parts = tuple(path.with_name(name) for name in set_of(path.name))
    if len(parts) > 1 and (lacking := [p.name for p in parts if not p.is_file()]):
        raise InvalidRequest(f"{path} is part of a split model; not beside it: {', '.join(lacking)}", hint="bring all parts")
    return parts


def fetched(reference: str, say: Say, hub: HubSettings, *, model_id: str | None = None, sha256: str | None = None) -> Model:
    """Return a model that was fetched from the hub into the cache; raises RbeeError."""
    environ = {k: v for k, v in os.environ.items() if k not in ("CREDENTIALS_DIRECTORY", "HF_TOKEN")}
    with tempfile.TemporaryDirectory(prefix="rbee-fetch-") as folder:
        progress = Path(folder, "progress.jsonl")
        command = [sys.executable, "-m", "rbee_serve.models.download", f"--ref={reference}", f"--models-dir={cache() / 'hub'}"]
        command += [f"--progress-file={progress}", "--token-stdin", *hub.flags, *([f"--sha256={sha256}"] if sha256 else [])]
        null = subprocess.DEVNULL
        with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=null, stderr=null) as process:
            try:
                with contextlib.suppress(BrokenPipeError), process.stdin or contextlib.nullcontext() as pipe:
                    if pipe:
                        pipe.write((hub.token or "").encode())
                last = _follow(process, progress, say)
            finally:
                process.terminate()  # of one that has ended it does nothing; what has come is kept
    if last.get("stage") != "complete":
        message = str(last.get("message") or f"the download of {reference} ended with exit code {process.returncode}")
        details = {k: v for k, v in (last.get("details") or {}).items() if k not in ("hint", "message")}
        raise BY_CODE.get(str(last.get("code")), DownloadFailed)(message, hint=last.get("hint"), **details)
    model = last["model"]
    files = tuple(Path(f["path"]) for f in model.get("files") or [model])
    return Model(model_id or str(model["id"]), str(model["reference"]), str(model["sha256"]), files)


def _follow(process: subprocess.Popen[bytes], progress: Path, say: Say) -> dict[str, Any]:
    seen, last = 0, {}
    while True:
        over = process.poll() is not None
        lines = progress.read_text(encoding="utf-8").split("\n")[:-1] if progress.is_file() else []
        for text in lines[seen:]:
            last = json.loads(text)
            if last["stage"] != "failed":
                say("download", str(last["human"]))
        seen = len(lines)
        if over:
            return last
        time.sleep(0.1)


def digest_of(files: tuple[Path, ...]) -> str:
    """Return the digest of a model, of one file or of parts."""
    digests = []
    for path in files:
        with path.open("rb") as f:
            digests.append(hashlib.file_digest(f, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def sources_of(models: list[Model]) -> tuple[list[Source], list[dict[str, Any]]]:
    """Return the files of models as they go into a bundle, and what the manifest says of each."""
    sources: dict[str, Source] = {}
    said = []
    for model in models:
        names = [f"models/{model.folder}/{path.name}" for path in model.files]
        sources |= {name: Source(name, path) for name, path in zip(names, model.files, strict=True)}
        said.append({"id": model.id, "reference": model.reference, "sha256": model.sha256, "files": names})
    return list(sources.values()), said


# --- where it goes --------------------------------------------------------------------------------------------------


def lay_out(contents: Contents, unpacked: Path, here: dict[str, Any]) -> list[str]:
    """Move what was unpacked to where site.yml looks for it; returns what is new. Raises OSError, BundleInvalid."""
    done = []
    archive = Path(here["archive"])
    if not archive.is_file():
        archive.parent.mkdir(parents=True, exist_ok=True)
        (unpacked / NODES).replace(archive)
        done.append(str(archive))
    for model, names in models_of(contents):
        folder = cache() / "models" / str(model["sha256"])[:16]
        for name in names:
            target = folder / Path(name).name
            if target.is_file() and target.stat().st_size == contents.files[name][0] and not (unpacked / name).is_file():
                continue  # of two models that are one file
            if not (unpacked / name).is_file():
                raise BundleInvalid(f"{model['id']} names {name}, which is not in the bundle", hint="rbee-ctl bundle create")
            folder.mkdir(parents=True, exist_ok=True)
            if not target.is_file() or target.stat().st_size != contents.files[name][0]:
                done.append(str(target))
            (unpacked / name).replace(target)
    return done
