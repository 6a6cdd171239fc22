"""Downloads from a hub on loopback, with real bytes over real HTTP: SPEC S-21 to S-28, S-40, S-41, CAP-44, P-02."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from demands import small_file_system
from gguf_files import write_gguf
from hub import Behaviour, Hub

from rbee_serve.contract.errors import DownloadFailed
from rbee_serve.models import download, hub, store
from rbee_serve.models.progress import Progress

pytestmark = pytest.mark.integration

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REF = f"hf:{REPO}:{FILE}"


@pytest.fixture
def server(tmp_path: Path, model_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as server:
        server.add(REPO, FILE, model_path)
        (tmp_path / "hub" / REPO / "README.md").write_text("a model")
        yield server


class Run:
    """What a run of the program left: exit code and progress lines."""

    def __init__(self, code: int, lines: list[dict[str, Any]]) -> None:
        self.code, self.lines = code, lines

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1]

    def stages(self, stage: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["stage"] == stage]


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    return tmp_path / "models"


def arguments(server: Hub, models_dir: Path, ref: str = REF, **options: Any) -> list[str]:
    values = {"--pause-s": 0.02, **{f"--{k.replace('_', '-')}": v for k, v in options.items()}}
    extra = [str(x) for pair in values.items() for x in pair]
    base = ["--ref", ref, "--models-dir", str(models_dir), "--endpoint", server.url]
    return [*base, "--progress-file", str(models_dir.with_suffix(".jsonl")), *extra]


def run(server: Hub, models_dir: Path, ref: str = REF, **options: Any) -> Run:
    code = download.main(arguments(server, models_dir, ref, **options))
    text = models_dir.with_suffix(".jsonl").read_text()
    return Run(code, [json.loads(line) for line in text.splitlines()])


def final_path(models_dir: Path) -> Path:
    return models_dir / REPO / FILE


def size_of(path: Path) -> int:
    """Return how many bytes a file has; one that is not there has none."""
    return path.stat().st_size if path.exists() else 0


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.S28
@pytest.mark.S32
def test_download_brings_the_file_and_its_catalog_entry(server: Hub, models_dir: Path, model_path: Path) -> None:
    done = run(server, models_dir)
    assert done.code == 0
    assert sha256(final_path(models_dir)) == sha256(model_path)
    assert done.last["stage"] == "complete"
    assert done.last["downloaded"] is True
    entries, problems = store.read(models_dir)
    assert (entries, problems) == ([done.last["model"]], [])
    (entry,) = entries
    assert (entry["id"], entry["reference"], entry["status"]) == ("smollm2-135m-instruct.q4_1", REF, "Ready")
    assert entry["size_bytes"] == model_path.stat().st_size
    assert entry["metadata"]["quantization"] == "Q4_1"
    assert server.bytes_sent == entry["size_bytes"]


@pytest.mark.parametrize("ref", [REF, f"hf:{REPO}", f"hf:{REPO}:Q4_1", "smollm2-135m-instruct.q4_1"])
@pytest.mark.S21
def test_what_is_there_causes_no_traffic(server: Hub, models_dir: Path, ref: str) -> None:
    run(server, models_dir)
    server.log.clear()
    done = run(server, models_dir, ref)
    assert (done.code, done.last["stage"], done.last["downloaded"]) == (0, "complete", False)
    assert server.log == []


@pytest.mark.S22
@pytest.mark.P02
def test_progress_is_shown_while_it_happens_and_its_speed_follows_the_line(
    server: Hub, models_dir: Path, small_model: Path
) -> None:
    """A throttled hub moves both the reported speed and the duration."""
    server.add("org/small", "small-Q8_0.gguf", small_model)
    server.behaviour.bytes_per_s = 2_500_000  # far below what the slowest machine can do
    began = time.monotonic()
    done = run(server, models_dir, SMALL)
    took, least = time.monotonic() - began, small_model.stat().st_size / 2_500_000 * 0.9
    shown = done.stages("downloading")
    counts = [line["bytes_downloaded"] for line in shown]
    assert len(set(counts)) >= 4
    assert counts == sorted(counts)
    assert shown[0]["at"] < shown[-1]["at"] - 0.5 * least
    speeds = [line["speed_mbps"] / 8 for line in shown[1:]]
    assert 1.5 < sorted(speeds)[len(speeds) // 2] < 3
    assert took > least


@pytest.mark.S26
@pytest.mark.S58
@pytest.mark.P02
def test_a_reset_connection_is_resumed_where_it_broke(server: Hub, models_dir: Path, model_path: Path) -> None:
    partial = store.partial_path(final_path(models_dir))
    server.behaviour = Behaviour(reset_at=0.4, reset_count=1, taken=lambda: size_of(partial))
    done = run(server, models_dir)
    assert done.code == 0
    assert sha256(final_path(models_dir)) == sha256(model_path)
    first, second = server.downloads
    assert (first.range, second.range) == (None, f"bytes={int(0.4 * model_path.stat().st_size)}-")
    assert server.bytes_sent == model_path.stat().st_size
    assert "attempt 2/6" in done.stages("retrying")[0]["human"]


@pytest.mark.S26
@pytest.mark.P02
def test_six_tries_with_doubling_pauses_then_download_failed(server: Hub, models_dir: Path) -> None:
    partial = store.partial_path(final_path(models_dir))
    server.behaviour = Behaviour(reset_at=0.01, reset_count=-1, taken=lambda: size_of(partial))
    done = run(server, models_dir, pause_s=0.05)
    assert done.code == 1
    assert (done.last["stage"], done.last["code"]) == ("failed", "DOWNLOAD_FAILED")
    assert len(server.downloads) == 6
    # A pause of over a second is told once more for each second (N-05); its length is in the first line alone.
    pauses = [line["pause_s"] for line in done.stages("retrying") if "pause_s" in line]
    assert len(pauses) == 5
    for number, pause in enumerate(pauses):
        assert 0.5 <= pause / (0.05 * 2**number) <= 1.5
    gaps = [b.at - a.at for a, b in zip(server.downloads, server.downloads[1:], strict=False)]
    assert all(gap >= pause for gap, pause in zip(gaps, pauses, strict=True))
    (entry,) = store.read(models_dir)[0]
    assert entry["status"] == "Failed"

    server.behaviour = Behaviour()
    again = run(server, models_dir)
    assert again.code == 0
    assert server.downloads[-1].range is not None
    assert store.read(models_dir)[0][0]["status"] == "Ready"


@pytest.mark.P02
def test_defaults_are_those_of_the_specification() -> None:
    options = download.Options()
    assert (options.tries, options.pause_s, options.pause_max_s, options.stall_timeout_s) == (6, 0.1, 3.2, 60.0)


@pytest.mark.S26
@pytest.mark.P02
def test_pauses_double_from_100_to_3200_ms_and_no_further(tmp_path: Path) -> None:
    """SPEC 3.8's series as it is reckoned, a hundredth of it long; six tries have the first five pauses between them."""
    shown = {}
    for tries in (download.Options.tries, 9):
        progress = Progress(tmp_path / f"{tries}.jsonl")
        options = download.Options(
            tries=tries, pause_s=download.Options.pause_s / 1e2, pause_max_s=download.Options.pause_max_s / 1e2
        )
        made = []

        def attempt(made: list[int] = made) -> None:
            made.append(1)
            raise hub.TransientError("as ever")

        with pytest.raises(DownloadFailed):
            download.Tries(options, progress).run(attempt)
        progress.close()
        assert len(made) == tries
        lines = [json.loads(line) for line in (tmp_path / f"{tries}.jsonl").read_text().splitlines()]
        shown[tries] = [line["pause_s"] for line in lines if "pause_s" in line]
    series = [100, 200, 400, 800, 1600, 3200, 3200, 3200]
    assert [len(pauses) for pauses in shown.values()] == [5, 8]
    for pauses in shown.values():  # in the file to a thousandth of a second
        assert all(0.5 * ms / 1e5 - 6e-4 <= p <= 1.5 * ms / 1e5 + 6e-4 for ms, p in zip(series, pauses, strict=False))


@pytest.mark.S25
def test_a_stall_is_noticed_and_tried_again(server: Hub, models_dir: Path) -> None:
    server.behaviour = Behaviour(stall_at=0.2, stall_count=1)
    done = run(server, models_dir, stall_timeout_s=2)
    assert done.code == 0
    assert "no bytes for 2 s; attempt 2/6" in done.stages("retrying")[0]["human"]


@pytest.mark.S25
def test_a_hub_that_only_stalls_ends_in_download_timeout(server: Hub, models_dir: Path) -> None:
    server.behaviour = Behaviour(stall_at=0.0, stall_count=-1)
    done = run(server, models_dir, stall_timeout_s=1, tries=3)
    assert (done.code, done.last["code"]) == (1, "DOWNLOAD_TIMEOUT")
    assert len(server.downloads) == 3


@pytest.mark.S27
@pytest.mark.P02
def test_wrong_bytes_of_the_right_size_are_fetched_again(server: Hub, models_dir: Path, model_path: Path) -> None:
    server.behaviour = Behaviour(corrupt_count=1)
    done = run(server, models_dir)
    assert done.code == 0
    assert sha256(final_path(models_dir)) == sha256(model_path)
    assert [r.range for r in server.downloads] == [None, None]


@pytest.mark.S27
@pytest.mark.P02
def test_a_hub_with_only_wrong_bytes_ends_in_checksum_mismatch(server: Hub, models_dir: Path) -> None:
    server.behaviour = Behaviour(corrupt_count=-1)
    done = run(server, models_dir, tries=2)
    assert (done.code, done.last["code"]) == (1, "CHECKSUM_MISMATCH")
    assert not final_path(models_dir).exists()
    assert list(models_dir.rglob("*.partial")) == []


def test_a_hub_that_ignores_ranges_is_read_from_the_start(server: Hub, models_dir: Path, model_path: Path) -> None:
    server.behaviour = Behaviour(reset_at=0.3, reset_count=1, ignore_range=True)
    done = run(server, models_dir)
    assert done.code == 0
    assert sha256(final_path(models_dir)) == sha256(model_path)


@pytest.mark.parametrize(
    ("ref", "code", "words"),
    [
        ("hf:no/such", "MODEL_NOT_FOUND", "HTTP 404"),
        (f"hf:{REPO}:Q8_0", "MODEL_NOT_FOUND", FILE),
        ("not-catalogued", "MODEL_NOT_FOUND", "not-catalogued"),
        (f"hf:{REPO}:none.gguf", "MODEL_NOT_FOUND", FILE),
        ("hf:../x", "INVALID_MODEL_REF", "not a model reference"),
    ],
)
def test_what_does_not_exist_is_not_tried_again(server: Hub, models_dir: Path, ref: str, code: str, words: str) -> None:
    done = run(server, models_dir, ref)
    assert (done.code, done.last["code"]) == (1, code)
    assert words in done.last["message"]
    assert done.last["hint"]
    assert len(server.log) <= 1
    assert done.stages("retrying") == []


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (401, "RepoNotFound", "MODEL_ACCESS_DENIED", "asks for a token (HTTP 401); the name may also be misspelt"),
        (401, "GatedRepo", "MODEL_ACCESS_DENIED", "asks for a token (HTTP 401)"),
        (403, "GatedRepo", "MODEL_ACCESS_DENIED", "may not read it (HTTP 403, gated)"),
        (404, "RepoNotFound", "MODEL_NOT_FOUND", "HTTP 404: no such repository"),
    ],
)
@pytest.mark.S23
@pytest.mark.S24
def test_a_hub_s_refusals_are_told_apart_and_not_tried_again(
    server: Hub, models_dir: Path, status: int, code: str, error: str, words: str
) -> None:
    server.behaviour = Behaviour(status=status, error_code=code)
    done = run(server, models_dir)
    assert (done.code, done.last["code"]) == (1, error)
    assert words in done.last["message"]
    assert ("HF_TOKEN" in done.last["hint"]) == (status != 404)
    assert len(server.log) == 1


@pytest.mark.S24
def test_a_gated_model_that_all_may_look_at_names_the_page_where_its_licence_is(server: Hub, models_dir: Path) -> None:
    server.behaviour = Behaviour(gated=True)
    done = run(server, models_dir)
    assert (done.code, done.last["code"]) == (1, "MODEL_ACCESS_DENIED")
    assert "(HTTP 403, gated)" in done.last["message"]
    assert f"accept the licence at {server.url}/{REPO}, then" in done.last["hint"]
    assert done.stages("retrying") == []


@pytest.mark.S24
def test_the_token_of_the_credential_opens_a_gated_model_and_is_shown_nowhere(
    server: Hub, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "hf_secret_0123456789"
    (tmp_path / "hf-token").write_text(token + "\n")
    server.behaviour = Behaviour(token=token)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert run(server, models_dir).last["code"] == "MODEL_ACCESS_DENIED"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    done = run(server, models_dir)
    assert done.code == 0
    assert {r.authorization for r in server.log if not r.path.startswith("/cdn/")} == {None, f"Bearer {token}"}
    left = "".join(p.read_text(errors="replace") for p in models_dir.rglob("*.yaml"))
    out, err = capfd.readouterr()
    assert token not in left + out + err + models_dir.with_suffix(".jsonl").read_text()


def test_a_model_larger_than_the_disk_is_refused_before_any_byte(server: Hub, models_dir: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge.gguf"
    huge.touch()
    os.truncate(huge, 1 << 43)
    repo = tmp_path / "hub" / "big" / "model"
    repo.mkdir(parents=True)
    (repo / "huge-Q8_0.gguf").symlink_to(huge)
    server.digests["huge-Q8_0.gguf"] = "0" * 64
    done = run(server, models_dir, "hf:big/model")
    assert (done.code, done.last["code"]) == (1, "INSUFFICIENT_DISK")
    figures = done.last["details"]
    assert figures["required_bytes"] == 1 << 43
    assert figures["to_free_bytes"] >= figures["required_bytes"] - figures["available_bytes"] > 0
    assert "model delete" in done.last["hint"]
    assert server.downloads == []
    assert [p for p in models_dir.rglob("*") if p.is_file()] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    with small_file_system(tmp_path / "small", 24) as disk:
        yield disk


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A whole GGUF file of 8 MB that downloads in no time: llama.cpp could not run it."""
    return write_gguf(tmp_path / "small-Q8_0.gguf", tensors=8)


SMALL = "hf:org/small:small-Q8_0.gguf"


@pytest.mark.S40
@pytest.mark.P11
def test_a_model_larger_than_a_small_disk_is_refused_before_any_byte(server: Hub, small_disk: Path) -> None:
    done = run(server, small_disk / "models")
    assert (done.code, done.last["code"], server.downloads) == (1, "INSUFFICIENT_DISK", [])
    assert done.last["details"]["available_bytes"] <= 24 << 20
    assert "MB are free" in done.last["message"]


@pytest.mark.S41
def test_a_disk_that_fills_up_ends_the_download_and_leaves_nothing(server: Hub, small_disk: Path, small_model: Path) -> None:
    """SPEC S-41: somebody else fills the disk while bytes come; no retry storm, no partial file."""
    server.add("org/small", "small-Q8_0.gguf", small_model)

    def fill() -> None:
        with (small_disk / "filler").open("wb") as f, suppress(OSError):
            while True:
                f.write(bytes(1 << 20))
                f.flush()

    server.behaviour.halfway = fill
    done = run(server, small_disk / "models", SMALL)
    assert (done.code, done.last["code"]) == (1, "INSUFFICIENT_DISK")
    assert done.last["details"]["to_free_bytes"] > 0
    assert len(server.downloads) == 1
    assert [p.name for p in (small_disk / "models").rglob("*.gguf*")] == []
    for entry in store.read(small_disk / "models")[0]:  # a full disk may hold no entry either
        assert entry["status"] == "Failed"


@pytest.mark.E07
def test_killed_fifty_times_at_random_moments_it_always_goes_on_and_never_leaves_a_wrong_file(
    server: Hub, models_dir: Path, small_model: Path
) -> None:
    """SIGKILL for a process that imports once and forks for each try, so that fifty take seconds. Every other kill comes
    at a random time, the others after a random number of bytes: on a slow machine no byte may have come by any time."""
    digest = server.add("org/small", "small-Q8_0.gguf", small_model)
    server.behaviour.bytes_per_s = 30_000_000
    code = (
        "import os, random, signal, sys, time\n"
        "from pathlib import Path\n"
        "from rbee_serve.models import download\n"
        "rng = random.Random(int(sys.argv[1]))\n"
        "partial = Path(sys.argv[2])\n"
        "size = lambda: partial.stat().st_size if partial.exists() else 0\n"
        "n = killed = 0\n"
        "while killed < 50 and n < 1000:\n"
        "    n += 1\n"
        "    enough, end = size() + rng.randrange(1, int(sys.argv[3]) // 4), time.monotonic() + 60\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os._exit(download.main(sys.argv[4:]))\n"
        "    over = lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None\n"
        "    while n % 2 and size() < enough and not over() and time.monotonic() < end:\n"
        "        time.sleep(0.001)\n"
        "    time.sleep(0 if n % 2 else rng.uniform(0.0, 0.25))\n"
        "    os.kill(pid, signal.SIGKILL)\n"
        "    status = os.waitpid(pid, 0)[1]\n"
        "    killed += status == signal.SIGKILL\n"
        "    print(status, flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    final = models_dir / "org/small/small-Q8_0.gguf"
    size = str(small_model.stat().st_size)
    command = [sys.executable, "-c", code, "7", f"{final}.partial", size, *arguments(server, models_dir, SMALL)]
    killed = completed = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            killed += int(line) == signal.SIGKILL
            entries, problems = store.read(models_dir)
            assert problems == []
            if final.exists():
                assert sha256(final) == digest
            for entry in entries:
                assert entry["status"] == "Failed" or final.exists()
                if entry["status"] == "Ready":
                    completed += 1
                    store.delete(models_dir, entry)  # and again from the start
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert killed == 50
    resumed = [r for r in server.downloads if r.range]
    assert len(resumed) >= 10
    server.behaviour.bytes_per_s = None
    done = run(server, models_dir, SMALL)
    assert (done.code, sha256(final), done.last["model"]["status"]) == (0, digest, "Ready")


def test_a_file_that_only_lacks_its_entry_is_checked_and_not_fetched_again(
    server: Hub, models_dir: Path, small_model: Path
) -> None:
    server.add("org/small", "small-Q8_0.gguf", small_model)
    final = models_dir / "org/small/small-Q8_0.gguf"
    run(server, models_dir, SMALL)
    final.with_name("metadata.yaml").unlink()
    server.log.clear()
    assert run(server, models_dir, SMALL).code == 0
    assert server.downloads == []
    final.with_name("metadata.yaml").unlink()
    with final.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert run(server, models_dir, SMALL).code == 0
    assert len(server.downloads) == 1
    assert sha256(final) == sha256(small_model)


def test_a_split_model_is_one_model(server: Hub, models_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "parts"
    source.mkdir()
    write_gguf(source / "big-Q8_0.gguf", tensors=6, split_max_tensors=2)
    parts = sorted(p.name for p in source.iterdir())
    assert parts == [f"big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in parts:
        server.add("org/big", name, source / name)
    server.behaviour = Behaviour(reset_at=0.5, reset_count=1)
    done = run(server, models_dir, "hf:org/big:Q8_0")
    assert done.code == 0
    entry = done.last["model"]
    assert (entry["id"], entry["reference"]) == ("big-q8_0", "hf:org/big:big-Q8_0.gguf")
    assert entry["size_bytes"] == sum((source / n).stat().st_size for n in parts)
    assert entry["metadata"]["parameters"] == 6 * 512 * 512
    assert [Path(f["path"]).name for f in entry["files"]] == parts
    assert [f["sha256"] for f in entry["files"]] == [sha256(source / n) for n in parts]
    assert all(sha256(Path(f["path"])) == f["sha256"] for f in entry["files"])
    totals = {line["bytes_total"] for line in done.stages("downloading")}
    assert totals == {entry["size_bytes"]}
    server.log.clear()
    assert run(server, models_dir, "hf:org/big").last["downloaded"] is False
    assert server.log == []
    assert store.delete(models_dir, store.read(models_dir)[0][0]) == (entry["size_bytes"], [])


def test_a_hang_is_told_every_second(server: Hub, models_dir: Path, small_model: Path) -> None:
    server.add("org/small", "small-Q8_0.gguf", small_model)
    server.behaviour = Behaviour(stall_at=0.5, stall_count=1)
    done = run(server, models_dir, SMALL, stall_timeout_s=4.5)
    assert done.code == 0
    told = [line["human"].partition("no bytes for ")[2] for line in done.stages("downloading")]
    silent_s = [int(words.removesuffix(" s")) for words in told if words]
    assert len(silent_s) >= 4  # twice as many where nothing else wants the machine
    assert silent_s == sorted(silent_s)
    assert silent_s[-1] in (4, 5)
    assert "resuming small-Q8_0.gguf from" in done.stages("resuming")[0]["human"]


@pytest.mark.E16
def test_a_rate_limit_is_kept(server: Hub, models_dir: Path, small_model: Path) -> None:
    server.add("org/small", "small-Q8_0.gguf", small_model)
    began, began_at = time.monotonic(), time.time()
    done = run(server, models_dir, SMALL, bytes_per_s=4_000_000)
    assert done.code == 0
    assert time.monotonic() - began > small_model.stat().st_size / 4_000_000 * 0.9
    shown = [(line["at"] - began_at, line["bytes_downloaded"]) for line in done.stages("downloading")]
    assert len(shown) >= 3
    assert all(count <= 4_000_000 * (at + 0.01) + (1 << 18) for at, count in shown), shown  # at no moment more


@pytest.mark.E04
def test_who_comes_second_is_shown_how_far_the_first_one_is(server: Hub, models_dir: Path, small_model: Path) -> None:
    server.add("org/small", "small-Q8_0.gguf", small_model)
    server.behaviour.bytes_per_s = 2_500_000
    command = [sys.executable, "-m", "rbee_serve.models.download", *arguments(server, models_dir, SMALL)]
    command[command.index("--progress-file") + 1] = str(models_dir.with_suffix(".first"))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        partial = store.partial_path(models_dir / "org/small/small-Q8_0.gguf")
        while not store.in_use(partial):
            assert first.poll() is None
            time.sleep(0.01)
        second = run(server, models_dir, "hf:org/small:Q8_0")
    assert (first.returncode, second.code, second.last["downloaded"]) == (0, 0, False)
    seen = [line["bytes_downloaded"] for line in second.stages("downloading")]
    assert len({s for s in seen if s}) >= 2
    assert server.bytes_sent == small_model.stat().st_size


def test_an_address_with_a_digest_is_fetched_and_another_digest_refused(
    models_dir: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Hub
) -> None:
    """Over TLS with a certificate of its own, which the client must trust: nothing switches checking off."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run(
        [*request, "-keyout", str(key), "-out", str(certificate), *subject],
        check=True,
        capture_output=True,
    )
    digest = server.add("org/small", "small-Q8_0.gguf", small_model)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Hub(tmp_path / "hub") as secure:
        secure.server.socket = context.wrap_socket(secure.server.socket, server_side=True)
        address = f"https://localhost:{secure.server.server_address[1]}/cdn/org/small/small-Q8_0.gguf"
        refused = run(server, models_dir, f"{address}#sha256={digest}", tries=1)
        assert (refused.code, refused.last["code"]) == (1, "DOWNLOAD_FAILED")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        wrong = run(server, models_dir, f"{address}#sha256={'0' * 64}", tries=2)
        assert (wrong.code, wrong.last["code"]) == (1, "CHECKSUM_MISMATCH")
        assert list(models_dir.rglob("*.gguf*")) == []
        done = run(server, models_dir, f"{address}#sha256={digest}")
        # Another file of that name and size on the same host: each is what its reference says.
        data = bytearray(small_model.read_bytes())
        data[-1] ^= 1
        (tmp_path / "twin.gguf").write_bytes(data)
        other = server.add("org/twin", "small-Q8_0.gguf", tmp_path / "twin.gguf")
        twin = run(server, models_dir, f"{address.replace('/small/', '/twin/')}#sha256={other}")
    assert (twin.code, twin.last["model"]["sha256"]) == (0, other)
    assert [sha256(Path(run.last["model"]["path"])) for run in (done, twin)] == [digest, other]
    assert twin.last["model"]["id"] != done.last["model"]["id"]
    assert (done.code, done.last["model"]["provider"], done.last["model"]["sha256"]) == (0, "https", digest)
    assert {r.authorization for r in secure.log} == {None}
    assert run(server, models_dir, f"{address}#sha256={digest}").last["downloaded"] is False


def test_a_file_of_this_machine_must_have_the_digest_that_is_declared(server: Hub, models_dir: Path, small_model: Path) -> None:
    models_dir.mkdir(parents=True, exist_ok=True)
    (models_dir / "own.gguf").write_bytes(small_model.read_bytes())
    ref = f"file://{models_dir}/own.gguf"
    wrong = run(server, models_dir, ref, sha256="0" * 64)
    assert (wrong.code, wrong.last["code"]) == (1, "CHECKSUM_MISMATCH")
    assert run(server, models_dir, ref, sha256=sha256(small_model)).code == 0
    assert run(server, models_dir, ref, sha256="0" * 64).code == 1


@pytest.mark.S29
def test_a_file_that_is_no_gguf_is_not_kept(server: Hub, models_dir: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.write_bytes(b"<html>not found</html>")
    server.add("org/fake", "fake-Q4_0.gguf", fake)
    done = run(server, models_dir, "hf:org/fake")
    assert (done.code, done.last["code"]) == (1, "MODEL_FILE_INVALID")
    assert list(models_dir.rglob("*.gguf*")) == []


@pytest.mark.E07
def test_a_killed_download_is_shown_as_interrupted_and_goes_on_where_it_was(
    server: Hub, models_dir: Path, model_path: Path
) -> None:
    server.behaviour.bytes_per_s = 30_000_000
    command = [sys.executable, "-m", "rbee_serve.models.download", *arguments(server, models_dir)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    partial = store.partial_path(final_path(models_dir))
    try:
        while not partial.exists() or partial.stat().st_size < 20_000_000:
            assert process.poll() is None
            time.sleep(0.01)
        assert store.read(models_dir)[0][0]["status"] == "Downloading"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (entry,) = store.read(models_dir)[0]
    assert (entry["status"], "interrupted" in entry["problem"]) == ("Failed", True)
    kept = partial.stat().st_size
    server.behaviour.bytes_per_s = None
    done = run(server, models_dir)
    assert done.code == 0
    assert server.downloads[-1].range == f"bytes={kept}-"
    assert sha256(final_path(models_dir)) == sha256(model_path)


@pytest.mark.E04
def test_two_downloads_of_one_model_fetch_it_once(server: Hub, models_dir: Path) -> None:
    server.behaviour.bytes_per_s = 100_000_000
    results: list[int] = []

    def one(number: int) -> None:
        progress = models_dir.with_suffix(f".{number}")
        command = [sys.executable, "-m", "rbee_serve.models.download", *arguments(server, models_dir)]
        command[command.index("--progress-file") + 1] = str(progress)
        results.append(subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0]
    assert server.bytes_sent == final_path(models_dir).stat().st_size
    last = [json.loads(models_dir.with_suffix(f".{i}").read_text().splitlines()[-1]) for i in range(2)]
    assert sorted(line["downloaded"] for line in last) == [False, True]


def test_a_local_file_is_registered_only_beneath_the_roots(
    server: Hub, models_dir: Path, tmp_path: Path, model_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    models_dir.mkdir()
    (elsewhere / "m.gguf").symlink_to(model_path)
    (models_dir / "m.gguf").symlink_to(model_path)
    assert run(server, models_dir, f"file://{models_dir}/m.gguf").last["code"] == "INVALID_MODEL_REF"  # a link out of them
    assert run(server, models_dir, f"file://{elsewhere}/m.gguf").last["code"] == "INVALID_MODEL_REF"
    assert run(server, models_dir, f"file://{models_dir}/none.gguf").last["code"] == "MODEL_FILE_INVALID"
    done = run(server, models_dir, f"file://{elsewhere}/m.gguf", root=model_path.parent)
    assert done.last["stage"] == "complete"
    assert store.find(store.read(models_dir)[0], store.parse_ref(f"file://{elsewhere}/m.gguf")) == done.last["model"]
    assert server.log == []


def test_a_hub_that_is_not_there_is_reported_after_the_tries(models_dir: Path, server: Hub) -> None:
    client = hub.Hub("http://127.0.0.1:9", None, stall_timeout_s=1)
    with pytest.raises(hub.TransientError, match=r"127\.0\.0\.1:9"):
        client.resolve(store.parse_ref(REF))
    client.close()
