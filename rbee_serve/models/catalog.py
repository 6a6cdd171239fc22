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


def choose_file(ref: ModelRef, names: list[str]) -> str:
    """Return the file of a repository that ``ref`` means; raises ModelNotFound, InvalidModelRef."""
    with _contract_errors():
        return store.choose_file(ref, names)


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

    def new_entry(self, ref: ModelRef, file_name: str, path: Path, *, size_bytes: int, sha256: str | None) -> Entry:
        """Return an entry with status Downloading and an id that nobody else has; nothing is written."""
        taken = {str(e["id"]): str(e["reference"]) for e in self.list()[0]}
        reference = f"hf:{ref.repo_id}:{file_name}" if ref.kind == "hf" else ref.text
        return {
            "id": store.default_id(file_name, taken, reference=reference, org=ref.org),
            "reference": reference,
            "provider": ref.kind,
            "name": Path(file_name).name.removesuffix(".gguf"),
            "path": str(path),
            "size_bytes": size_bytes,
            "added_at": store.now_iso(),
            "status": store.DOWNLOADING,
            "sha256": sha256,
            "metadata": {},
        }

    def put(self, entry: Entry, directory: Path) -> None:
        """Write the entry into the ``metadata.yaml`` of ``directory`` (``<models_dir>/<org>/<repo>``)."""
        with _contract_errors():
            store.put(self.models_dir, directory, entry)


def ready(entry: Entry, sha256: str, **metadata: Any) -> Entry:
    """Return the entry as Ready, with digest, exact size and the facts of the file's header.

    Raises ModelFileInvalid when the file is no GGUF.
    """
    path = Path(entry["path"])
    try:
        facts = gguf.facts(path)
    except gguf.GgufError as e:
        raise errors.ModelFileInvalid(str(e), hint="choose a GGUF file of the repository", path=str(path)) from None
    return {
        **{k: v for k, v in entry.items() if k != "problem"},
        "status": store.READY,
        "sha256": sha256,
        "size_bytes": path.stat().st_size,
        "added_at": store.now_iso(),
        "metadata": {**facts, **metadata},
    }


def digest(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Return the SHA-256 of a file; ``on_bytes`` is called with the number of bytes read so far."""
    sha, done = hashlib.sha256(), 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            sha.update(chunk)
            done += len(chunk)
            on_bytes(done)
    return sha.hexdigest()
