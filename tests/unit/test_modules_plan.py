"""What worker start decides before it touches anything: SPEC S-33 to S-45, P-11."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import node_modules
import pytest
from ansible.module_utils import rbee_ledger
from ansible.module_utils.rbee_fit import check_memory, parse_size
from ansible.module_utils.rbee_ledger import Ledger
from ansible.module_utils.rbee_node import NodeError
from ansible.module_utils.rbee_plan import (
    check_device,
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


@pytest.mark.E40
def test_no_accelerator_request_falls_back_to_the_cpu() -> None:
    assert check_device(request(backend="cuda", device=1), [GPU, CPU]) is GPU
    assert refusal(check_device, request(backend="cuda", device=0), [GPU, CPU]).details == {"device": 0, "available": [1]}


@pytest.mark.E12
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


@pytest.mark.E12
@pytest.mark.E14
def test_a_device_that_is_too_hot_is_chosen_for_nobody_while_another_is_cool() -> None:
    hot = {**GPU, "device": 0, "memory_free_bytes": 9, "temperature_celsius": 87}
    cooler = {**GPU, "device": 2, "memory_free_bytes": 5, "temperature_celsius": 86}
    unknown = {**GPU, "device": 3, "memory_free_bytes": 4}
    wanted = request(backend="cuda", device=None)
    assert check_device(wanted, [hot, cooler, unknown, CPU], 87) is cooler
    assert check_device(wanted, [hot, unknown, CPU], 87) is unknown
    assert check_device(wanted, [hot, {**cooler, "temperature_celsius": 90}, CPU], 87) is hot, "which is then refused by name"
    assert check_device(wanted, [hot, cooler, CPU], 88) is hot
    assert check_device(request(backend="cuda", device=0), [hot, cooler, CPU], 87) is hot, "never another than the one asked for"


@pytest.mark.E14
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
        "needs": {"ram": 1_200_000_000, "device": 0},
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


@pytest.mark.E13
def test_the_second_look_right_before_the_start_says_that_less_is_free() -> None:
    """SPEC E-13."""
    preflight = node_modules.load("library", "rbee_preflight")
    params = {"mem_available_bytes": 2_000_000_000, "elsewhere": [], "previous_available_bytes": None}
    found: dict[str, Any] = {"model": MODEL}
    free = Ledger(2_000_000_000, [CPU], {})
    first = preflight.memory(params, found, {}, CPU, [], free)
    assert first.startswith("RAM: needs 1200 MB")
    assert (found["required_bytes"], found["available_bytes"]) == (1_200_000_000, 2_000_000_000)
    again = preflight.memory(params | {"previous_available_bytes": 2_500_000_000}, found, {}, CPU, [], free)
    assert again.startswith("500 MB less are free than at the first look; RAM: needs 1200 MB")
    same = preflight.memory(params | {"previous_available_bytes": 2_000_000_000}, found, {}, CPU, [], free)
    assert same == first
    shrunk = params | {"previous_available_bytes": 2_500_000_000}
    assert refusal(preflight.memory, shrunk, found, {}, CPU, [], Ledger(1_000_000_000, [CPU], {})).code == "INSUFFICIENT_RAM"


def test_a_peer_that_has_not_got_the_model_needs_room_for_its_file_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight = node_modules.load("library", "rbee_preflight")
    monkeypatch.setattr(rbee_ledger, "mapped", dict)
    needs = {"ram": 10**9, "device": 0, "disk": 5 * 10**9}
    params = {"mem_available_bytes": 10**9, "ask_only": needs, "models_dir": "/var/lib/rbee/models", "gpu_max_celsius": 87}
    for free, room in ((5 * 10**9 + (1 << 20), True), (5 * 10**9, False)):  # a download leaves 1 MiB free
        monkeypatch.setattr(preflight, "disk_free", lambda folder, free=free: free if folder == "/var/lib/rbee/models" else 0)
        assert preflight.fits(params, {"model": None, "device": CPU}) is room
        assert preflight.fits(params, {"model": MODEL, "device": CPU}) is True, "nothing is to be fetched"
    assert preflight.fits(params | {"mem_available_bytes": 10**9 - 1}, {"model": None, "device": CPU}) is False
    monkeypatch.setattr(preflight, "disk_free", lambda _: 10**10)
    for celsius, room in ((86, True), (87, False)):
        assert preflight.fits(params, {"model": None, "device": {**GPU, "temperature_celsius": celsius}}) is room


def test_the_disk_is_that_of_the_folder_above_where_a_folder_is_not_there_yet(tmp_path: Path) -> None:
    preflight = node_modules.load("library", "rbee_preflight")
    assert preflight.disk_free(str(tmp_path / "not/yet")) > 0


@pytest.mark.S37
@pytest.mark.S59
def test_an_accelerator_is_judged_by_its_own_memory() -> None:
    assert "2000 MB available" in check_memory(MODEL, GPU, 10**10)[0]
    assert refusal(check_memory, {**MODEL, "size_bytes": 3_000_000_000}, GPU, 10**12).code == "VRAM_EXHAUSTED"
    assert "does not tell" in check_memory(MODEL, {**GPU, "memory_free_bytes": None}, 10**10)[0]


@pytest.mark.S37
def test_an_accelerator_s_worker_needs_a_share_of_the_machine_s_own_memory_too() -> None:
    """Processes, the driver's libraries and the token embedding stay in RAM, however much room the device has."""
    roomy = {**GPU, "memory_free_bytes": 10**12}
    said, required, free = check_memory(REAL, roomy, 10**10)
    assert (required > 600_000_000, free) == (True, 10**12), "the device's figures come first"
    assert "; RAM: needs " in said
    short = refusal(check_memory, REAL, roomy, 450_000_000)
    assert short.code == "INSUFFICIENT_RAM"
    assert 500_000_000 < short.details["required_bytes"] == short.details["needs"]["ram"] < 700_000_000
    assert short.details["needs"]["device"] == required
    assert check_memory(REAL, roomy, short.details["required_bytes"])
    small = {**REAL, "metadata": {**FIGURES, "memory": {**FIGURES["memory"], "embedding_bytes": 0}}}  # type: ignore[dict-item]
    assert check_memory(small, roomy, short.details["required_bytes"] - 30_000_000)


def test_a_limit_on_the_unit_counts_like_memory_that_is_not_there() -> None:
    _, four, _ = check_memory(REAL, CPU, 10**10)
    error = refusal(lambda: check_memory(REAL, CPU, 10**10, {}, limit=four - 1))
    assert (error.code, error.details["available_bytes"]) == ("INSUFFICIENT_RAM", four - 1)
    assert "memory_max" in error.message
    assert "--slots 3 fits" in str(error.hint)
    assert [parse_size(t) for t in ("12G", "900M", "1048576", "infinity", "50%", None, "")] == [
        12 << 30, 900 << 20, 1 << 20, None, None, None, None,
    ]  # fmt: skip


#: As REAL, of a type that llama.cpp maps.
MAPPED = {
    **REAL,
    "path": "/m/q8.gguf",
    "metadata": {**FIGURES, "memory": {**FIGURES["memory"], "matrix_types": [0, 8]}},  # type: ignore[dict-item]
}


def test_weights_that_are_mapped_already_are_shared_by_those_that_map_them_and_by_nobody_else() -> None:
    _, four, _ = check_memory(MAPPED, CPU, 10**10)
    there = {"/m/q8.gguf": 140_000_000, "/m/other.gguf": 10**9}
    assert check_memory(MAPPED, CPU, four - 140_000_000, shared=there)
    assert refusal(lambda: check_memory(MAPPED, CPU, four - 140_000_001, shared=there)).code == "INSUFFICIENT_RAM"
    copied = {**MAPPED, "metadata": {**FIGURES, "memory": {**FIGURES["memory"], "matrix_types": [0, 2]}}}  # type: ignore[dict-item]
    assert refusal(lambda: check_memory(copied, CPU, four - 1, shared=there)).code == "INSUFFICIENT_RAM"


def test_a_device_needs_what_the_model_s_figures_say_and_no_multiple_of_its_file() -> None:
    """A model of 9/10 of a card's memory fits it; of RAM there must be 1.2 times the file at least."""
    large = {**REAL, "size_bytes": 10**12}
    _, needed, _ = check_memory(large, {**GPU, "memory_free_bytes": 10**12}, 10**12)
    assert needed < 10**12
    assert refusal(lambda: check_memory(large, CPU, 10**12)).details["required_bytes"] == 1.2 * 10**12
    words, _, _ = check_memory(large, CPU, 10**12, {"memory_check": False})
    assert "loaded all the same (memory_check = false)" in words


def test_two_workers_that_fit_one_by_one_do_not_fit_together() -> None:
    _, need_, _ = check_memory(REAL, CPU, 10**10)
    ledger = Ledger(2 * need_ - 1, [CPU], {})
    ledger.take(REAL, "cpu:0", {})
    error = refusal(ledger.take, REAL, "cpu:0", {}, [REAL, SMALLER])
    assert (error.code, error.details["available_bytes"]) == ("INSUFFICIENT_RAM", need_ - 1)
    assert str(error.hint).startswith("slots: 3 fits; or context_tokens: 2048 fits; or model: q4 (Q4_0, 90 MB) fits")
    enough = Ledger(2 * need_, [CPU], {})
    enough.take(REAL, "cpu:0", {})
    enough.take(REAL, "cpu:0", {})
    # A file that both map is there once; who leaves makes room.
    shared = Ledger(2 * need_ - 140_000_000, [CPU], {})
    shared.take(MAPPED, "cpu:0", {})
    shared.take(MAPPED, "cpu:0", {})
    ledger.give_back(1, paths=["/m/none.gguf"])
    ledger.take(REAL, "cpu:0", {})


def test_each_device_has_an_account_of_its_own() -> None:
    _, gpu, _ = check_memory(REAL, {**GPU, "memory_free_bytes": 10**12}, 10**12)
    two = [{**GPU, "id": f"cuda:{n}", "device": n, "memory_free_bytes": gpu + 1} for n in (0, 1)]
    ledger = Ledger(10**12, [*two, CPU], {})
    ledger.take(REAL, "cuda:0", {})
    error = refusal(ledger.take, REAL, "cuda:0", {})
    assert (error.code, error.details["available_bytes"]) == ("VRAM_EXHAUSTED", 1)
    assert "device: 1 (H200) has room" in str(error.hint)
    ledger.take(REAL, "cuda:1", {})
    ledger.give_back(0, REAL, "cuda:0", {})
    ledger.take(REAL, "cuda:0", {})


def test_every_remedy_that_is_named_is_one_that_the_check_lets_through() -> None:
    """For every amount of memory between nothing and enough: take the words at their word."""
    _, four, _ = check_memory(REAL, CPU, 10**10)
    seen = set()
    for free in range(0, four, 5_000_000):
        error = refusal(lambda free=free: check_memory(REAL, CPU, free, {}, [REAL, SMALLER]))
        for words in str(error.hint).split("; or "):
            found = dict(re.findall(r"--(slots|context-tokens|model) (\S+)", words))
            if not found:
                assert words.startswith("stop another worker")
                continue
            seen.add(tuple(sorted(found)))
            wanted = {k.replace("-", "_"): int(v) for k, v in found.items() if k != "model"}
            assert check_memory(SMALLER if found.get("model") == "q4" else REAL, CPU, free, wanted)
    assert seen == {("slots",), ("context-tokens",), ("model",), ("context-tokens", "slots")}


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
