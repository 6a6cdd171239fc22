"""What rbee's Ansible modules read on a node: parsers and figures."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import node_modules
import pytest
from ansible.module_utils import rbee_devices, rbee_node
from ansible.module_utils.basic import AnsibleModule

from rbee_serve.contract.errors import BY_CODE
from rbee_serve.contract.settings import BACKEND_NAMES

SHOW = """\
Id=rbee-worker@cpu0.service
LoadState=loaded
ActiveState=active
SubState=running
Result=success
NRestarts=2
MainPID=364
StatusText=m on cpu:0, 2 slots = fine
UnitFileState=enabled

Id=rbee-hive.target
LoadState=not-found
ActiveState=inactive
SubState=dead
"""


def test_a_socket_without_an_address_is_not_loaded_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is given as a pattern, for which systemd looks at what is loaded."""
    asked: list[str] = []
    monkeypatch.setattr(rbee_node, "UNIT_DIR", str(tmp_path))
    monkeypatch.setattr(rbee_node, "run", lambda *argv, **_: (0, asked.extend(argv[argv.index("--") + 1 :]) or SHOW, ""))
    (tmp_path / "rbee-worker@cpu1.socket.d").mkdir()
    (tmp_path / "rbee-worker@cpu2.socket").symlink_to("/dev/null")  # masked
    sockets = [f"rbee-worker@cpu{n}.socket" for n in range(3)]
    found = rbee_node.show("rbee-worker@*.socket", "rbee-worker@cpu0.service", *sockets)
    assert asked == ["rbee-worker@*.socket", "rbee-worker@cpu0.service", "rbee-worker@cpu0.[s]ocket", *sockets[1:]]
    assert (found[sockets[0]]["LoadState"], found[sockets[0]]["ActiveState"]) == ("bad-setting", "inactive")
    assert found["rbee-worker@cpu0.service"]["MainPID"] == "364"


def test_systemctl_show_is_parsed_with_all_its_units() -> None:
    worker, target = rbee_node.parse_show(SHOW)
    assert rbee_node.unit_row(worker) == {
        "unit": "rbee-worker@cpu0.service",
        "active_state": "active",
        "sub_state": "running",
        "result": "success",
        "n_restarts": 2,
        "main_pid": 364,
        "status_text": "m on cpu:0, 2 slots = fine",
        "enabled": True,
    }
    assert rbee_node.unit_row(target)["main_pid"] == 0
    with pytest.raises(rbee_node.NodeError) as e:
        rbee_node.require_hive(target, "ansible-playbook site.yml --limit n1")
    assert (e.value.code, e.value.hint) == ("MISSING_DEPENDENCY", "ansible-playbook site.yml --limit n1")


@pytest.mark.parametrize(
    ("props", "running", "up", "settled"),
    [
        ({"ActiveState": "active", "SubState": "running"}, True, True, True),
        ({"ActiveState": "activating", "SubState": "start"}, True, True, False),
        ({"ActiveState": "activating", "SubState": "auto-restart", "NRestarts": "0"}, True, False, False),
        ({"ActiveState": "activating", "SubState": "auto-restart", "NRestarts": "1"}, True, False, True),
        ({"ActiveState": "deactivating", "SubState": "stop-sigterm"}, True, True, False),
        ({"ActiveState": "failed", "SubState": "failed"}, False, False, True),
        ({"ActiveState": "failed", "SubState": "failed", "MainPID": "12"}, True, True, True),
        ({"ActiveState": "inactive", "SubState": "dead"}, False, False, True),
        ({"ActiveState": "inactive", "SubState": "dead", "Job": "77"}, False, False, False),
    ],
)
def test_states_of_a_unit(props: dict[str, str], running: bool, up: bool, settled: bool) -> None:
    """The last row: a start that systemd has queued but not begun is not over."""
    assert rbee_node.running(props) is running
    assert rbee_node.up(props) is up
    assert rbee_node.settled(props) is settled


def test_instances_are_the_settings_files_with_an_instance_name(tmp_path: Path) -> None:
    workers = tmp_path / "workers"
    workers.mkdir()
    (workers / "cpu0.toml").write_text('name = "cpu0"\nport = 8001\n')
    (workers / "cuda1-b.toml").write_text("broken = [")
    (workers / "NOTES.toml").write_text("")
    (workers / "cpu1.toml.bak").write_text("")
    assert rbee_node.instances(str(tmp_path)) == {"cpu0": {"name": "cpu0", "port": 8001}, "cuda1-b": {}}
    assert rbee_node.unit_instance(rbee_node.worker_unit("cuda1-b")) == "cuda1-b"


def test_a_runtime_counts_only_with_its_metadata_and_an_interpreter(tmp_path: Path) -> None:
    """metadata.yaml is written last: without it the installation broke off."""
    for version, complete in (("1", True), ("2", False)):
        home = tmp_path / "runtimes" / "cpu" / version
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "python").touch(0o755)
        if complete:
            (home / "metadata.yaml").touch()
    (tmp_path / "runtimes" / "cpu" / "3").mkdir()
    (tmp_path / "runtimes" / "cpu" / "3" / "metadata.yaml").touch()
    assert rbee_node.runtimes(str(tmp_path), "cpu") == [str(tmp_path / "runtimes" / "cpu" / "1")]
    assert rbee_node.runtimes(str(tmp_path), "cuda") == []
    assert rbee_node.any_runtime_python(str(tmp_path)) == str(tmp_path / "runtimes" / "cpu" / "1" / "bin" / "python")


def test_ports_are_read() -> None:
    tcp = (
        "  sl  local_address rem_address   st tx_queue\n"
        "   0: 0100007F:1F41 00000000:0000 0A 00000000:00000000\n"
        "   1: 0100007F:1F42 0100007F:0016 01 00000000:00000000\n"
    )
    assert rbee_node.parse_listening(tcp) == {8001}


def test_a_program_that_fails_is_named_with_what_it_said() -> None:
    assert rbee_node.run("no-such-program-anywhere")[0] == 127
    with pytest.raises(rbee_node.NodeError, match="exit code 3: because"):
        rbee_node.run("sh", "-c", "echo because >&2; exit 3", check=True)


def test_every_backend_name_of_the_contract_is_known() -> None:
    assert rbee_devices.BACKENDS == BACKEND_NAMES


NVIDIA_SMI = """#!/bin/sh
case "$*" in
*=uuid,memory.total*) echo "GPU-1, 143771" ;;
*) echo "0, GPU-1, NVIDIA H200, 143771, 2000, 570.86.15, 9.0, 40" ;;
esac
"""


def test_nvidia_devices_are_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one where there is one; else one that says what a real one said."""
    if shutil.which("nvidia-smi") is None:
        (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [d for d in rbee_devices.devices() if d["backend"] == "cuda"]
    assert [f"{d['uuid']}, {d['memory_bytes'] >> 20}" for d in found] == told
    assert all(0 < d["memory_free_bytes"] <= d["memory_bytes"] for d in found)


def test_nvidia_devices_with_and_without_free_memory() -> None:
    text = "0, GPU-1, NVIDIA H200, 143771, 2000, 570.86.15, 9.0\n1, GPU-2, NVIDIA GB10, [N/A], [N/A], 580.1, 12.1\n"
    first, second = rbee_devices.parse_nvidia(text)
    assert (first["id"], first["memory_bytes"], first["memory_free_bytes"]) == ("cuda:0", 143771 << 20, 2000 << 20)
    assert (second["id"], second["memory_bytes"], second["compute_capability"]) == ("cuda:1", None, "12.1")
    (old,) = rbee_devices.parse_nvidia("0, GPU-1, NVIDIA H200, 143771, 570.86.15, 9.0\n")
    assert (old["driver"], old["memory_free_bytes"], old["temperature_celsius"]) == ("570.86.15", None, None)
    (hot,) = rbee_devices.parse_nvidia("0, GPU-1, NVIDIA H200, 143771, 2000, 570.86.15, 9.0, 91\n")
    assert hot["temperature_celsius"] == 91
    assert rbee_devices.parse_nvidia("NVIDIA-SMI has failed because it couldn't communicate\n") == []


def test_rocm_and_vulkan_devices() -> None:
    text = (
        '{"card0": {"Card Series": "MI300X", "VRAM Total Memory (B)": "100", "VRAM Total Used Memory (B)": "30"}, "system": {}}'
    )
    (card,) = rbee_devices.parse_rocm(text)
    assert (card["id"], card["memory_bytes"], card["memory_free_bytes"]) == ("rocm:0", 100, 70)
    assert rbee_devices.parse_rocm("no json") == []
    vulkan = "\tdeviceName         = AMD Radeon (RADV)\n\tdeviceName         = llvmpipe (LLVM 15)\n"
    assert [d["id"] for d in rbee_devices.parse_vulkan(vulkan)] == ["vulkan:0"]


def test_this_machine_has_a_cpu() -> None:
    cpu = rbee_devices.devices()[-1]
    assert (cpu["id"], cpu["backend"]) == ("cpu:0", "cpu")
    assert cpu["cores"] >= 1
    assert cpu["memory_bytes"] > cpu["memory_free_bytes"] > 0


@pytest.mark.parametrize("name", sorted(p.stem for p in (node_modules.ROLE / "library").glob("*.py")))
def test_a_module_documents_what_it_takes_and_returns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented options are those that the module accepts."""
    import yaml

    module = node_modules.load("library", name)
    documentation = yaml.safe_load(module.DOCUMENTATION)
    assert documentation["module"] == name
    assert yaml.safe_load(module.RETURN)
    assert yaml.safe_load(module.EXAMPLES)
    if not hasattr(module, "main"):
        return
    seen: dict[str, object] = {}

    def capture(self: object, argument_spec: dict[str, object], **kwargs: object) -> None:
        seen.update(argument_spec, supports_check_mode=kwargs.get("supports_check_mode"))
        raise SystemExit

    monkeypatch.setattr(AnsibleModule, "__init__", capture)
    with pytest.raises(SystemExit):
        module.main()
    assert seen.pop("supports_check_mode") is True
    assert set(seen) == set(documentation["options"])
    for option, spec in seen.items():
        documented = documentation["options"][option]
        assert isinstance(spec, dict)
        assert spec.get("default") == documented.get("default"), option
        assert spec.get("type", "str") == documented["type"], option


def test_codes_of_the_modules_are_those_of_the_contract() -> None:
    import re

    sources = [*(node_modules.ROLE / "library").glob("*.py"), *(node_modules.ROLE / "module_utils").glob("*.py")]
    text = "\n".join(p.read_text() for p in sources)
    codes = set(re.findall(r'(?:NodeError|CatalogError)\(\s*"([A-Z_]+)"', text))
    assert {"MODEL_NOT_FOUND", "INVALID_MODEL_REF", "BACKEND_UNAVAILABLE"} <= codes
    assert codes <= set(BY_CODE)


def test_drop_ins_are_written_once_and_taken_away_with_their_folder(tmp_path: Path) -> None:
    unit = node_modules.load("library", "rbee_worker_unit")
    params = {"name": "cpu0", "service": "[Service]\nMemoryMax=1G\n", "socket": "", "unit_dir": str(tmp_path)}
    service, socket = unit.drop_ins(params).items()
    assert service[0] == tmp_path / "rbee-worker@cpu0.service.d/50-rbee.conf"
    assert (socket[0].parent.name, socket[1]) == ("rbee-worker@cpu0.socket.d", None)
    rbee_node.write_drop_in(*service)
    rbee_node.write_drop_in(*socket)
    assert unit.current(service[0]) == f"{unit.HEADER}[Service]\nMemoryMax=1G\n"
    assert service[0].stat().st_mode & 0o777 == 0o644
    (service[0].parent / "90-admin.conf").write_text("[Service]\nNice=5\n")
    rbee_node.write_drop_in(service[0], None)
    assert [p.name for p in tmp_path.rglob("*.conf")] == ["90-admin.conf"]
    (service[0].parent / "90-admin.conf").unlink()
    rbee_node.write_drop_in(service[0], None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_with_both_figures(tmp_path: Path) -> None:
    room = node_modules.load("library", "rbee_room")
    assert room.check(tmp_path / "not/there/yet", 1, "a runtime") > 0
    with pytest.raises(
        rbee_node.NodeError, match=r"no space left for a runtime: \S+ has \d+ MB free, about 1000000000 MB are needed"
    ) as e:
        room.check(tmp_path, 10**15, "a runtime")
    assert e.value.code == "DISK_FULL"
    assert e.value.details["required_bytes"] == 10**15


@pytest.mark.S44
def test_a_runtime_that_is_gone_when_its_unit_starts_is_told_by_exit_status_203(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's 203/EXEC: the link leads to no program. The process wrote nothing; systemd's own line stands in the journal."""
    line = "rbee-worker@cpu0.service: Failed to locate executable /etc/rbee/workers/cpu0.runtime/bin/rbee-worker: No such file"
    monkeypatch.setattr(rbee_node, "journal", lambda *_, own=False, **__: [] if own else [line])
    failed = {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "203"}
    error = rbee_node.start_failure("rbee-worker@cpu0.service", failed)
    assert error.code == "WORKER_BINARY_NOT_FOUND"
    assert error.message == f"rbee-worker@cpu0.service did not start: its program is not there (203/EXEC): {line}"
    assert (error.hint, error.details["exit_status"]) == ("journalctl -u rbee-worker@cpu0.service -n 50", "203")
    other = rbee_node.start_failure("rbee-worker@cpu0.service", {**failed, "ExecMainStatus": "1"})
    assert (other.code, "203" in other.message) == ("UNIT_START_FAILED", False)


@pytest.mark.E40
@pytest.mark.parametrize(
    ("said", "code"),
    [
        (
            "out of memory, nothing was loaded: the model needs 900 MB of memory (weights 800 MB)",
            "INSUFFICIENT_RAM",
        ),
        ("out of memory, nothing was loaded: the model needs 900 MB of memory of CUDA0 (...)", "VRAM_EXHAUSTED"),
        ("out of memory, nothing was loaded: llama.cpp could not allocate memory of CUDA0, though it seemed", "VRAM_EXHAUSTED"),
        ("out of memory, nothing was loaded: llama.cpp could not allocate memory, though it seemed", "INSUFFICIENT_RAM"),
        ("the device CUDA0 failed while the model was being loaded: ggml_cuda_init: failed to initialize", "CUDA_DEVICE_FAILED"),
        ("killed by SIGABRT; its last words: llama.cpp: CUDA error: unspecified launch failure | ...", "CUDA_DEVICE_FAILED"),
        ("killed by SIGABRT; its last words: llama.cpp: CUDA error: out of memory | x.cu:109: CUDA error", "UNIT_START_FAILED"),
        ("model file invalid", "UNIT_START_FAILED"),
    ],
)
def test_a_worker_that_did_not_start_is_told_by_what_it_said_itself(
    said: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rbee_node, "journal", lambda *_, **__: [said])
    error = rbee_node.start_failure("rbee-worker@cuda0.service", {"Result": "exit-code", "ExecMainStatus": "1"})
    assert (error.code, error.details["journal"]) == (code, [said])
    assert error.message.endswith(said)


def test_what_a_service_said_is_told_in_words() -> None:
    line = '{"time":"2026-01-01T00:00:00Z","level":"critical","logger":"rbee","message":"model not loaded","exit_code":1}'
    assert rbee_node.as_words(line) == "critical rbee: model not loaded exit_code=1"
    assert rbee_node.as_words('{"time": half') == '{"time": half'
    assert rbee_node.as_words("Main process exited") == "Main process exited"
