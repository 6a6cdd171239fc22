"""Models, preflight and runtimes by rbee-ctl on booted machines: OP-02 to OP-05, OP-11 to OP-13, S-30, S-37, E-06, E-12, E-14."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import Fleet, Lab

from rbee_ctl.demo_model import MODEL_ID, SHA256, default_cache

SHIM = "/usr/local/bin/nvidia-smi"


def asked(lab: Lab, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run rbee-ctl with --json; returns the envelope."""
    done = lab.ctl(*arguments, "--json", timeout=180)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    envelope: dict[str, Any] = json.loads(done.stdout)
    return envelope


@pytest.mark.S30
@pytest.mark.S32
def test_the_catalog_of_a_machine_is_listed_and_a_model_in_use_stays(fleet: Fleet) -> None:
    lab, broken = fleet.lab, "/var/lib/rbee/models/broken/one"
    lab.ssh("lab2", f"mkdir -p {broken} && echo 'a: [' > {broken}/metadata.yaml")
    try:
        found = asked(lab, "model", "list", "--node", "lab2")["data"]["hosts"]["lab2"]
        aside = lab.ssh("lab2", f"ls {broken}").stdout.split()
    finally:
        lab.ssh("lab2", f"rm -r {broken}")
    model = next(m for m in found["models"] if m["id"] == MODEL_ID)
    assert (model["status"], model["sha256"], "cpu0" in model["used_by"]) == ("Ready", SHA256, True)
    assert found["disk"]["free_bytes"] > 0
    assert [p for p in found["problems"] if broken in p["path"]]
    assert aside == ["metadata.yaml.corrupt"]

    got = asked(lab, "model", "get", "--node", "lab2", MODEL_ID)["data"]["hosts"]["lab2"]["model"]
    assert got["size_bytes"] == int(lab.ssh("lab2", f"stat -c %s {got['path']}").stdout)
    assert (got["metadata"]["vocab_size"], got["metadata"]["eos_id"], got["metadata"]["layers"]) == (49152, 2, 30)

    refused = asked(lab, "model", "delete", "--node", "lab2", MODEL_ID, "--yes", code=5)["errors"][0]
    assert refused["code"] == "MODEL_IN_USE"
    assert "cpu0" in refused["details"]["workers"]
    assert "lab2-cpu0" in refused["hint"]


@pytest.fixture
def two_gpus(fleet: Fleet, tmp_path: Path) -> Iterator[str]:
    """Two GPUs as their driver would tell of them: the first is hot and has room, the second is cool and full.

    The runtime is the CPU's under another name: nothing may come so far as to run it.
    """
    rows = "0, GPU-a, NVIDIA H200, 143771, 100000, 570.86.15, 9.0, 91\n1, GPU-b, NVIDIA H200, 143771, 50, 570.86.15, 9.0, 40\n"
    fleet.lab.ssh(
        "lab2", f"printf '#!/bin/sh\\ncat <<X\\n{rows}X\\n' > {SHIM}; chmod 755 {SHIM}; ln -sfn cpu /opt/rbee/runtimes/cuda"
    )
    asked(fleet.lab, "hive", "refresh", "--node", "lab2")  # an earlier look has seen no GPU
    yield "lab2"
    fleet.lab.ssh("lab2", f"rm -f {SHIM} /opt/rbee/runtimes/cuda")
    asked(fleet.lab, "hive", "refresh", "--node", "lab2")


@pytest.mark.S37
@pytest.mark.S59
def test_a_gpu_without_room_and_one_that_is_hot_take_no_worker(fleet: Fleet, two_gpus: str) -> None:
    start = ("worker", "start", "--node", two_gpus, "--model", MODEL_ID, "--backend", "cuda")
    full = asked(fleet.lab, *start, "--device", "1", code=5)["errors"][0]
    assert full["code"] == "VRAM_EXHAUSTED"
    assert full["details"]["available_bytes"] == 50 << 20
    assert full["details"]["required_bytes"] > full["details"]["available_bytes"]
    hot = asked(fleet.lab, *start, code=5)["errors"][0]  # without --device: the one with room is chosen, and refused
    assert (hot["code"], hot["details"]["temperature_celsius"]) == ("GPU_TOO_HOT", 91)
    assert "cuda" not in fleet.lab.ssh(two_gpus, "ls /etc/rbee/workers").stdout


def test_runtimes_are_listed_kept_while_used_and_built_only_with_a_toolkit(fleet: Fleet) -> None:
    lab = fleet.lab
    listed = asked(lab, "runtime", "list", "--node", "lab2")["data"]["hosts"]["lab2"]["runtimes"]
    used = next(r for r in listed if "cpu0" in r["used_by"])
    assert used["worker_type"] == "cpu-llm-worker"
    assert used["size_bytes"] > 50_000_000
    arguments = ("--node", "lab2", "--type", "cpu", "--version", used["version"])
    kept = asked(lab, "worker", "binary", "delete", *arguments, "--yes", code=5)["errors"][0]
    assert kept["code"] == "WORKER_BINARY_IN_USE"
    lacking = asked(lab, "worker", "build", "--node", "lab2", "--type", "cuda", code=1)["errors"][0]
    assert lacking["code"] == "MISSING_DEPENDENCY"
    assert "nvcc" in lacking["details"]["missing"]
    after = asked(lab, "worker", "binary", "list", "--node", "lab2")["data"]["hosts"]["lab2"]["runtimes"]
    assert [r["path"] for r in after] == [r["path"] for r in listed]


def test_a_chosen_runtime_stays_over_the_next_deployment_and_is_told(fleet: Fleet) -> None:
    """SPEC OP-05: switched by hand, kept by site.yml, told by drift, and gone back from."""
    lab, on = fleet.lab, ("--node", "lab2", "--type", "cpu")
    link = "readlink /etc/rbee/workers/cpu0.runtime /opt/rbee/runtimes/cpu/current"
    release = lab.ssh("lab2", link).stdout.split()
    assert release[0] == release[1]
    wheels = sorted((default_cache() / "wheels").glob("*/llama_cpp_python-*.whl"))
    made = asked(lab, "runtime", "download", *on, "--source", str(wheels[-1]))["data"]["hosts"]["lab2"]["runtime"]
    try:
        used = asked(lab, "runtime", "use", *on, "--version", made["version"])["data"]["hosts"]["lab2"]
        assert (used["previous"], used["moved"]) == (Path(release[0]).name, ["cpu0"])
        site = lab.playbook("site", "--limit", "lab2")
        assert "changed=0 " in site.stdout, site.stdout[-2000:]
        assert {Path(p).name for p in lab.ssh("lab2", link).stdout.split()} == {made["version"]}
        told = asked(lab, "drift", "--node", "lab2", code=6)
        assert "chosen runtime" in json.dumps(told)
    finally:
        asked(lab, "runtime", "use", *on, "--version", Path(release[0]).name)
        asked(lab, "runtime", "delete", *on, "--version", made["version"], "--yes")
    assert lab.ssh("lab2", link).stdout.split() == release
    assert "chosen runtime" not in json.dumps(lab.ctl("drift", "--node", "lab2", "--json", timeout=180).stdout)
