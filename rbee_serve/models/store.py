"""The catalog of a machine's models: references, ``metadata.yaml`` beside the files, look-up. Standard library only.

The same file runs in two places, so that there is one reader and one writer of the format: here, and on the nodes as
``module_utils/rbee_store.py`` of the role rbee_hive (a link to this file), under the system's Python without packages.

``<models_dir>/<org>/<repo>/metadata.yaml`` holds ``{"models": [entry, ...]}``, written as JSON, which every YAML reader
takes and the standard library can read; a hand-written YAML file is read with PyYAML where there is one. An entry
(SPEC 3.6)::

    {"id": str, "reference": "hf:org/repo:file" | "file:///path", "provider": "hf" | "file", "name": str,
     "path": str, "size_bytes": int, "added_at": ISO-8601, "status": "Ready" | "Downloading" | "Failed",
     "sha256": str | None, "metadata": {"architecture", "parameters", "quantization", "source_url", ...}}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

READY, DOWNLOADING, FAILED = "Ready", "Downloading", "Failed"
METADATA = "metadata.yaml"
PARTIAL_SUFFIX = ".partial"

Entry = dict[str, Any]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(rf"hf:(?P<org>{_PART})/(?P<repo>{_PART})(?::(?P<file>[A-Za-z0-9][A-Za-z0-9._/+-]{{0,255}}))?")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_QUANT = re.compile(r"(?i)(?:^|[-._])((?:I?Q[0-9]|F16|F32|BF16|TQ[0-9]|MXFP4)[A-Z0-9_]*)$")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")


class CatalogError(Exception):
    """What is wrong in words; ``code`` is one of rbee_serve.contract.errors."""

    def __init__(self, code: str, message: str, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.details = code, message, hint, details


class ModelRef:
    """A parsed reference. ``kind`` is ``hf`` (org, repo, file or None), ``file`` (path) or ``id`` (text)."""

    def __init__(self, text: str, kind: str, org: str = "", repo: str = "", file: str | None = None, path: str = "") -> None:
        self.text, self.kind, self.org, self.repo, self.file, self.path = text, kind, org, repo, file, path

    @property
    def repo_id(self) -> str:
        """``org/repo`` as the hub names it."""
        return f"{self.org}/{self.repo}"


def parse_ref(text: str) -> ModelRef:
    """Parse ``hf:org/repo[:file or quantisation]``, ``file:///path.gguf`` or a catalog id.

    Raises CatalogError INVALID_MODEL_REF for anything else: also for names that could leave the models directory.
    """
    if text.startswith("file://"):
        path = text[len("file://") :]
        if path.startswith("/") and path.endswith(".gguf") and ".." not in Path(path).parts and "\0" not in path:
            return ModelRef(text, "file", path=path)
    elif match := _HUB.fullmatch(text):
        file = match["file"]
        parts = [match["org"], match["repo"], *(file.split("/") if file else [])]
        if not any(p in ("", ".") or ".." in p for p in parts):
            return ModelRef(text, "hf", match["org"], match["repo"], file)
    elif _ID.fullmatch(text) and not text.startswith("hf:"):
        return ModelRef(text, "id")
    raise CatalogError(
        "INVALID_MODEL_REF",
        f"{text!r} is not a model reference",
        "write hf:org/repo:file.gguf, hf:org/repo:Q4_K_M, file:///path/model.gguf or the id of a catalogued model",
        expected=["hf:org/repo[:file]", "file:///path.gguf", "catalog id"],
    )


def quantization(file_name: str) -> str | None:
    """Return the quantisation that a file's name ends in: ``x-Q4_K_M.gguf`` gives ``Q4_K_M``; None if it names none."""
    match = _QUANT.search(_SPLIT.sub("", file_name.rsplit("/", 1)[-1].removesuffix(".gguf")))
    return match[1].upper() if match else None


def choose_file(ref: ModelRef, names: list[str]) -> str:
    """Return the one of a repository's files that ``ref`` means: by name, by quantisation, or the only GGUF there is.

    Raises CatalogError: MODEL_NOT_FOUND (no such file), INVALID_MODEL_REF (several fit; they are listed).
    """
    ggufs = sorted(n for n in names if n.lower().endswith(".gguf") and "mmproj" not in n.lower())
    if not ggufs:
        raise CatalogError(
            "MODEL_NOT_FOUND", f"{ref.repo_id} has no GGUF file", "choose a repository whose name ends in -GGUF", files=names[:20]
        )
    if ref.file is None:
        fits = ggufs
    elif ref.file.lower().endswith(".gguf"):
        fits = [n for n in ggufs if n == ref.file] or [n for n in ggufs if n.lower() == ref.file.lower()]
    else:
        fits = [n for n in ggufs if quantization(n) == ref.file.upper()]
    if not fits:
        raise CatalogError(
            "MODEL_NOT_FOUND",
            f"{ref.repo_id} has no file {ref.file!r}; it has {', '.join(ggufs)}",
            f"for example hf:{ref.repo_id}:{ggufs[0]}",
            files=ggufs,
        )
    if len(fits) > 1:
        kinds = sorted({q for n in fits if (q := quantization(n))})
        raise CatalogError(
            "INVALID_MODEL_REF",
            f"{ref.text} could be {len(fits)} files: {', '.join(fits)}",
            f"name one of {', '.join(kinds or fits)}, for example hf:{ref.repo_id}:{(kinds or fits)[0]}",
            files=fits,
            quantizations=kinds,
        )
    if _SPLIT.search(fits[0].removesuffix(".gguf")):
        raise CatalogError(
            "INVALID_MODEL_REF",
            f"{fits[0]} is one part of a split model, which rbee does not download",
            "choose a quantisation in one file, or merge the parts with llama-gguf-split --merge and use file:///",
            files=fits,
        )
    return fits[0]


def default_id(file_name: str, taken: dict[str, str] | None = None, *, reference: str = "", org: str = "") -> str:
    """Return the id of a new model: the file's stem in lower case; with the organisation added where another reference
    has that id already (``taken``: id -> reference)."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", file_name.rsplit("/", 1)[-1].removesuffix(".gguf").lower()).strip("-.")
    if taken and taken.get(stem, reference) != reference:
        return f"{stem}-{org.lower() or 'local'}"
    return stem


def now_iso() -> str:
    """Return the time as the catalog writes it, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- files ----------------------------------------------------------------------------------------------------------


def read(models_dir: str | os.PathLike[str], yaml_python: str | None = None) -> tuple[list[Entry], list[dict[str, str]]]:
    """Return all entries, sorted by id, and the problems met: ``[{"path", "problem"}]``.

    A broken file is a problem, never an exception. An entry that says Ready while its file is not there, or Downloading
    while nobody downloads, is returned as Failed with the reason under ``problem``. ``yaml_python``: interpreter with
    PyYAML for files that are YAML but not JSON, where this one has none.
    """
    entries: list[Entry] = []
    problems: list[dict[str, str]] = []
    for path in sorted(Path(models_dir).glob(f"*/*/{METADATA}")):
        try:
            found = _load(path, yaml_python)
        except (OSError, ValueError) as e:
            problems.append({"path": str(path), "problem": str(e)})
            continue
        for number, raw in enumerate(found):
            if (problem := _check(raw)) is not None:
                problems.append({"path": str(path), "problem": f"model {number + 1}: {problem}"})
            elif any(raw["id"] == e["id"] for e in entries):
                problems.append({"path": str(path), "problem": f"model {number + 1}: id {raw['id']!r} is used twice"})
            else:
                entries.append(_now(raw))
    return sorted(entries, key=lambda e: str(e["id"])), problems


def find(entries: list[Entry], ref: ModelRef) -> Entry | None:
    """Return the entry that ``ref`` means, in whatever status; None if there is none.

    Raises CatalogError INVALID_MODEL_REF when several fit (``hf:org/repo`` with two quantisations on disk).
    """
    for entry in entries:
        if ref.text in (entry["id"], entry["reference"]):
            return entry
    if ref.kind == "file":
        return next((e for e in entries if e["path"] == ref.path), None)
    if ref.kind != "hf":
        return None
    prefix = f"hf:{ref.repo_id}:"
    mine = {e["reference"][len(prefix) :]: e for e in entries if e["reference"].startswith(prefix)}
    try:
        return mine[choose_file(ref, list(mine))] if mine else None
    except CatalogError as e:
        if e.code == "MODEL_NOT_FOUND":
            return None
        raise


def put(models_dir: str | os.PathLike[str], directory: str | os.PathLike[str], entry: Entry) -> bool:
    """Write ``entry`` into ``<directory>/metadata.yaml``, in place of one with the same id; True if that changed it.

    Raises CatalogError INVALID_MODEL_REF when the directory is not beneath ``models_dir``; OSError.
    """
    home = Path(directory)
    if len(home.relative_to(models_dir).parts) != 2:
        raise CatalogError("INVALID_MODEL_REF", f"{home} is not an org/repo directory beneath {models_dir}")
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        return _replace(home / METADATA, entry["id"], entry)


def remove(entry_id: str, directory: str | os.PathLike[str]) -> bool:
    """Take the entry out of ``<directory>/metadata.yaml``; True if it was there. Files are left alone."""
    if not (home := Path(directory)).is_dir():
        return False
    with _locked(home):
        return _replace(home / METADATA, entry_id, None)


def _replace(path: Path, entry_id: str, entry: Entry | None) -> bool:
    try:
        old = _load(path, None)
    except (OSError, ValueError):
        old = []  # missing, or broken and reported by read(): a good file takes its place
    new = [e for e in old if e.get("id") != entry_id] + ([entry] if entry else [])
    if new == old:
        return False
    if not new:
        path.unlink(missing_ok=True)
        return True
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".metadata-")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            json.dump({"models": new}, f, indent=2, ensure_ascii=False)
            f.write("\n")
            os.fchmod(f.fileno(), 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True


@contextlib.contextmanager
def _locked(directory: Path) -> Any:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _load(path: Path, yaml_python: str | None) -> list[Entry]:
    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except ValueError:
        data = _load_yaml(text, yaml_python)
    if isinstance(data, dict) and "id" in data:
        data = {"models": [data]}  # one model written by hand, without the list
    models = data.get("models") if isinstance(data, dict) else None
    if not isinstance(models, list):
        raise ValueError("neither one model nor a list under the key 'models'")
    return models


def _load_yaml(text: str, yaml_python: str | None) -> Any:
    try:
        import yaml
    except ImportError:
        if not yaml_python:
            raise ValueError("not JSON, and no PyYAML here to read other YAML") from None
        code = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout, default=str)"
        out = subprocess.run([yaml_python, "-c", code], input=text, capture_output=True, text=True, timeout=30, check=False)
        if out.returncode != 0:
            raise ValueError(f"not valid YAML: {(out.stderr.strip().splitlines() or ['?'])[-1]}") from None
        return json.loads(out.stdout)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"not valid YAML: {' '.join(str(e).split())}") from e


def _check(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"not a mapping but {type(entry).__name__}"
    for key in ("id", "reference", "path", "status"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            return f"{key} is missing or no text"
    if not isinstance(entry.get("size_bytes"), int) or entry["size_bytes"] < 0:
        return "size_bytes is missing or no number of bytes"
    if entry["status"] not in (READY, DOWNLOADING, FAILED):
        return f"status is {entry['status']!r}, expected {READY}, {DOWNLOADING} or {FAILED}"
    return None


def _now(entry: Entry) -> Entry:
    """Compare what the entry says with what is on disk."""
    path = Path(entry["path"])
    if entry["status"] == READY:
        try:
            size = path.stat().st_size
        except OSError as e:
            return {**entry, "status": FAILED, "problem": f"{path}: {e.strerror}"}
        if size != entry["size_bytes"]:
            return {**entry, "status": FAILED, "problem": f"{path} has {size} bytes, the catalog says {entry['size_bytes']}"}
    if entry["status"] == DOWNLOADING and not in_use(partial_path(path)):
        return {**entry, "status": FAILED, "problem": "the download was interrupted; repeat it and it goes on where it stopped"}
    return entry


def partial_path(path: Path) -> Path:
    """Return where the bytes of ``path`` are collected; a downloader holds a lock on that file while it lives."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def in_use(path: Path) -> bool:
    """Return whether another process holds the lock on ``path``."""
    try:
        with path.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
