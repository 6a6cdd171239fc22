"""A model that one machine fetched reaches the others without the hub: share.py and ``download --peer``, real processes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from proxy import Proxy

from rbee_serve.models import download, store
from rbee_serve.models.catalog import Catalog, ready
from rbee_serve.models.share import Share

pytestmark = pytest.mark.integration

REF = "hf:HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:SmolLM2-135M-Instruct.Q4_1.gguf"
TOKEN = "fleet-token-of-this-test"


@pytest.fixture
def source(tmp_path: Path, model_path: Path) -> Path:
    """The models directory of a machine that has the model."""
    models = tmp_path / "first"
    home = models / "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
    home.mkdir(parents=True)
    path = home / model_path.name
    path.symlink_to(model_path)
    catalog = Catalog(models)
    part = {"path": str(path), "size_bytes": path.stat().st_size, "sha256": None}
    entry = catalog.new_entry(store.parse_ref(REF), REF, [part])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    catalog.put(ready(entry, [digest], source_url="https://hub/file"), home)
    return models


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fleet-token"
    path.write_text(TOKEN + "\n")
    monkeypatch.setenv("RBEE_FLEET_TOKEN_FILE", str(path))
    return path


def the_entry(models: Path) -> dict[str, Any]:
    (entry,), _ = store.read(models)
    return entry


@pytest.fixture
def share(source: Path, token: Path) -> Iterator[Share]:
    server = Share(("127.0.0.1", 0), the_entry(source), source, TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(share: Share) -> str:
    return f"http://127.0.0.1:{share.server_address[1]}"


def fetch(models: Path, peer: str, *more: str, ref: str = REF) -> tuple[int, list[dict[str, Any]]]:
    progress = models.with_suffix(".jsonl")
    base = ["--ref", ref, "--models-dir", str(models), "--progress-file", str(progress), "--pause-s", "0.02", "--peer", peer]
    code = download.main([*base, *more])
    return code, [json.loads(line) for line in progress.read_text().splitlines()]


@pytest.mark.parametrize("ref", [REF, "hf:HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:Q4_1", "smollm2-135m-instruct.q4_1"])
def test_a_peer_gives_the_model_and_its_exact_reference(tmp_path: Path, share: Share, source: Path, ref: str) -> None:
    code, lines = fetch(tmp_path / "second", url(share), ref=ref)
    assert code == 0, lines[-1]
    first, second = the_entry(source), the_entry(tmp_path / "second")
    for key in ("id", "reference", "sha256", "size_bytes", "status"):
        assert second[key] == first[key]
    assert second["metadata"]["source_url"] == "https://hub/file"
    assert hashlib.sha256(Path(second["path"]).read_bytes()).hexdigest() == first["sha256"]


def test_a_peer_wants_the_fleet_s_token_and_gives_nothing_else(tmp_path: Path, share: Share, token: Path) -> None:
    token.write_text("another")
    code, lines = fetch(tmp_path / "second", url(share))
    assert (code, lines[-1]["code"]) == (1, "MODEL_ACCESS_DENIED")
    assert TOKEN not in json.dumps(lines)
    mine = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url(share), timeout=60, trust_env=False) as client:
        assert client.get("/v1/model").status_code == 401
        for path in ("/", "/v1/model/files/1", "/v1/model/files/-1", "/v1/model/files/../0", "/etc/passwd"):
            assert client.get(path, headers=mine).status_code == 404


def test_a_broken_transfer_is_resumed(tmp_path: Path, share: Share, source: Path) -> None:
    """The connection is cut in the middle twice; the file is whole and right, and not sent from the start again."""
    proxy = Proxy(share.server_address[1])
    cutter = threading.Thread(target=cut_at, args=(proxy, tmp_path / "second", (15_000_000, 45_000_000)))
    cutter.start()
    try:
        code, lines = fetch(tmp_path / "second", f"http://127.0.0.1:{proxy.port}", "--bytes-per-s", "60000000")
    finally:
        cutter.join()
        proxy.close()
    assert code == 0, lines[-1]
    assert len([line for line in lines if line["stage"] == "resuming"]) == 2
    assert hashlib.sha256(Path(the_entry(tmp_path / "second")["path"]).read_bytes()).hexdigest() == the_entry(source)["sha256"]


def test_a_file_that_went_bad_at_the_peer_is_never_taken(tmp_path: Path, share: Share, source: Path) -> None:
    path = Path(the_entry(source)["path"])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a link into the cache
    path.write_bytes(data)
    code, lines = fetch(tmp_path / "second", url(share), "--tries", "2")
    assert (code, lines[-1]["code"]) == (1, "CHECKSUM_MISMATCH")
    assert not list((tmp_path / "second").rglob("*.gguf"))


def test_another_file_than_the_declared_one_is_refused_before_any_byte(tmp_path: Path, share: Share) -> None:
    code, lines = fetch(tmp_path / "second", url(share), "--sha256", "0" * 64)
    assert (code, lines[-1]["code"]) == (1, "CHECKSUM_MISMATCH")
    assert not [line for line in lines if line["stage"] == "downloading"]


def test_a_peer_that_does_not_answer_is_named_with_what_to_do(tmp_path: Path, share: Share) -> None:
    share.socket.close()
    code, lines = fetch(tmp_path / "second", url(share), "--tries", "2")
    assert (code, lines[-1]["code"]) == (1, "DOWNLOAD_FAILED")
    assert "--via controller" in lines[-1]["hint"]
    assert lines[-1]["details"]["peer"] == url(share)  # by which the others know whose fault it was


def test_several_machines_are_served_at_the_same_time(tmp_path: Path, share: Share) -> None:
    """Both receivers are held to a rate: one after the other, the second would begin when the first ends."""
    begin = threading.Barrier(2)

    def receive(name: str) -> list[float]:
        begin.wait(60)
        code, lines = fetch(tmp_path / name, url(share), "--bytes-per-s", "50000000")
        assert code == 0, lines[-1]
        return [line["at"] for line in lines if line["stage"] == "downloading" and line["bytes_downloaded"] > 0]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(receive, ("second", "third"))
    assert max(first[0], second[0]) < min(first[-1], second[-1])


def test_a_share_ends_when_nobody_asks_any_more_and_refuses_what_is_not_there(tmp_path: Path, source: Path, token: Path) -> None:
    address = tmp_path / "address.json"
    model = the_entry(source)["id"]
    command = [sys.executable, "-m", "rbee_serve.models.share", "--models-dir", str(source), "--host", "127.0.0.1"]
    command += ["--address-file", str(address), "--idle-s", "0.5", "--model"]
    done = subprocess.run([*command, model], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(address.read_text())["port"] > 0
    gone = subprocess.run([*command, "nobody"], capture_output=True, text=True, timeout=60, check=False)
    assert (gone.returncode, "nobody" in gone.stderr) == (1, True)


def test_a_share_that_is_killed_can_be_begun_again(tmp_path: Path, source: Path, token: Path) -> None:
    """SIGKILL of the sharing machine's process: the receiver fails, a second share completes what was begun."""
    address = tmp_path / "address.json"
    command = [sys.executable, "-m", "rbee_serve.models.share", "--models-dir", str(source), "--host", "127.0.0.1"]
    command += ["--address-file", str(address), "--model", the_entry(source)["id"]]
    for attempt in range(2):
        address.unlink(missing_ok=True)
        process = subprocess.Popen(command)
        try:
            while not address.is_file():
                assert process.poll() is None
                time.sleep(0.01)
            peer = f"http://127.0.0.1:{json.loads(address.read_text())['port']}"
            if attempt == 0:
                killer = threading.Thread(target=kill_when, args=(process, tmp_path / "second", 10_000_000))
                killer.start()
                code, lines = fetch(tmp_path / "second", peer, "--tries", "2", "--bytes-per-s", "40000000")
                killer.join()
                assert (code, lines[-1]["stage"]) == (1, "failed")
            else:
                code, lines = fetch(tmp_path / "second", peer)
                assert code == 0, lines[-1]
                assert [line for line in lines if line["stage"] == "resuming"]
        finally:
            process.kill()
            process.wait()
    assert the_entry(tmp_path / "second")["sha256"] == the_entry(source)["sha256"]


def kill_when(process: subprocess.Popen[bytes], models: Path, size: int) -> None:
    """Kill when that many bytes have arrived."""
    wait_for(models, size)
    process.send_signal(signal.SIGKILL)


def cut_at(proxy: Proxy, models: Path, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        wait_for(models, size)
        assert proxy.cut()


def wait_for(models: Path, size: int) -> None:
    """Wait until that many bytes of a model have arrived."""
    end = time.monotonic() + 60
    while not any(p.stat().st_size >= size for p in models.rglob("*.partial")):
        assert time.monotonic() < end, "the transfer does not move"
        time.sleep(0.005)
