"""The catalog of a machine's models: references, ``metadata.yaml`` beside the files, look-up. Standard library only.

The same file runs in two places, so that there is one reader and one writer of the format: here, and on the nodes as
``module_utils/rbee_store.py`` of the role rbee_hive (a link to this file), under the system's Python without packages.

``<models_dir>/<org>/<repo>/metadata.yaml`` holds ``{"models": [entry, ...]}``, written as JSON, which every YAML reader
takes and the standard library can read; a hand-written YAML file is read with PyYAML where there is one. An entry
(SPEC 3.6)::

    {"id": str, "reference": "hf:org/repo:file" | "file:///path", "provider": "hf" | "file", "name": str,
     "path": str, "size_bytes": int, "added_at": ISO-8601, "status": "Ready" | "Downloading" | "Failed",
     "sha256": str | None, "metadata": {"architecture", "parameters", "quantization", "source_url", ...}}

A split model is one entry: ``path`` is its first part, which is what llama.cpp is given, ``files`` lists all parts as
``{"path", "size_bytes", "sha256"}``, ``size_bytes`` is their sum and ``sha256`` the digest of their digests.

A ``metadata.yaml`` that can not be read is set aside as ``metadata.yaml.corrupt`` (SPEC E-06) and reported until
somebody mends or removes it; the files beside it are never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
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
CORRUPT = METADATA + ".corrupt"
PARTIAL_SUFFIX = ".partial"

Entry = dict[str, Any]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(rf"hf:(?P<org>{_PART})/(?P<repo>{_PART})(?::(?P<file>[A-Za-z0-9][A-Za-z0-9._/+-]{{0,255}}))?")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_QUANT = re.compile(r"(?i)(?:^|[-._])((?:I?Q[0-9]|F16|F32|BF16|TQ[0-9]|MXFP4)[A-Z0-9_]*)$")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_URL_PATH = re.compile(r"[A-Za-z0-9._~/%+=&?-]*?[A-Za-z0-9._-]+\.gguf(\?[A-Za-z0-9._~/%+=&-]*)?")


class CatalogError(Exception):
    """What is wrong in words; ``code`` is one of rbee_serve.contract.errors."""

    def __init__(self, code: str, message: str, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.details = code, message, hint, details


class _NotReadableHereError(ValueError):
    """Nothing is known to be wrong with the file: this interpreter can not read YAML."""


class ModelRef:
    """A parsed reference. ``kind`` is ``hf`` (org, repo, file or None), ``https`` (path: the address without the digest,
    file: the digest), ``file`` (path) or ``id`` (text)."""

    def __init__(self, text: str, kind: str, org: str = "", repo: str = "", file: str | None = None, path: str = "") -> None:
        self.text, self.kind, self.org, self.repo, self.file, self.path = text, kind, org, repo, file, path

    @property
    def repo_id(self) -> str:
        """``org/repo`` as the hub names it."""
        return f"{self.org}/{self.repo}"


def parse_ref(text: str) -> ModelRef:
    """Parse ``hf:org/repo[:file or quantisation]``, ``https://host/file.gguf#sha256=...``, ``file:///path.gguf`` or an id.

    Raises CatalogError INVALID_MODEL_REF for anything else: also for names that could leave the models directory.
    """
    if text.startswith("file://"):
        path = text[len("file://") :]
        if path.startswith("/") and path.endswith(".gguf") and ".." not in Path(path).parts and "\0" not in path:
            return ModelRef(text, "file", path=path)
    elif text.startswith("https://"):
        address, _, digest = text.partition("#sha256=")
        host, _, path = address[len("https://") :].partition("/")
        if re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]+)?", host) and _URL_PATH.fullmatch(path) and _DIGEST.fullmatch(digest):
            # The digest names the folder: two files of one name and host never share a place.
            return ModelRef(text, "https", org="web", repo=f"{host.replace(':', '-')}-{digest[:12]}", file=digest, path=address)
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
        "write hf:org/repo:file.gguf, hf:org/repo:Q4_K_M, https://host/file.gguf#sha256=DIGEST, file:///path/model.gguf "
        "or the id of a catalogued model",
        expected=["hf:org/repo[:file]", "https://host/file.gguf#sha256=DIGEST", "file:///path.gguf", "catalog id"],
    )


def quantization(file_name: str) -> str | None:
    """Return the quantisation that a file's name ends in: ``x-Q4_K_M.gguf`` gives ``Q4_K_M``; None if it names none."""
    match = _QUANT.search(_SPLIT.sub("", file_name.rsplit("/", 1)[-1].removesuffix(".gguf")))
    return match[1].upper() if match else None


def set_name(name: str) -> str:
    """Return the name that all parts of a split model share; of any other file its own."""
    stem, suffix = (name[: -len(".gguf")], name[-len(".gguf") :]) if name.lower().endswith(".gguf") else (name, "")
    return _SPLIT.sub("", stem) + suffix


def choose_files(ref: ModelRef, names: list[str]) -> list[str]:
    """Return the files of a repository that ``ref`` means, by name, by quantisation, or the only GGUF there is.

    More than one are the parts of a split model, in order. Raises CatalogError: MODEL_NOT_FOUND (no such file, or a part
    is missing), INVALID_MODEL_REF (several fit; they are listed).
    """
    sets: dict[str, list[str]] = {}
    for name in sorted(n for n in names if n.lower().endswith(".gguf") and "mmproj" not in n.lower()):
        sets.setdefault(set_name(name), []).append(name)
    if not sets:
        raise CatalogError(
            "MODEL_NOT_FOUND", f"{ref.repo_id} has no GGUF file", "choose a repository whose name ends in -GGUF", files=names[:20]
        )
    if ref.file is None:
        fits = list(sets)
    elif ref.file.lower().endswith(".gguf"):
        wanted = set_name(ref.file)
        fits = [n for n in sets if n == wanted] or [n for n in sets if n.lower() == wanted.lower()]
    else:
        fits = [n for n in sets if quantization(n) == ref.file.upper()]
    if not fits:
        raise CatalogError(
            "MODEL_NOT_FOUND",
            f"{ref.repo_id} has no file {ref.file!r}; it has {', '.join(sets)}",
            f"for example hf:{ref.repo_id}:{next(iter(sets))}",
            files=list(sets),
        )
    if len(fits) > 1:
        kinds = sorted({q for n in fits if (q := quantization(n))})
        names = kinds if len(kinds) == len(fits) else fits
        raise CatalogError(
            "INVALID_MODEL_REF",
            f"{ref.text} could be {len(fits)} files: {', '.join(fits)}",
            f"name one of {', '.join(names)}, for example hf:{ref.repo_id}:{names[0]}",
            files=fits,
            quantizations=kinds,
        )
    return _whole(ref, sets[fits[0]])


def _whole(ref: ModelRef, parts: list[str]) -> list[str]:
    """Return the parts of a model; raises CatalogError MODEL_NOT_FOUND when one is missing."""
    if (match := _SPLIT.search(parts[0][: -len(".gguf")])) is None:
        return parts
    total = int(match[2])
    there = {int(m[1]) for p in parts if (m := _SPLIT.search(p[: -len(".gguf")]))}
    if missing := sorted(set(range(1, total + 1)) - there):
        raise CatalogError(
            "MODEL_NOT_FOUND",
            f"{ref.repo_id}: {parts[0]} is one of {total} parts; missing: {', '.join(map(str, missing))}",
            "choose another quantisation, or another repository",
            files=parts,
        )
    return parts


def choose_file(ref: ModelRef, names: list[str]) -> str:
    """Return the first of ``choose_files``."""
    return choose_files(ref, names)[0]


def digest_of_parts(digests: list[str]) -> str:
    """Return the digest of a model: its file's, or of a split one the digest of its parts' digests."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def default_id(file_name: str, taken: dict[str, str] | None = None, *, reference: str = "", org: str = "") -> str:
    """Return the id of a new model: the file's stem in lower case; with the organisation added, and then a number, where another
    reference has that id already (``taken``: id -> reference)."""
    stem = set_name(file_name.rsplit("/", 1)[-1]).removesuffix(".gguf")
    stem = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-.")
    longer = f"{stem}-{org.lower() or 'local'}"
    names = itertools.chain((stem, longer), (f"{longer}-{n}" for n in itertools.count(2)))
    return next(name for name in names if (taken or {}).get(name, reference) == reference)


def now_iso() -> str:
    """Return the time as the catalog writes it, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- files ----------------------------------------------------------------------------------------------------------


def read(
    models_dir: str | os.PathLike[str], yaml_python: str | None = None, *, set_aside: bool = False
) -> tuple[list[Entry], list[dict[str, str]]]:
    """Return all entries, sorted by id, and the problems met: ``[{"path", "problem"}]``.

    A broken file is a problem, never an exception; with ``set_aside`` it is moved to ``metadata.yaml.corrupt``, and what
    was good in it stays. An entry that says Ready while its file is not there, or Downloading while nobody downloads, is
    returned as Failed with the reason under ``problem``. ``yaml_python``: interpreter with PyYAML for files that are YAML
    but not JSON, where this one has none.
    """
    entries: list[Entry] = []
    problems: list[dict[str, str]] = []
    for path in sorted(Path(models_dir).glob(f"*/*/{CORRUPT}")):
        words = "set aside because it could not be read; correct it and rename it to metadata.yaml, or remove it"
        problems.append({"path": str(path), "problem": words})
    for path in sorted(Path(models_dir).glob(f"*/*/{METADATA}")):
        good, bad = _read_one(path, yaml_python, {str(e["id"]) for e in entries})
        entries += [_now(e) for e in good]
        where = str(path)
        if set_aside and bad and not any(p.get("keep") for p in bad):
            _set_aside(path, good)
            where = f"{path.with_name(CORRUPT)} (set aside)"
        problems += [{"path": where, "problem": p["problem"]} for p in bad]
    return sorted(entries, key=lambda e: str(e["id"])), problems


def _read_one(path: Path, yaml_python: str | None, taken: set[str]) -> tuple[list[Entry], list[dict[str, str]]]:
    """Return the good entries of one file and what is wrong with it; ``keep``: not the file's own fault."""
    try:
        found = _load(path, yaml_python)
    except _NotReadableHereError as e:
        return [], [{"problem": str(e), "keep": "1"}]
    except OSError as e:
        return [], [{"problem": str(e), "keep": "1"}]
    except ValueError as e:
        return [], [{"problem": str(e)}]
    good: list[Entry] = []
    bad: list[dict[str, str]] = []
    for number, raw in enumerate(found):
        if (problem := _check(raw)) is not None:
            bad.append({"problem": f"model {number + 1}: {problem}"})
        elif raw["id"] in taken | {e["id"] for e in good}:
            bad.append({"problem": f"model {number + 1}: id {raw['id']!r} is used twice", "keep": "1"})
        else:
            good.append(raw)
    return good, bad


def _set_aside(path: Path, good: list[Entry]) -> None:
    """Move a broken file out of the way, leaving its good entries; never over an older one that was set aside."""
    aside, number = path.with_name(CORRUPT), 1
    while aside.exists():
        aside, number = path.with_name(f"{METADATA}.{number}.corrupt"), number + 1
    path.replace(aside)
    if good:
        _write(path, good)


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
    mine = {set_name(e["reference"][len(prefix) :]): e for e in entries if e["reference"].startswith(prefix)}
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


def delete(models_dir: str | os.PathLike[str], entry: Entry) -> tuple[int, list[str]]:
    """Remove a model's files and its entry; returns the bytes freed and the files that were left because they lie
    outside of ``models_dir`` (a ``file:///`` reference). Raises OSError.

    Files first: what a crash leaves is an entry without its file, which says so and can be deleted again.
    """
    base = Path(models_dir)
    freed, left = 0, []
    for path in [Path(p["path"]) for p in parts(entry)]:
        for victim in (path, partial_path(path)):
            if not victim.is_relative_to(base) or ".." in victim.parts:
                if victim.exists():
                    left.append(str(victim))
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = victim.lstat()
                victim.unlink()
                freed += stat.st_size if stat.st_nlink == 1 else 0
    for metadata in sorted(base.glob(f"*/*/{METADATA}")):
        home = metadata.parent
        try:
            gone = remove(str(entry["id"]), home)
        except _NotReadableHereError:
            continue  # somebody else's YAML: ours are JSON, and the entry came from one that could be read
        if gone:
            _prune(home, base)
    return freed, left


def _prune(home: Path, base: Path) -> None:
    """Remove directories that have become empty, up to ``base``."""
    below = sorted((d for d in home.rglob("*") if d.is_dir()), key=lambda d: len(d.parts), reverse=True)
    for directory in [*below, home, home.parent]:
        if directory != base:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


def parts(entry: Entry) -> list[dict[str, Any]]:
    """Return the files of a model, in order: ``[{"path", "size_bytes", "sha256"}]``."""
    one = {"path": entry["path"], "size_bytes": entry["size_bytes"], "sha256": entry.get("sha256")}
    return list(entry.get("files") or [one])


def _replace(path: Path, entry_id: str, entry: Entry | None) -> bool:
    try:
        old = _load(path, None)
    except _NotReadableHereError:
        raise
    except FileNotFoundError:
        old = []
    except ValueError:
        _set_aside(path, [])
        old = []
    new = [e for e in old if not isinstance(e, dict) or e.get("id") != entry_id] + ([entry] if entry else [])
    if new == old:
        return False
    if not new:
        path.unlink(missing_ok=True)
        return True
    _write(path, new)
    return True


def _write(path: Path, models: list[Entry]) -> None:
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".metadata-")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            json.dump({"models": models}, f, indent=2, ensure_ascii=False)
            f.write("\n")
            f.flush()
            os.fchmod(f.fileno(), 0o644)
            if os.geteuid() == 0:  # downloads run as the directory's owner and must be able to write here as well
                owner = path.parent.stat()
                os.fchown(f.fileno(), owner.st_uid, owner.st_gid)
            os.fsync(f.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
            raise _NotReadableHereError("not JSON, and no PyYAML here to read other YAML") from None
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
    files = entry.get("files")
    if files is not None and not (
        isinstance(files, list)
        and files
        and all(isinstance(f, dict) and isinstance(f.get("path"), str) and isinstance(f.get("size_bytes"), int) for f in files)
    ):
        return "files is no list of parts with path and size_bytes"
    if entry["status"] not in (READY, DOWNLOADING, FAILED):
        return f"status is {entry['status']!r}, expected {READY}, {DOWNLOADING} or {FAILED}"
    return None


def _now(entry: Entry) -> Entry:
    """Compare what the entry says with what is on disk."""
    if entry["status"] == READY:
        for part in parts(entry):
            path = Path(part["path"])
            try:
                size = path.stat().st_size
            except OSError as e:
                return {**entry, "status": FAILED, "problem": f"{path}: {e.strerror}"}
            if size != part["size_bytes"]:
                words = f"{path} has {size} bytes, the catalog says {part['size_bytes']}"
                return {**entry, "status": FAILED, "problem": words}
    if entry["status"] == DOWNLOADING and not in_use(partial_path(Path(entry["path"]))):
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
