"""A model in parts, as large ones are published: downloaded, told, loaded and asked as one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import split_gguf
from hub import Behaviour, Hub
from worker_process import WorkerProcess

from rbee_serve.models import download, gguf, store

pytestmark = pytest.mark.integration

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct-split-GGUF"
REF = f"hf:{REPO}:Q4_1"
ASKED = {"prompt": "Once upon a time there was", "max_tokens": 24, "temperature": 0, "stream": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> list[Path]:
    """The demonstration model in three files."""
    return split_gguf(model_path, tmp_path_factory.mktemp("parts"), 3)


@pytest.fixture
def server(tmp_path: Path, parts: list[Path]) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as server:
        for part in parts:
            server.add(REPO, part.name, part)
        yield server


def fetch(server: Hub, models_dir: Path, **options: Any) -> tuple[int, list[dict[str, Any]]]:
    """Return exit code and progress of a download."""
    progress = models_dir.with_suffix(".jsonl")
    values = {"ref": REF, "models-dir": models_dir, "endpoint": server.url, "progress-file": progress, "pause-s": 0.02, **options}
    code = download.main([f"--{name}={value}" for name, value in values.items()])
    return code, [json.loads(line) for line in progress.read_text().splitlines()]


def answer(directory: Path, model: Path) -> list[int]:
    """Return the greedy tokens of a worker with this model."""
    directory.mkdir()
    with WorkerProcess(directory, model, {"slots": 1, "context_tokens": 256, "threads": 1}) as worker:
        worker.wait_ready()
        with worker.client() as client:
            tokens: list[int] = client.post("/v1/inference", json=ASKED, timeout=120).json()["token_ids"]
    return tokens


def test_a_model_in_parts_answers_like_the_whole_one(server: Hub, tmp_path: Path, parts: list[Path], model_path: Path) -> None:
    """What its header says, and what its memory is reckoned from, is the same as well."""
    code, said = fetch(server, tmp_path / "models")
    assert code == 0
    model = said[-1]["model"]
    assert [Path(f["path"]).name for f in model["files"]] == [part.name for part in parts]
    whole = gguf.facts(model_path)
    assert whole["memory"]["tied"] is True
    told = {key: model["metadata"][key] for key in whole if key in model["metadata"]}
    assert gguf.facts(*parts) == whole
    assert told == {key: whole[key] for key in told}
    tokens = answer(tmp_path / "split", Path(model["path"]))
    assert len(tokens) == ASKED["max_tokens"]
    assert tokens == answer(tmp_path / "whole", model_path)


@pytest.mark.S27
def test_a_damaged_part_is_named_and_the_others_are_kept(server: Hub, tmp_path: Path, parts: list[Path]) -> None:
    """SPEC S-27: what was right is not fetched again."""
    models_dir, bad = tmp_path / "models", parts[1].name
    server.digests[bad] = "0" * 64
    code, said = fetch(server, models_dir, tries=2)
    assert (code, said[-1]["code"], said[-1]["details"]["file"]) == (1, "CHECKSUM_MISMATCH", bad)
    assert bad in said[-1]["message"]
    home = models_dir / REPO
    assert not list(home.glob("*.gguf"))
    kept = store.partial_path(home / parts[0].name)
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == server.sha256(parts[0])
    assert not store.partial_path(home / bad).exists()
    ((entry,), _) = store.read(models_dir)
    assert (entry["status"], bad in entry["problem"]) == ("Failed", True)

    del server.digests[bad]
    server.log.clear()
    server.behaviour = Behaviour()
    code, said = fetch(server, models_dir)
    assert (code, said[-1]["stage"]) == (0, "complete")
    assert [r.path.rsplit("/", 1)[1] for r in server.downloads] == [part.name for part in parts[1:]]
    assert all(hashlib.sha256((home / p.name).read_bytes()).hexdigest() == server.sha256(p) for p in parts)
