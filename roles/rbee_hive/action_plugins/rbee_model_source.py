"""Say where each machine gets a model from, so that the hub is asked once; see library/rbee_model_source.py."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

READY, DOWNLOADING = "Ready", "Downloading"
#: What a hub, or the digest, says to one machine it says to all of them.
REFUSALS = ("MODEL_ACCESS_DENIED", "MODEL_NOT_FOUND", "INVALID_MODEL_REF", "CHECKSUM_MISMATCH", "MODEL_FILE_INVALID")
#: A hub that this many machines could not get a model from, each with all of its tries, is down.
TROUBLE_MAX = 3


@dataclass
class Machine:
    """What is known of one machine of the play that asks for the model."""

    name: str
    model: dict | None = None  # its catalog entry
    brought: bool = False  # by this play
    error: dict | None = None  # why it could not get it from the hub
    final: bool = False  # the error is the machine's own, and no other source would help
    shunned: dict[str, str] = field(default_factory=dict)  # machine that did not give it -> why


@dataclass
class Others:
    """Machines outside of the play: with the model, and fetching it."""

    have: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)


def usable(model, sha256):
    """Return whether a catalog entry is a whole model, with that digest if one is asked for."""
    return bool(model) and model.get("status") == READY and (not sha256 or model.get("sha256") == sha256)


def refused(error):
    """Return whether the hub itself said no, so that nobody needs to ask it again."""
    return error["code"] in REFUSALS or "http_status" in (error.get("details") or {})


def hopeless(machines):
    """Return the error that stands for all machines, if asking the hub again makes no sense."""
    errors = [m.error for m in machines if m.error and not m.final]
    if said := next((e for e in errors if refused(e)), None):
        return said
    troubles = [e for e in errors if e["code"] in ("DOWNLOAD_FAILED", "DOWNLOAD_TIMEOUT") and "tries" in (e.get("details") or {})]
    return troubles[-1] if len(troubles) >= TROUBLE_MAX else None


def decide(me, machines, others, sha256=None, *, local=False, claimed=None):
    """Return (role, source, error) of the machine ``me``.

    ``machines``: those of the play that ask for the model, in order. ``others``: None before they were asked.
    ``local``: the reference is a path, which each machine has for itself. ``claimed``: the machine that another run, of the
    same controller, has set to fetching it.
    """
    lack = [m for m in machines if not (m.brought or usable(m.model, sha256))]
    mine = next((m for m in lack if m.name == me), None)
    if mine is None:
        return "have", None, None
    if mine.final or (local and mine.error):
        return "fail", None, mine.error
    if local:
        return "fetch", None, None
    names = {m.name for m in lack}
    sources = [m.name for m in machines if m.name not in names] + (others.have if others else [])
    if source := next((s for s in sources if s not in mine.shunned), None):
        return "get", source, None
    if others is None:
        return ("ask" if lack[0] is mine else "wait"), None, None
    if error := hopeless(machines):
        return "fail", None, error
    here = {m.name for m in machines}
    busy = [*others.busy, *([claimed] if claimed and claimed not in here else [])]
    if other := next((b for b in busy if not any(b in m.shunned for m in machines)), None):
        return ("join" if lack[0] is mine else "wait"), other, None
    able = [m for m in lack if not m.error]
    # One that is at it already, for another run, goes first.
    able.sort(key=lambda m: (m.name != claimed, (m.model or {}).get("status") != DOWNLOADING))
    if not able:
        return "fail", None, mine.error
    return ("fetch" if able[0] is mine else "wait"), None, None


def claim(folder, ref, me, pid):
    """Note in ``folder`` that ``me`` fetches ``ref`` for the run ``pid``; returns the machine of a run that came before, or None.

    The note is worth something as long as its run lives; ``me`` None only looks.
    """
    try:
        return _claim(Path(folder), ref, me, pid)
    except OSError:
        return None  # a cache that can not be written to, or whose notes are another user's: this run is joined by nobody


def _claim(folder, ref, me, pid):
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / f"{hashlib.sha256(ref.encode()).hexdigest()[:12]}.json").open("a+", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        try:
            note = json.loads(f.read())
        except ValueError:
            note = {}
        if note.get("pid") not in (None, pid) and note.get("born") == born(note["pid"]):
            return note["machine"]
        if me:
            f.truncate(0)
            json.dump({"machine": me, "pid": pid, "born": born(pid)}, f)
    return None


def born(pid):
    """Return when a process began, in ticks since the boot, so that a number used again is told apart; None: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return None


class ActionModule(ActionBase):
    """The action ``rbee_model_source``."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("ref", "sha256", "say", "claims"))

    def run(self, tmp=None, task_vars=None):
        """Return ``role`` and ``source``; see the documentation in library/rbee_model_source.py."""
        super().run(tmp, task_vars)
        spec = {"ref": {"type": "str", "required": True}, "sha256": {"type": "str"}}
        _, args = self.validate_argument_spec(spec | {"say": {"type": "list", "elements": "str"}, "claims": {"type": "path"}})
        me, ref = task_vars["inventory_hostname"], args["ref"]
        machines, others = known(task_vars["hostvars"], task_vars["ansible_play_batch"], ref)
        state = {"sha256": args["sha256"], "local": ref.startswith("file://")}
        told = claimed_in(task_vars["hostvars"], task_vars["ansible_play_batch"], ref)
        role, source, error = decide(me, machines, others, **state, claimed=told)
        if role in ("fetch", "wait") and not state["local"] and args["claims"] and not self._task.check_mode:
            claimed = claim(args["claims"], ref, me if role == "fetch" else None, os.getppid())
            role, source, error = decide(me, machines, others, **state, claimed=claimed or told)
        if role in (args["say"] or ()):
            for line in words(me, ref, role, source, machines):
                display.display(f"rbee: {line}")
        passed_by = sorted({m.name for m in machines if m.error} | {name for m in machines for name in m.shunned})
        result = {"changed": False, "role": role, "source": source, "passed_by": passed_by}
        if role != "fail":
            return result
        msg = f"{error['message']} [{error['code']}]" + (f"; next: {error['hint']}" if error.get("hint") else "")
        return {**result, "failed": True, "msg": msg, "rbee_error": error}


def known(hosts, names, ref):
    """Return (machines of the play that ask for ``ref``, those outside of it) from the facts that the tasks keep."""
    machines, others = [], None
    for name in names:
        facts = hosts[name]
        if facts.get("__rbee_hive_model_asked") != ref:
            continue
        failed, shunned = ((facts.get(f"__rbee_hive_model_{k}") or {}) for k in ("failed", "shunned"))
        machines.append(
            Machine(
                name,
                ((facts.get("__rbee_hive_model_here") or {}).get("rbee_result") or {}).get("model"),
                ref in (facts.get("__rbee_hive_models_brought") or []),
                failed.get("error") if failed.get("ref") == ref else None,
                bool(failed.get("final")) and failed.get("ref") == ref,
                dict(shunned.get("machines") or {}) if shunned.get("ref") == ref else {},
            )
        )
        asked = facts.get("__rbee_hive_model_others") or {}
        if asked.get("ref") == ref:
            others = others or Others()
            others.have = sorted({*others.have, *asked["have"]})
            others.busy = sorted({*others.busy, *asked["busy"]} - {*others.have})
    return machines, others


def claimed_in(hosts, names, ref):
    """Return the machine that fetches ``ref`` for another run, as the fleet's note told a machine of this play; None: nobody."""
    notes = (hosts[name].get("__rbee_hive_model_claimed") or {} for name in names)
    found = (note["machine"] for note in notes if note.get("ref") == ref)
    return next((machine for machine in found if machine in hosts), None)


def words(me, ref, role, source, machines):
    """Return what to tell the user of a decision: also what went wrong before, and what happens instead."""
    mine = next((m for m in machines if m.name == me), Machine(me))
    then = {"get": f"it comes from {source}", "fetch": f"{me} fetches it itself"}.get(role, f"{me} waits for {source}")
    told = [f"{peer} does not give {ref} to {me}: {why}; {then}" for peer, why in list(mine.shunned.items())[-1:]]
    if role == "fetch":
        failed = [m for m in machines if m.error][-1:]
        told += [f"{m.name} could not fetch {ref}: {m.error['message']} [{m.error['code']}]; {me} does it" for m in failed]
    elif role == "get" and not told:
        told = [f"{ref} comes from {source}"]
    elif role == "join":
        told += [f"{source} fetches {ref} for somebody else already; {me} waits for it"]
    return told
