"""The error tree: codes, statuses, exit codes and the one envelope (SPEC 3.7, E-27)."""

from __future__ import annotations

import pytest

from rbee_serve.contract import errors
from rbee_serve.contract.errors import BY_CODE, ExitCode, MalformedResponse, ModelNotFound, RbeeError, from_envelope

SPEC_STATUS = {
    "INVALID_REQUEST": 400,
    "INVALID_MODEL_REF": 400,
    "INVALID_BACKEND": 400,
    "DEVICE_OUT_OF_RANGE": 400,
    "MISSING_API_KEY": 401,
    "INVALID_API_KEY": 401,
    "MODEL_ACCESS_DENIED": 403,
    "NODE_NOT_FOUND": 404,
    "MODEL_NOT_FOUND": 404,
    "WORKER_NOT_FOUND": 404,
    "WORKER_BINARY_NOT_FOUND": 404,
    "REQUEST_TIMEOUT": 408,
    "LOADING_TIMEOUT": 408,
    "NODE_EXISTS": 409,
    "WORKER_ALREADY_REGISTERED": 409,
    "BODY_TOO_LARGE": 413,
    "REQUEST_CANCELED": 499,
    "WORKER_CRASHED": 502,
    "MALFORMED_RESPONSE": 502,
    "VERSION_MISMATCH": 502,
    "CONNECTION_TIMEOUT": 504,
    "ALL_SLOTS_BUSY": 503,
    "WORKER_DRAINING": 503,
    "WORKER_LOADING": 503,
    "NO_WORKER_AVAILABLE": 503,
    "BACKEND_UNAVAILABLE": 503,
    "VRAM_EXHAUSTED": 507,
    "INSUFFICIENT_RAM": 507,
    "INSUFFICIENT_DISK": 507,
    "PLAYBOOK_FAILED": 500,
    "UNIT_START_FAILED": 500,
    "CUDA_DEVICE_FAILED": 500,
    "DOWNLOAD_FAILED": 500,
    "DOWNLOAD_TIMEOUT": 500,
    "CHECKSUM_MISMATCH": 500,
    "SSH_TIMEOUT": 502,
    "SSH_AUTH_FAILED": 502,
    "SSH_COMMAND_FAILED": 502,
}


@pytest.mark.parametrize(("code", "status"), SPEC_STATUS.items())
def test_every_code_of_the_spec_has_its_http_status(code: str, status: int) -> None:
    assert BY_CODE[code].status == status


def test_every_class_stands_in_the_tree_at_the_top_of_the_module() -> None:
    def names(cls: type[RbeeError]) -> set[str]:
        return {cls.__name__}.union(*(names(sub) for sub in cls.__subclasses__()))

    missing = {name for name in names(RbeeError) if name not in (errors.__doc__ or "")}

    assert missing == set()


def test_exit_codes_are_distinct_and_documented_values() -> None:
    assert {e.name: int(e) for e in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "PARTIAL": 3,
        "UNREACHABLE": 4,
        "REFUSED": 5,
        "CHANGES": 6,
        "LOCKED": 7,
        "KEY_REFUSED": 8,
        "HOST_KEY": 9,
        "SUDO_REFUSED": 10,
        "DISK_FULL": 11,
        "PORT_TAKEN": 12,
        "UNIT_MASKED": 13,
        "SELF_TEST": 14,
        "TRY_LATER": 75,
        "CONFIG": 78,
        "INTERRUPTED": 130,
    }


def test_envelope_round_trip_keeps_class_message_hint_and_details() -> None:
    sent = ModelNotFound("no such model", hint="rbee-ctl worker list", known=["a"])

    got = from_envelope(sent.envelope("c-1"), fallback="?")

    assert (type(got), got.message, got.hint, got.details) == (
        ModelNotFound,
        "no such model",
        "rbee-ctl worker list",
        {"known": ["a"]},
    )
    assert sent.envelope("c-1")["error"]["correlation_id"] == "c-1"


@pytest.mark.parametrize("body", [None, [], "x", {}, {"error": "text"}, {"error": {"code": 7}}])
def test_anything_else_is_a_malformed_response_with_the_fallback(body: object) -> None:
    got = from_envelope(body, fallback="worker said nonsense")

    assert type(got) is MalformedResponse
    assert got.message == "worker said nonsense"


def test_an_unknown_code_of_a_newer_peer_is_kept_in_the_details() -> None:
    got = from_envelope({"error": {"code": "NEW_CODE", "message": "m"}}, fallback="?")

    assert (type(got), got.details) == (RbeeError, {"peer_code": "NEW_CODE"})
