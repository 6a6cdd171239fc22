"""Models, preflight and runtimes by rbee-ctl on booted machines: OP-02 to OP-05, OP-11 to OP-13, S-30, S-37, E-06, E-12, E-14."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from machines import Fleet, Lab
from waiting import until

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
@pytest.mark.E06
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
@pytest.mark.P11
@pytest.mark.E14
def test_a_gpu_without_room_and_one_that_is_hot_take_no_worker(fleet: Fleet, two_gpus: str) -> None:
    start = ("worker", "start", "--node", two_gpus, "--model", MODEL_ID, "--backend", "cuda")
    full = asked(fleet.lab, *start, "--device", "1", code=5)["errors"][0]
    assert full["code"] == "VRAM_EXHAUSTED"
    assert full["details"]["available_bytes"] == 50 << 20
    assert full["details"]["required_bytes"] > full["details"]["available_bytes"]
    hot = asked(fleet.lab, *start, "--device", "0", code=5)["errors"][0]
    assert (hot["code"], hot["details"]["temperature_celsius"]) == ("GPU_TOO_HOT", 91)
    chosen = asked(fleet.lab, *start, code=5)["errors"][0]  # without --device: the cool one, which has no room
    assert (chosen["code"], chosen["details"]["available_bytes"]) == ("VRAM_EXHAUSTED", 50 << 20)
    assert "cuda" not in fleet.lab.ssh(two_gpus, "ls /etc/rbee/workers").stdout


@pytest.mark.P11
@pytest.mark.S34
def test_what_a_refusal_suggests_is_what_the_machines_then_take(fleet: Fleet) -> None:
    """Two machines: the full one names itself with fewer slots, and the other one; both are taken at their word."""
    lab, name = fleet.lab, "cpu0-e"
    variables = lab.directory / "host_vars/lab2.yml"
    variables.parent.mkdir(exist_ok=True)
    variables.write_text("---\nrbee_preflight_mem_available_bytes: 450000000\n")
    start = ("worker", "start", "--model", MODEL_ID, "--name", name)
    try:
        refused = asked(lab, *start, "--node", "lab2", code=5)["errors"][0]
        assert refused["code"] == "INSUFFICIENT_RAM"
        # What is free, and the weights that another worker has mapped: they are shared.
        assert 450_000_000 <= refused["details"]["available_bytes"] < refused["details"]["required_bytes"]
        assert refused["details"]["elsewhere"] == ["lab1"]
        fewer = re.search(r"--slots (\d) fits", refused["hint"])  # how many depends on what is mapped here already
        assert fewer
        assert "--node lab1 has room" in refused["hint"]
        assert name not in lab.ssh("lab2", "ls /etc/rbee/workers; systemctl list-units --all 'rbee-worker@*'").stdout
        started = [asked(lab, *start, "--node", "lab2", "--slots", fewer[1]), asked(lab, *start, "--node", "lab1")]
        assert [w["data"]["worker"]["worker_id"] for w in started] == [f"lab2-{name}", f"lab1-{name}"]
        # Nobody has room: no machine is named.
        (variables.parent / "lab1.yml").write_text("---\nrbee_preflight_mem_available_bytes: 64000000\n")
        large = ("worker", "start", "--model", MODEL_ID, "--name", "cpu0-f", "--node", "lab2", "--slots", "8")
        nobody = asked(lab, *large, code=5)
        assert nobody["errors"][0]["details"]["elsewhere"] == []
        assert "--node" not in nobody["errors"][0]["hint"]
        # With more memory the very same command passes.
        variables.unlink()
        assert asked(lab, *large)["data"]["worker"]["worker_id"] == "lab2-cpu0-f"
    finally:
        for node, instance in (("lab1", name), ("lab2", name), ("lab2", "cpu0-f")):
            (variables.parent / f"{node}.yml").unlink(missing_ok=True)
            unit = f"rbee-worker@{instance}.service"
            files = f"/etc/rbee/workers/{instance}.toml /etc/rbee/workers/{instance}.runtime"
            lab.ssh(node, f"systemctl disable --now {unit}; systemctl reset-failed {unit}; rm -f {files}", check=False)


def test_runtimes_are_listed_kept_while_used_and_built_only_with_a_toolkit(fleet: Fleet) -> None:
    lab = fleet.lab
    listed = asked(lab, "runtime", "list", "--node", "lab2")["data"]["hosts"]["lab2"]["runtimes"]
    used = next(r for r in listed if "cpu0" in r["used_by"])
    assert used["worker_type"] == "cpu-llm-worker"
    assert used["size_bytes"] > 50_000_000
    arguments = ("--node", "lab2", "--type", "cpu", "--version", used["version"])
    kept = asked(lab, "worker", "binary", "delete", *arguments, "--yes", code=5)["errors"][0]
    assert kept["code"] == "WORKER_BINARY_IN_USE"
    for kind, tool in (("cuda", "nvcc"), ("rocm", "hipcc")):
        lacking = asked(lab, "worker", "build", "--node", "lab2", "--type", kind, code=1)["errors"][0]
        assert lacking["code"] == "MISSING_DEPENDENCY"
        assert tool in lacking["details"]["missing"]
    left = "find /opt/rbee/runtimes/cuda /opt/rbee/runtimes/rocm /var/lib/rbee -path '*/build-*' -o -path '*/runtimes/*' -type f"
    assert lab.ssh("lab2", left, check=False).stdout == ""
    after = asked(lab, "worker", "binary", "list", "--node", "lab2")["data"]["hosts"]["lab2"]["runtimes"]
    assert [r["path"] for r in after] == [r["path"] for r in listed]


def libraries(lab: Lab, node: str) -> list[str]:
    """Versions of the runtimes whose llama.cpp the processes of the worker cpu0 have mapped."""
    look = "grep -ho '/opt/rbee/runtimes/cpu/[^ ]*/libllama.so' /proc/$p/maps"
    main = "$(systemctl show -p MainPID --value rbee-worker@cpu0)"
    mapped = lab.ssh(node, f"m={main}; for p in $m $(pgrep -P $m); do {look}; done | sort -u").stdout
    return [line.split("/")[5] for line in mapped.split()]


def served_by(fleet: Fleet, node: str) -> str:
    """Version of the runtime with which the worker cpu0 makes a token now."""
    body = {"worker_id": f"{node}-cpu0", "prompt": "Bees are", "max_tokens": 2, "stream": False}
    ask = {"url": f"{fleet.queen_url}/v1/inference", "json": body, "headers": fleet.headers}
    until(lambda: httpx.post(**ask, timeout=60, trust_env=False).status_code == 200, f"the worker of {node} serves", limit_s=60)
    (version,) = libraries(fleet.lab, node)
    return version


def test_a_chosen_runtime_stays_over_the_next_deployment_and_is_told(fleet: Fleet) -> None:
    """SPEC OP-05: switched by hand, kept by site.yml, told by drift, and gone back from."""
    lab, on = fleet.lab, ("--node", "lab2", "--type", "cpu")
    link = "readlink /etc/rbee/workers/cpu0.runtime /opt/rbee/runtimes/cpu/current"
    release = lab.ssh("lab2", link).stdout.split()
    assert release[0] == release[1]
    wheels = sorted((default_cache() / "wheels").glob("*/llama_cpp_python-*.whl"))
    made = asked(lab, "runtime", "download", *on, "--source", str(wheels[-1]))["data"]["hosts"]["lab2"]["runtime"]
    before = Path(release[0]).name
    home = f"/opt/rbee/runtimes/cpu/{made['version']}"
    try:
        assert served_by(fleet, "lab2") == before
        # One that can not load: the worker is back on the old one, and serves.
        lab.ssh("lab2", f"mv $(find {home} -name libllama.so) /root/")
        failed = asked(lab, "runtime", "use", *on, "--version", made["version"], code=1)["errors"][0]
        assert failed["code"] == "UNIT_START_FAILED"
        assert f"all of cpu0 runs {before} again" in failed["message"]
        assert lab.ssh("lab2", link).stdout.split() == release
        assert served_by(fleet, "lab2") == before
        lab.ssh("lab2", f"mv /root/libllama.so $(dirname $(find {home} -name libggml.so))/")

        used = asked(lab, "runtime", "use", *on, "--version", made["version"])["data"]["hosts"]["lab2"]
        assert (used["previous"], used["moved"]) == (before, ["cpu0"])
        assert served_by(fleet, "lab2") == made["version"]
        site = lab.playbook("site", "--limit", "lab2")
        assert "changed=0 " in site.stdout, site.stdout[-2000:]
        assert {Path(p).name for p in lab.ssh("lab2", link).stdout.split()} == {made["version"]}
        told = asked(lab, "drift", "--node", "lab2", code=6)
        assert "chosen runtime" in json.dumps(told)
    finally:
        asked(lab, "runtime", "use", *on, "--version", before)
        asked(lab, "runtime", "delete", *on, "--version", made["version"], "--yes")
    assert lab.ssh("lab2", link).stdout.split() == release
    assert served_by(fleet, "lab2") == before
    assert "chosen runtime" not in json.dumps(lab.ctl("drift", "--node", "lab2", "--json", timeout=180).stdout)
