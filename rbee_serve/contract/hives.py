"""What a machine's ``status`` means and which machines are known: one rule for the queen's answers and for rbee-ctl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rbee_serve.contract.errors import NodeNotFound

#: What is said of every machine while no queen answers.
UNKNOWN = "unknown"


def hive_status(states: Iterable[str], expected: bool) -> str:
    """Return a machine's status from the ``states`` of its live workers.

    ``up``: heard of lately. ``asleep``: all its workers sleep. ``silent``: workers should be there (``expected``) and none is
    heard. ``empty``: none should be.
    """
    seen = list(states)
    if any(state != "dormant" for state in seen):
        return "up"
    if seen:
        return "asleep"
    return "silent" if expected else "empty"


def node_not_found(node: str, known: Sequence[str]) -> NodeNotFound:
    """Return the error of a machine that is neither declared nor heard of."""
    return NodeNotFound(
        f"{node!r} is neither declared nor has it a live worker; known: {', '.join(known) or 'none'}",
        hint="rbee-ctl hive list",
        node=node,
        known=list(known),
    )


def refuse_unknown_node(node: str, hives: Sequence[Mapping[str, Any]]) -> None:
    """Raise NodeNotFound for a machine that is not among ``hives`` (as ``GET /v1/hives`` lists them).

    A queen that nobody has told the declaration knows only who is heard: she refuses nobody.
    """
    names = [str(hive["name"]) for hive in hives]
    if node not in names and any(hive.get("declared") for hive in hives):
        raise node_not_found(node, names)
