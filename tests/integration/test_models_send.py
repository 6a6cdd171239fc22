"""A model that the controller sends: roles/rbee_hive/action_plugins/rbee_send.py by a real ansible-playbook, then the check.

The connection is Ansible's local one: the same shell on the other side, and the same bytes through its standard input.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from demands import demand_root, small_file_system
from hub import Behaviour, Hub

from rbee_serve.models import download, store

pytestmark = pytest.mark.integration

ROLE = Path(__file__).resolve().parents[2] / "roles/rbee_hive"
NAMES = [f"big-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split model of 6 MB in three parts; returns its folder."""
    import numpy as np
    from gguf import GGUFWriter

    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(1)
    writer = GGUFWriter(folder / "big-Q8_0.gguf", arch="llama", split_max_tensors=2)
    writer.add_block_count(2)
    for i in range(6):
        writer.add_tensor(f"blk.{i}.weight", rng.random((512, 512), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert sorted(p.name for p in folder.iterdir()) == NAMES
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def send(
    tmp_path: Path, source: Path, dest: Path, on_line: Callable[[str], None] = lambda _: None, **options: Any
) -> tuple[dict[str, Any], str]:
    """Run the action; returns its result and what was printed, of which ``on_line`` got each line as it came."""
    task = {"files": [str(source)], "dest": str(dest), "owner": "root", **options}
    return play(tmp_path, {"rbee_send": task}, on_line)


def play(tmp_path: Path, task: dict[str, Any], on_line: Callable[[str], None], **environment: str) -> tuple[dict[str, Any], str]:
    """Run a task here; returns its result and what was printed."""
    kept = {"copy": {"content": "{{ sent | to_json }}", "dest": f"{tmp_path}/result.json"}}
    plays = [
        {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "tasks": [{"block": [{**task, "register": "sent"}], "always": [kept]}],
        }
    ]
    (tmp_path / "play.yml").write_text(json.dumps(plays))
    environ = {
        **os.environ,
        **environment,
        "ANSIBLE_ACTION_PLUGINS": str(ROLE / "action_plugins"),
        "ANSIBLE_LIBRARY": str(ROLE / "library"),
    }
    command = ["ansible-playbook", "-i", "localhost,", str(tmp_path / "play.yml")]
    said = ""
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            said += line
            on_line(line)
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    assert (process.returncode == 0) == (not result.get("failed")), said
    return result, said


def checked(models: Path, dest: Path, sent: list[dict[str, Any]], *more: str) -> tuple[int, dict[str, Any]]:
    """Run what the node runs then; returns exit code and last line."""
    progress = models.with_suffix(".jsonl")
    told = [x for f in sent for x in ("--sent", f"{f['name']}:{f['size_bytes']}:{f['sha256'] or ''}")]
    base = ["--ref", "hf:org/big:Q8_0", "--models-dir", str(models), "--home", str(dest), "--progress-file", str(progress)]
    code = download.main([*base, *told, *more])
    return code, json.loads(progress.read_text().splitlines()[-1])


def test_a_split_model_is_sent_whole_and_goes_on_where_it_broke(tmp_path: Path, parts: Path) -> None:
    """What lies there of the first part is kept; of the second it is another file's, and is replaced."""
    models, dest = tmp_path / "models", tmp_path / "models/org/big"
    dest.mkdir(parents=True)
    (dest / f"{NAMES[0]}.partial").write_bytes((parts / NAMES[0]).read_bytes()[:1_500_000])
    (dest / f"{NAMES[1]}.partial").write_bytes(bytes(700_000))
    result, said = send(tmp_path, parts / NAMES[1], dest)
    sizes = [(parts / n).stat().st_size for n in NAMES]
    assert result["sent_bytes"] == sum(sizes) - 1_500_000
    assert [(f["name"], f["sha256"]) for f in result["files"]] == [(n, sha256(parts / n)) for n in NAMES]
    assert f"rbee: localhost: resuming {NAMES[0]} from" in said
    assert f"resuming {NAMES[1]}" not in said
    assert f"copying {NAMES[2]}: {sum(sizes) / 1e6:.1f} of {sum(sizes) / 1e6:.1f} MB (100 %)" in said
    assert not list(dest.glob("*.gguf"))  # no name before the check

    code, last = checked(models, dest, result["files"])
    assert (code, last["stage"], last["downloaded"]) == (0, "complete", True)
    (entry,), problems = store.read(models)
    assert (problems, entry["status"], entry["reference"]) == ([], "Ready", "hf:org/big:Q8_0")
    assert [Path(f["path"]).name for f in entry["files"]] == NAMES
    assert not list(dest.glob("*.partial"))
    again, _ = send(tmp_path, parts / NAMES[0], dest)
    assert (again["changed"], again["sent_bytes"]) == (False, 0)


def test_a_copy_that_arrived_damaged_gets_no_name(tmp_path: Path, parts: Path) -> None:
    models, dest = tmp_path / "models", tmp_path / "models/org/big"
    result, _ = send(tmp_path, parts / NAMES[0], dest)
    with (dest / f"{NAMES[1]}.partial").open("r+b") as f:
        f.seek(1_000_000)
        f.write(b"x")
    code, last = checked(models, dest, result["files"])
    assert (code, last["code"]) == (1, "CHECKSUM_MISMATCH")
    # The other parts wait for the next try; none has its name.
    assert {p.name for p in dest.iterdir() if p.suffix != ".yaml"} == {f"{NAMES[0]}.partial", f"{NAMES[2]}.partial"}
    again = send(tmp_path, parts / NAMES[0], dest)[0]["files"]
    os.truncate(dest / f"{NAMES[2]}.partial", 1000)
    code, last = checked(models, dest, again)
    assert (code, last["code"], "1000 of" in last["message"]) == (1, "DOWNLOAD_FAILED", True)
    (dest / f"{NAMES[2]}.partial").write_bytes((parts / NAMES[2]).read_bytes())
    code, last = checked(models, dest, again, "--sha256", "0" * 64)
    assert (code, last["code"]) == (1, "CHECKSUM_MISMATCH")


def test_a_part_that_is_missing_on_the_controller_is_named(tmp_path: Path, parts: Path) -> None:
    (tmp_path / NAMES[0]).symlink_to(parts / NAMES[0])
    result, _ = send(tmp_path, tmp_path / NAMES[0], tmp_path / "models/org/big")
    assert result["rbee_error"]["code"] == "MODEL_FILE_INVALID"
    assert all(name in result["msg"] for name in NAMES[1:])
    assert not (tmp_path / "models").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MB."""
    with small_file_system(tmp_path / "small", 10) as disk:
        yield disk


@pytest.mark.S40
@pytest.mark.S41
@pytest.mark.P02
def test_a_disk_without_room_takes_no_byte_and_one_that_fills_up_keeps_none(
    small_disk: Path, tmp_path: Path, parts: Path
) -> None:
    """A real small file system; while the model comes somebody else eats what is left of it."""
    dest = small_disk / "models/org/big"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(6_000_000))
    full, _ = send(tmp_path, parts / NAMES[0], dest)
    assert full["rbee_error"]["code"] == "INSUFFICIENT_DISK"
    figures = full["rbee_error"]["details"]
    assert figures["required_bytes"] > 6_000_000 > figures["available_bytes"]
    assert not list(dest.iterdir())
    filler.unlink()

    def fill() -> None:
        end = time.monotonic() + 60
        while not any(p.stat().st_size > 500_000 for p in dest.glob("*.partial")):
            assert time.monotonic() < end
            time.sleep(0.005)
        with filler.open("wb", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(1 << 16))
            except OSError:
                pass

    eater = threading.Thread(target=fill)
    eater.start()
    filled, _ = send(tmp_path, parts / NAMES[0], dest, bytes_per_s=2_000_000)
    eater.join()
    assert filled["rbee_error"]["code"] == "INSUFFICIENT_DISK"
    assert filled["rbee_error"]["details"]["to_free_bytes"] > 0
    assert all(p.stat().st_size == (parts / p.stem).stat().st_size for p in dest.glob("*.partial"))  # whole ones may stay


def test_who_finds_another_download_at_work_waits_for_it(tmp_path: Path, parts: Path) -> None:
    dest = tmp_path / "models/org/big"
    dest.mkdir(parents=True)
    partial = dest / f"{NAMES[0]}.partial"
    whole = (parts / NAMES[0]).read_bytes()
    with partial.open("wb", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(whole[:100_000] + bytes(1000))  # differs from what would be sent: nobody takes it from who works on it

        sizes = []

        def finish(line: str) -> None:
            if "waiting for it" in line:
                sizes.append(partial.stat().st_size)
                f.seek(0)
                f.write(whole)
                partial.rename(dest / NAMES[0])
                fcntl.flock(f, fcntl.LOCK_UN)

        result, said = send(tmp_path, parts / NAMES[0], dest, finish)
    assert sizes == [101_000]
    assert f"another download of {NAMES[0]} is running; waiting for it" in said
    assert sha256(dest / NAMES[0]) == sha256(parts / NAMES[0])
    code, last = checked(tmp_path / "models", dest, result["files"])
    assert (code, last["stage"]) == (0, "complete")


def one_file(path: Path, *, seed: int) -> Path:
    """Write a model in one file, of a size that does not depend on ``seed``."""
    import numpy as np
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, arch="llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.weight", np.random.default_rng(seed).random((512, 512), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_version_of_the_same_size_is_sent_and_the_one_in_use_stays_until_it_is_whole(tmp_path: Path) -> None:
    models, dest = tmp_path / "models", tmp_path / "models/org/big"
    old, new = (one_file(tmp_path / str(seed) / "big-Q8_0.gguf", seed=seed) for seed in (1, 2))
    assert old.stat().st_size == new.stat().st_size
    result, _ = send(tmp_path, old, dest, sha256=sha256(old))
    assert checked(models, dest, result["files"], "--sha256", sha256(old))[0] == 0

    # Somebody takes away what was sent before it is checked: the old one is no worse for it.
    asked = [{"name": new.name, "size_bytes": new.stat().st_size, "sha256": sha256(new)}]
    code, last = checked(models, dest, asked, "--sha256", sha256(new))
    assert (code, last["code"], sha256(dest / old.name)) == (1, "DOWNLOAD_FAILED", sha256(old))

    result, _ = send(tmp_path, new, dest, sha256=sha256(new))
    assert (result["sent_bytes"], sha256(dest / old.name)) == (new.stat().st_size, sha256(old))
    with (dest / old.name).open("rb") as in_use:
        assert checked(models, dest, result["files"], "--sha256", sha256(new))[0] == 0
        assert hashlib.file_digest(in_use, "sha256").hexdigest() == sha256(old)
    assert sha256(dest / new.name) == sha256(new)
    (entry,), _ = store.read(models)
    assert (entry["status"], entry["sha256"]) == ("Ready", sha256(new))


def test_what_is_no_model_does_not_take_the_place_of_one(tmp_path: Path) -> None:
    models, dest = tmp_path / "models", tmp_path / "models/org/big"
    old = one_file(tmp_path / "1/big-Q8_0.gguf", seed=1)
    assert checked(models, dest, send(tmp_path, old, dest)[0]["files"])[0] == 0
    (tmp_path / "2").mkdir()
    (junk := tmp_path / "2/big-Q8_0.gguf").write_bytes(b"junk" * 1000)
    result, _ = send(tmp_path, junk, dest)
    code, last = checked(models, dest, result["files"], "--sha256", sha256(junk))
    assert (code, last["code"], last["details"]["path"]) == (1, "MODEL_FILE_INVALID", str(dest / old.name))
    assert sha256(dest / old.name) == sha256(old)
    assert not list(dest.glob("*.partial"))


def test_a_split_model_with_its_digest_whose_entry_is_lost_is_found_again(tmp_path: Path, parts: Path) -> None:
    models, dest = tmp_path / "models", tmp_path / "models/org/big"
    dest.mkdir(parents=True)
    for name in NAMES:
        (dest / name).write_bytes((parts / name).read_bytes())
    whole = store.digest_of_parts([sha256(parts / n) for n in NAMES])
    result, _ = send(tmp_path, parts / NAMES[0], dest, sha256=whole)
    assert (result["changed"], result["sent_bytes"]) == (False, 0)
    assert [f["sha256"] for f in result["files"]] == [sha256(parts / n) for n in NAMES]
    code, last = checked(models, dest, result["files"], "--sha256", whole)
    assert (code, last["stage"]) == (0, "complete")
    refused, _ = send(tmp_path, parts / NAMES[0], dest, sha256="0" * 64)
    assert refused["rbee_error"]["code"] == "CHECKSUM_MISMATCH"


def test_a_line_that_is_cut_holds_the_lock_no_longer_than_its_silence(tmp_path: Path, parts: Path) -> None:
    """What is left of it on the node is a process whose input neither brings a byte nor ends."""
    dest = tmp_path / "models/org/big"
    dest.mkdir(parents=True)
    partial, whole = dest / f"{NAMES[0]}.partial", (parts / NAMES[0]).read_bytes()
    action = runpy.run_path(str(ROLE / "action_plugins/rbee_send.py"))
    words = ["append", str(partial), str(partial), "0", "1000000", "3"]
    command = ["sh", "-c", action["AS_OWNER"], "rbee-send", "root", action["PROGRAM"], *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cut:
        assert cut.stdin
        cut.stdin.write(whole[:600_000])
        cut.stdin.flush()
        end = time.monotonic() + 60
        while not partial.exists() or partial.stat().st_size < 600_000:
            assert time.monotonic() < end
            time.sleep(0.01)
        result, _ = send(tmp_path, parts / NAMES[0], dest)  # ends while the cut line is still open
        assert cut.wait(60) == 0
    assert result["sent_bytes"] == sum((parts / n).stat().st_size for n in NAMES) - 600_000
    assert [sha256(dest / f"{n}.partial") for n in NAMES] == [sha256(parts / n) for n in NAMES]


def test_another_download_that_brings_nothing_is_named_and_not_waited_for_for_ever(tmp_path: Path, parts: Path) -> None:
    dest = tmp_path / "models/org/big"
    dest.mkdir(parents=True)
    with (dest / f"{NAMES[0]}.partial").open("wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        result, said = send(tmp_path, parts / NAMES[0], dest, wait_s=2)
    assert result["rbee_error"]["code"] == "DOWNLOAD_TIMEOUT"
    assert f"another download holds {f.name} and has brought nothing for 2 s" in result["msg"]
    assert "waiting for it" in said


@pytest.fixture
def owned() -> Iterator[Path]:
    """A folder of the user daemon's, in the way of nobody."""
    demand_root("acting as another user")
    with tempfile.TemporaryDirectory(prefix="rbee-send-") as folder:
        Path(folder).chmod(0o755)
        models = Path(folder, "models")
        models.mkdir()
        shutil.chown(models, "daemon", "daemon")
        yield models


def test_a_link_that_the_owner_planted_leads_root_nowhere(owned: Path, tmp_path: Path, parts: Path) -> None:
    """A partial that is a link to root's file, and a folder that is one to root's folder."""
    secret, folder = owned.parent / "shadow", owned.parent / "etc"
    secret.write_text("root:secret\n")
    secret.chmod(0o600)
    folder.mkdir()
    before = [p.stat() for p in (secret, folder)]
    dest = owned / "org/big"
    dest.mkdir(parents=True)
    for made in (dest.parent, dest):
        shutil.chown(made, "daemon", "daemon")
    (dest / f"{NAMES[0]}.partial").symlink_to(secret)
    (owned / "planted").symlink_to(folder)
    refused, _ = send(tmp_path, parts / NAMES[0], dest, owner="daemon")
    assert refused["rbee_error"]["code"] == "DOWNLOAD_FAILED"
    refused, _ = send(tmp_path, parts / NAMES[0], owned / "planted/big", owner="daemon")
    assert (refused["rbee_error"]["code"], "Permission denied" in refused["msg"]) == ("DOWNLOAD_FAILED", True)
    assert [p.stat() for p in (secret, folder)] == before
    assert secret.read_text() == "root:secret\n"
    assert not list(folder.iterdir())

    (dest / f"{NAMES[0]}.partial").unlink()
    result, _ = send(tmp_path, parts / NAMES[0], owned / "new/big", owner="daemon")
    assert result["sent_bytes"] > 6_000_000
    found = [owned / "new", *(owned / "new").rglob("*")]
    assert {(p.owner(), p.stat().st_mode & 0o022) for p in found} == {("daemon", 0)}
    assert len(found) == 2 + len(NAMES)


def test_the_hubs_token_comes_from_a_file_at_home_and_is_in_no_environment(tmp_path: Path) -> None:
    """What fetches on the controller is looked at while it does; ``~`` is the home of whoever runs it."""
    model = one_file(tmp_path / "m-Q8_0.gguf", seed=1)
    (tmp_path / "token").write_text("hf_of_the_file\n")
    seen: list[bytes] = []

    def look(_: str) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"--models-dir={tmp_path}".encode() in (words := (process / "cmdline").read_bytes()):
                    seen.append(words + (process / "environ").read_bytes())
            except OSError:
                pass

    with Hub(tmp_path / "hub", behaviour=Behaviour(token="hf_of_the_file", bytes_per_s=250_000)) as hub:
        hub.add("org/m", model.name, model)
        task = {"ref": "hf:org/m", "models_dir": f"{tmp_path}/cache", "endpoint": hub.url, "token_file": "~/token"}
        home = {"HOME": str(tmp_path), "HF_TOKEN": ""}
        result, said = play(tmp_path, {"rbee_fetch": task}, look, **home)
        assert result["model"]["status"] == "Ready", said
        assert any(b"rbee_serve.models.download" in words for words in seen)
        assert not any(b"hf_of_the_file" in words for words in seen)
        task |= {"token_file": "~/none"}
        refused, said = play(tmp_path, {"rbee_fetch": task}, lambda _: None, **home)
    assert f"rbee_hub_token_file: {tmp_path}/none: No such file" in refused["msg"], said


def test_a_secret_that_stays_is_written_once_and_by_no_file_on_its_way(tmp_path: Path) -> None:
    """What the queen's role hands over so; looking changes nothing, and what is there is replaced whole."""
    tasks = yaml.safe_load((ROLE.parent / "rbee_queen/tasks/jobs_keys.yml").read_text())
    (given,) = [t for t in tasks if t["name"] == "Job keys | Deliver the hub's token"]
    dest, temporary = tmp_path / "jobs-hub-token", tmp_path / "tmp"

    def run(token: str, **keywords: bool) -> bool:
        task = {"rbee_secret": {**given["rbee_secret"], "dest": str(dest)}, "vars": {"rbee_queen_jobs_hub_token": token}}
        places = {"ANSIBLE_LOCAL_TEMP": str(temporary), "ANSIBLE_REMOTE_TEMP": str(temporary), "ANSIBLE_KEEP_REMOTE_FILES": "1"}
        changed: bool = play(tmp_path, {**task, **keywords}, lambda _: None, **places)[0]["changed"]
        return changed

    assert [run("hf_1", check_mode=True), dest.exists()] == [True, False]
    assert [run("hf_1"), run("hf_1"), run("hf_1", check_mode=True)] == [True, False, False]
    assert (dest.read_text(), dest.stat().st_mode & 0o777) == ("hf_1\n", 0o600)
    assert [run("hf_2", check_mode=True), dest.read_text()] == [True, "hf_1\n"]
    assert [run("hf_2"), dest.read_text()] == [True, "hf_2\n"]
    left = [p.read_bytes() for p in temporary.rglob("*") if p.is_file()]
    assert left, "the copy of the result leaves its files, so that one of the secret would be here too"
    assert not any(b"hf_" in data for data in left)
    assert not dest.with_name("jobs-hub-token.new").exists()
