"""The catalog as the rest of rbee_serve uses it: store.py's functions with the contract's errors."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rbee_serve.contract import errors
from rbee_serve.models import gguf, store
from rbee_serve.models.store import Entry, ModelRef


@contextlib.contextmanager
def _contract_errors() -> Iterator[None]:
    try:
        yield
    except store.CatalogError as e:
        raise errors.BY_CODE[e.code](e.message, hint=e.hint, **e.details) from None


def parse_ref(text: str) -> ModelRef:
    """Parse a reference; raises InvalidModelRef."""
    with _contract_errors():
        return store.parse_ref(text)


def choose_files(ref: ModelRef, names: list[str]) -> list[str]:
    """Return the files of a repository that ``ref`` means, see store; raises ModelNotFound, InvalidModelRef."""
    with _contract_errors():
        return store.choose_files(ref, names)


Part = dict[str, Any]
Parts = list[Part]


class Catalog:
    """The models beneath one directory."""

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir

    def list(self) -> tuple[list[Entry], list[dict[str, str]]]:
        """Return entries and problems, see store.read."""
        return store.read(self.models_dir)

    def find(self, ref: ModelRef) -> Entry | None:
        """Return the entry that ``ref`` means; raises InvalidModelRef when several fit."""
        with _contract_errors():
            return store.find(self.list()[0], ref)

    def new_entry(self, ref: ModelRef, reference: str, parts: Parts) -> Entry:
        """Return an entry with status Downloading and an id that nobody else has; nothing is written.

        ``parts``: ``{"path", "size_bytes", "sha256"}`` of each file; ``reference``: the exact one, which names the file.
        """
        taken = {str(e["id"]): str(e["reference"]) for e in self.list()[0]}
        name = store.set_name(Path(parts[0]["path"]).name)
        return {
            "id": store.default_id(name, taken, reference=reference, org=ref.org),
            "reference": reference,
            "provider": ref.kind,
            "name": name.removesuffix(".gguf"),
            "path": parts[0]["path"],
            "size_bytes": sum(p["size_bytes"] for p in parts),
            "added_at": store.now_iso(),
            "status": store.DOWNLOADING,
            "sha256": parts[0]["sha256"] if len(parts) == 1 else None,
            **({"files": parts} if len(parts) > 1 else {}),
            "metadata": {},
        }

    def put(self, entry: Entry, directory: Path) -> None:
        """Write the entry into the ``metadata.yaml`` of ``directory`` (``<models_dir>/<org>/<repo>``)."""
        with _contract_errors():
            store.put(self.models_dir, directory, entry)


def ready(entry: Entry, digests: list[str], **metadata: Any) -> Entry:
    """Return the entry as Ready, with digests (one a part), exact sizes and the facts of the header.

    Raises ModelFileInvalid when a file is no GGUF.
    """
    paths = [Path(p["path"]) for p in store.parts(entry)]
    facts = readable(paths, paths[0])
    files = [{"path": str(p), "size_bytes": p.stat().st_size, "sha256": sha256} for p, sha256 in zip(paths, digests, strict=True)]
    return {
        **{k: v for k, v in entry.items() if k != "problem"},
        "status": store.READY,
        "sha256": store.digest_of_parts(digests),
        "size_bytes": sum(int(str(f["size_bytes"])) for f in files),
        **({"files": files} if len(files) > 1 else {}),
        "added_at": store.now_iso(),
        "metadata": {**facts, **metadata},
    }


def readable(paths: list[Path], name: Path) -> dict[str, Any]:
    """Return the facts of a model's header; raises ModelFileInvalid, with ``name`` as its path, when a file is no GGUF."""
    try:
        return gguf.facts(*paths)
    except gguf.GgufError as e:
        raise errors.ModelFileInvalid(str(e), hint="choose a GGUF file of the repository", path=str(name)) from None


def digest(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Return the SHA-256 of a file; ``on_bytes`` is called with the number of bytes read so far."""
    sha, done = hashlib.sha256(), 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            sha.update(chunk)
            done += len(chunk)
            on_bytes(done)
    return sha.hexdigest()
