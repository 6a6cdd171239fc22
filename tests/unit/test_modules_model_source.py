"""Who asks the hub and who gets a model from whom: roles/rbee_hive/action_plugins/rbee_model_source.py."""

from __future__ import annotations

from typing import Any

import node_modules
import pytest

source = node_modules.load("action_plugins", "rbee_model_source")

HAS: dict[str, Any] = {"status": "Ready", "sha256": "d1"}
OTHER: dict[str, Any] = {"status": "Ready", "sha256": "d2"}
BROKEN: dict[str, Any] = {"status": "Failed", "sha256": "d1"}
REF = "hf:org/repo:Q4_0"


def roles(machines: list[tuple[str, Any, bool]], peers: list[str] | None, sha256: str | None = None) -> dict[str, Any]:
    return {name: source.decide(name, REF, sha256, machines, peers) for name, *_ in machines}


def test_nobody_has_it_one_fetches_for_all() -> None:
    machines = [("a", None, False), ("b", None, False), ("c", BROKEN, False)]
    assert roles(machines, None) == {"a": ("ask", None), "b": ("wait", None), "c": ("wait", None)}
    assert roles(machines, []) == {"a": ("fetch", None), "b": ("wait", None), "c": ("wait", None)}
    fetched = [("a", None, True), *machines[1:]]
    assert roles(fetched, []) == {"a": ("have", None), "b": ("get", "a"), "c": ("get", "a")}


def test_whoever_has_it_gives_it_to_the_others() -> None:
    machines = [("a", None, False), ("b", HAS, False), ("c", None, False)]
    assert roles(machines, None) == {"a": ("get", "b"), "b": ("have", None), "c": ("get", "b")}


def test_a_machine_outside_of_the_play_saves_the_hub() -> None:
    assert roles([("a", None, False), ("b", None, False)], ["z"]) == {"a": ("get", "z"), "b": ("get", "z")}


def test_one_that_fetches_and_fails_is_followed_by_the_next() -> None:
    """A machine that failed is no longer in the play."""
    assert roles([("b", None, False), ("c", None, False)], []) == {"b": ("fetch", None), "c": ("wait", None)}


@pytest.mark.parametrize(("sha256", "role"), [(None, "have"), ("d2", "have"), ("d1", "ask")])
def test_another_digest_than_the_declared_one_is_not_the_model(sha256: str | None, role: str) -> None:
    assert roles([("a", OTHER, False)], None, sha256) == {"a": (role, None)}
