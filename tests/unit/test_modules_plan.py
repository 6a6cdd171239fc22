"""What worker start decides before it touches anything: SPEC S-33 to S-45, P-11."""

from __future__ import annotations

from typing import Any

import node_modules
import pytest
from ansible.module_utils.rbee_node import NodeError
from ansible.module_utils.rbee_plan import (
    check_device,
    check_memory,
    check_runtime,
    check_temperature,
    check_version,
    choose_name,
    choose_port,
    declared_names,
    instance,
    is_identical,
    preferred_device,
)

CPU = {"id": "cpu:0", "backend": "cpu", "device": 0, "name": "Xeon"}
GPU = {"id": "cuda:1", "backend": "cuda", "device": 1, "name": "H200", "memory_free_bytes": 2_000_000_000}
MODEL = {"id": "m", "size_bytes": 1_000_000_000}


def request(**changes: Any) -> dict[str, Any]:
    return {"backend": "cpu", "device": 0, "model": "m", **changes}


def refusal(function: Any, *args: Any) -> NodeError:
    with pytest.raises(NodeError) as e:
        function(*args)
    assert e.value.hint
    return e.value


@pytest.mark.parametrize(
    ("wanted", "code", "words"),
    [
        (request(backend="tpu"), "INVALID_BACKEND", "'tpu'"),
        (request(backend="metal"), "BACKEND_UNAVAILABLE", "available: cpu"),
        (request(backend="cuda"), "BACKEND_UNAVAILABLE", "available: cpu"),
        (request(device=5), "DEVICE_OUT_OF_RANGE", "device 5"),
    ],
)
@pytest.mark.S38
@pytest.mark.S39
def test_what_the_machine_does_not_have_is_refused(wanted: dict[str, Any], code: str, words: str) -> None:
    error = refusal(check_device, wanted, [CPU])
    assert error.code == code
    assert words in error.message


def test_no_accelerator_request_falls_back_to_the_cpu() -> None:
    assert check_device(request(backend="cuda", device=1), [GPU, CPU]) is GPU
    assert refusal(check_device, request(backend="cuda", device=0), [GPU, CPU]).details == {"device": 0, "available": [1]}


def test_a_request_without_a_device_gets_the_one_with_most_free_memory() -> None:
    """SPEC E-12."""
    small, large = {**GPU, "device": 0, "memory_free_bytes": 1}, {**GPU, "device": 3, "memory_free_bytes": 9}
    assert check_device(request(backend="cuda", device=None), [small, large, GPU, CPU]) is GPU
    assert check_device(request(backend="cuda", device=None), [small, large, CPU]) is large
    unknown = [{**GPU, "device": n, "memory_free_bytes": None} for n in (0, 1)]
    assert check_device(request(backend="cuda", device=None), unknown)["device"] == 0
    there = {"cuda0": settings(backend="cuda", device=0)}
    assert preferred_device(request(backend="cuda", device=None), there, "m") == 0
    assert preferred_device(request(backend="cuda", device=None), there, "other") is None


def test_a_device_over_the_limit_takes_no_new_worker() -> None:
    """SPEC E-14."""
    error = refusal(check_temperature, {**GPU, "temperature_celsius": 90}, 87)
    assert (error.code, error.details) == ("GPU_TOO_HOT", {"temperature_celsius": 90, "limit_celsius": 87})
    assert check_temperature({**GPU, "temperature_celsius": 86}, 87) == "cuda:1 is at 86 C"
    assert check_temperature(GPU, 87) is None


def test_a_model_without_figures_needs_one_point_two_times_the_file() -> None:
    said = check_memory(MODEL, CPU, 1_200_000_000)
    assert said == ("RAM: needs 1200 MB (1.2 x 1000 MB), 1200 MB available", 1_200_000_000, 1_200_000_000)
    error = refusal(check_memory, MODEL, CPU, 1_199_999_999)
    assert error.code == "INSUFFICIENT_RAM"
    assert error.details == {
        "required_bytes": 1_200_000_000,
        "available_bytes": 1_199_999_999,
        "model_size_bytes": 1_000_000_000,
        "elsewhere": [],
    }


#: SmolLM2-135M: the figures of its header.
FIGURES = {
    "layers": 30,
    "context_trained": 8192,
    "vocab_size": 49152,
    "parameters": 134_515_008,
    "quantization": "Q8_0",
    "memory": {
        "weight_bytes": 143_000_000,
        "embedding_bytes": 30_000_000,
        "tied": True,
        "embedding_length": 576,
        "feed_forward_length": 1536,
        "heads": 9,
        "heads_kv": 3,
    },
}
REAL = {"id": "q8", "size_bytes": 145_000_000, "status": "Ready", "metadata": FIGURES}
SMALLER = {
    **REAL,
    "id": "q4",
    "size_bytes": 90_000_000,
    "metadata": {**FIGURES, "quantization": "Q4_0", "memory": {**FIGURES["memory"], "weight_bytes": 88_000_000}},  # type: ignore[dict-item]
}


def test_slots_and_context_count_by_the_model_s_own_figures() -> None:
    kv = 30 * 4096 * 3 * 64 * 2 * 2  # layers, context, KV heads, head, key and value, f16: of one slot
    words, four, _ = check_memory(REAL, CPU, 10**10)
    _, one, _ = check_memory(REAL, CPU, 10**10, {"slots": 1})
    assert 3 * kv <= four - one < 3 * kv + 1_000_000
    assert "KV cache of 4 x 4096 tokens 377 MB" in words
    assert "at least 1.2 x 145 MB" in words
    _, half, _ = check_memory(REAL, CPU, 10**10, {"kv_type": "q8_0"})
    assert kv < four - half < 2 * kv
    _, cut, _ = check_memory(REAL, CPU, 10**10, {"context_tokens": 100_000, "slots": 1})
    _, trained, _ = check_memory(REAL, CPU, 10**10, {"context_tokens": 8192, "slots": 1})
    assert cut == trained  # a context is never longer than the model's own


def test_a_refusal_names_only_what_would_work() -> None:
    _, four, _ = check_memory(REAL, CPU, 10**10)
    error = refusal(check_memory, REAL, CPU, four - 1, {}, [REAL, SMALLER], ["node2"])
    assert "--slots 3 fits" in str(error.hint)
    assert "--context-tokens 2048 fits" in str(error.hint)
    assert "--model q4 (Q4_0, 90 MB) fits" in str(error.hint)
    assert "--node node2 has room" in str(error.hint)
    nothing = refusal(check_memory, REAL, CPU, 1_000_000, {}, [REAL, SMALLER], [])
    assert "fits" not in str(nothing.hint)
    assert "stop another worker" in str(nothing.hint)


def test_the_second_look_right_before_the_start_says_that_less_is_free() -> None:
    """SPEC E-13."""
    preflight = node_modules.load("library", "rbee_preflight")
    params = {"mem_available_bytes": 2_000_000_000, "elsewhere": [], "previous_available_bytes": None}
    found: dict[str, Any] = {"model": MODEL}
    first = preflight.memory(params, found, {}, CPU, [])
    assert first.startswith("RAM: needs 1200 MB")
    assert (found["required_bytes"], found["available_bytes"]) == (1_200_000_000, 2_000_000_000)
    again = preflight.memory(params | {"previous_available_bytes": 2_500_000_000}, found, {}, CPU, [])
    assert again.startswith("500 MB less are free than at the first look; RAM: needs 1200 MB")
    same = preflight.memory(params | {"previous_available_bytes": 2_000_000_000}, found, {}, CPU, [])
    assert same == first
    shrunk = params | {"previous_available_bytes": 2_500_000_000, "mem_available_bytes": 1_000_000_000}
    assert refusal(preflight.memory, shrunk, found, {}, CPU, []).code == "INSUFFICIENT_RAM"


@pytest.mark.S37
@pytest.mark.S59
def test_an_accelerator_is_judged_by_its_own_memory() -> None:
    assert "2000 MB available" in check_memory(MODEL, GPU, 1)[0]
    assert refusal(check_memory, {**MODEL, "size_bytes": 3_000_000_000}, GPU, 10**12).code == "VRAM_EXHAUSTED"
    assert "does not tell" in check_memory(MODEL, {**GPU, "memory_free_bytes": None}, 1)[0]


def test_a_missing_runtime_names_the_path_that_was_expected() -> None:
    assert check_runtime("cpu", ["/opt/rbee/runtimes/cpu/2", "/opt/rbee/runtimes/cpu/1"], "/opt/rbee", "x") == (
        "/opt/rbee/runtimes/cpu/2"
    )
    error = refusal(check_runtime, "cpu", [], "/opt/rbee", "ansible-playbook site.yml --limit n1")
    assert error.code == "WORKER_BINARY_NOT_FOUND"
    assert "/opt/rbee/runtimes/cpu/" in error.message


def test_declared_workers_without_a_name_are_called_by_their_device() -> None:
    assert declared_names([{"backend": "cpu"}, {"backend": "cuda", "device": 1, "name": "cuda1-b"}]) == ["cpu0", "cuda1-b"]


def settings(**changes: Any) -> dict[str, Any]:
    return {"backend": "cpu", "device": 0, "model_id": "m", "port": 8001, "slots": 4, **changes}


def test_the_instance_that_has_the_model_is_taken_and_else_a_free_name() -> None:
    assert choose_name(request(), "m", {}, set(), []) == ("cpu0", None)
    assert choose_name(request(), "m", {"cpu0-b": settings()}, set(), []) == ("cpu0-b", settings())
    assert choose_name(request(), "m", {"cpu0": settings(model_id="other")}, set(), []) == ("cpu0-b", None)
    assert choose_name(request(), "m", {}, set(), ["cpu0"]) == ("cpu0-b", None)  # cpu0 is declared and not made yet
    two = {"cpu0": settings(model_id="x"), "cpu0-b": settings(model_id="y")}
    assert choose_name(request(), "m", two, set(), []) == ("cpu0-c", None)


def test_a_declared_instance_never_gets_another_model_and_one_made_by_hand_does() -> None:
    other = {"cpu0": settings(model_id="other")}
    error = refusal(choose_name, request(name="cpu0"), "m", other, set(), [])
    assert (error.code, error.details["declared_model"]) == ("INVALID_REQUEST", "other")
    assert choose_name(request(name="cpu0"), "m", other, {"cpu0"}, []) == ("cpu0", other["cpu0"])


@pytest.mark.parametrize("name", ["gpu0", "cpu1", "cpu0b", "CPU0", "cpu0-B", "../cpu0", "cpu0.service", ""])
def test_a_name_must_fit_backend_and_device(name: str) -> None:
    assert refusal(choose_name, request(name=name), "m", {}, set(), []).details == {"field": "name"}


def test_a_second_identical_request_is_recognised() -> None:
    assert is_identical(request(), settings(), "m")
    assert is_identical(request(slots=4), settings(), "m")
    assert not is_identical(request(slots=2), settings(), "m")
    assert not is_identical(request(), settings(), "other")


def test_ports_are_kept_asked_for_or_the_next_that_is_free() -> None:
    assert choose_port(request(), None, {}, set(), []) == (8001, None)
    assert choose_port(request(), settings(port=9000), {}, {9000}, []) == (9000, None)
    assert choose_port(request(port=8500), settings(), {}, set(), []) == (8500, None)
    assert choose_port(request(), None, {"cpu0": settings()}, {8001}, []) == (8002, None)
    assert choose_port(request(), None, {}, set(), ["cpu0", "cpu1"]) == (8003, None)  # 8001 and 8002 are the declared ones'
    assert choose_port(request(), None, {"a": settings(port=8002)}, set(), ["cpu0"])[0] == 8003


def test_a_port_that_a_stranger_has_is_passed_over_and_said() -> None:
    port, said = choose_port(request(), None, {}, {8001, 8002}, [])
    assert port == 8003
    assert said == "port 8001, 8002 is taken by another process; using 8003"


def test_the_instance_keeps_what_the_request_does_not_mention() -> None:
    made = instance(request(slots=2), {"id": "m"}, settings(threads=3), "cpu0", 8001, ["cpu0"])
    assert made == {
        "name": "cpu0",
        "unit": "rbee-worker@cpu0.service",
        "backend": "cpu",
        "device": 0,
        "model": "m",
        "port": 8001,
        "slots": 2,
        "threads": 3,
        "state": "present",
        "by_hand": False,
    }


@pytest.mark.S19
@pytest.mark.S66
def test_other_versions_of_node_and_controller_are_refused_and_the_older_side_is_named() -> None:
    check_version("0.10.0", {"version": "0.10.0", "name": "lab1"})
    check_version(None, {"version": "0.1.0"})  # a playbook without rbee-ctl
    node = refusal(check_version, "0.10.0", {"version": "0.9.1", "name": "lab1"})
    assert (node.code, node.hint) == ("VERSION_MISMATCH", "rbee-ctl upgrade --node lab1")
    assert "0.9.1" in node.message
    assert "0.10.0" in node.message
    controller = refusal(check_version, "0.9.1", {"version": "0.10.0", "name": "lab1"})
    assert controller.hint == "pip install --upgrade 'rbee[ctl]==0.10.0'"
