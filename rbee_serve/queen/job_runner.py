"""Doing the work of a job: fleet operations by rbee-ctl as a child process, live ones here.

The queen does not know rbee-ctl's code: it starts the program in a process group of its own and reads one JSON event a
line (``rbee-ctl --events``). Ending a job ends that program and everything below it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from rbee_serve import process_tree
from rbee_serve.contract import operations as op
from rbee_serve.contract.api import ROUTABLE_STATES
from rbee_serve.contract.errors import (
    LoadingTimeout,
    MissingDependency,
    ModelNotFound,
    NodeLocked,
    NoWorkerAvailable,
    PlaybookFailed,
    WorkerNotFound,
    from_envelope,
)
from rbee_serve.contract.hives import refuse_unknown_node
from rbee_serve.contract.settings import QueenSettings
from rbee_serve.queen import job_commands
from rbee_serve.queen.internal import Internal
from rbee_serve.queen.jobs import Job

#: Seconds that rbee-ctl gets to end Ansible in order; then all of it is killed.
GRACE_S = 8.0
#: Pause between two looks at whether what was killed has gone, seconds.
_GONE_POLL_S = 0.02
#: Longest wait for a worker that was started for a request, and between two looks at it, seconds.
LOADING_LIMIT_S, LOADING_POLL_S = 300.0, 0.25
#: Longest line of the child, bytes.
LINE_MAX = 4 << 20
#: Of the queen's own environment what a child must not have: systemd's handles and the paths to secrets.
_WITHHELD = (
    "CREDENTIALS_DIRECTORY",
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
)


class JobRunner:
    """Runs operations for one queen. ``internal``: the queen's own routes."""

    def __init__(self, settings: QueenSettings, internal: Internal) -> None:
        self._settings, self._internal = settings, internal

    def command(self) -> list[str]:
        """Return the program that runs fleet operations; raises MissingDependency."""
        if self._settings.ctl_command is not None:
            return shlex.split(self._settings.ctl_command)
        beside = Path(sys.executable).parent / "rbee-ctl"
        found = str(beside) if beside.is_file() else shutil.which("rbee-ctl")
        if found is None:
            raise MissingDependency(
                "this queen's machine has no rbee-ctl: fleet operations run where the inventory is",
                hint="run rbee-ctl where you are; or deploy the queen with rbee_queen_jobs: true (docs/operations.md, Jobs)",
            )
        return [found]

    async def run(self, job: Job) -> dict[str, Any] | None:
        """Do the work; raises the RbeeError that it failed with."""
        match job.operation:
            case op.Status():
                return await self._here(job, "GET", "/v1/status")
            case op.ActiveWorkerList(hive_id=node):
                return await self._workers(job, node)
            case op.ActiveWorkerGet(worker_id=worker_id):
                return {"worker": await self._here(job, "GET", f"/v1/workers/{worker_id}")}
            case op.ActiveWorkerRetire(worker_id=worker_id):
                return {"worker": await self._here(job, "POST", f"/v1/workers/{worker_id}/retire")}
            case op.Infer() as wanted:
                return await self._infer(job, wanted)
        arguments = job_commands.arguments(job.operation)
        assert arguments is not None, job.operation  # noqa: S101 -- a match that forgot an operation
        return await self._child(job, arguments)

    async def _here(self, job: Job, method: str, path: str, query: str = "") -> dict[str, Any]:
        job.narrate("queen", "mode", "integrated: answered by the queen itself, without a playbook")
        return await self._internal.call(method, path, query=query, state=job.caller)

    async def _workers(self, job: Job, node: str | None) -> dict[str, Any]:
        """List the live workers; raises NodeNotFound for a machine that nobody has declared and nobody is heard from."""
        if node is None:
            return await self._here(job, "GET", "/v1/workers")
        found = await self._here(job, "GET", "/v1/workers", f"node={node}")
        if not found["workers"]:
            refuse_unknown_node(node, (await self._internal.call("GET", "/v1/hives"))["hives"])
        return found

    # --- rbee-ctl -----------------------------------------------------------------------------------------------------

    async def _child(self, job: Job, arguments: list[str]) -> dict[str, Any] | None:
        process = await asyncio.create_subprocess_exec(
            *self.command(),
            "--events",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if k not in _WITHHELD},
            limit=LINE_MAX,
            start_new_session=True,
        )
        out, err = cast(asyncio.StreamReader, process.stdout), cast(asyncio.StreamReader, process.stderr)
        errors = asyncio.ensure_future(_tail(err))
        try:
            envelope = await self._read(job, out)
            code = await process.wait()
            said = await errors
        finally:
            await _end(process)
            errors.cancel()
        if envelope is None:
            raise PlaybookFailed(f"rbee-ctl ended with exit code {code} and no result: {said}", hint="see the queen's log")
        if envelope.get("errors"):
            first = dict(envelope["errors"][0])
            error = from_envelope({"error": first}, fallback="the operation failed")
            error.details |= {"exit_code": envelope.get("exit_code"), "data": envelope.get("data")}
            raise error
        data: dict[str, Any] | None = envelope.get("data")
        return data

    async def _read(self, job: Job, stream: asyncio.StreamReader) -> Mapping[str, Any] | None:
        """Publish the child's events; return its result."""
        envelope: Mapping[str, Any] | None = None
        async for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict):
                continue
            if event.get("type") == "result":
                envelope = event
            elif event.get("type") in ("narration", "progress", "note"):
                job.publish(event)
        return envelope

    # --- inference ----------------------------------------------------------------------------------------------------

    async def _infer(self, job: Job, wanted: op.Infer) -> dict[str, Any]:
        body = wanted.model_dump(exclude={"operation", "hive_id", "stream"}, exclude_none=True) | {"stream": True}
        if wanted.hive_id is not None:
            body["node"] = wanted.hive_id
        limit = time.monotonic() + LOADING_LIMIT_S
        while True:
            try:
                return await self._generate(job, body, tokens=wanted.stream)
            except (ModelNotFound, NoWorkerAvailable):
                if wanted.hive_id is None or wanted.model is None or wanted.worker_id is not None:
                    raise
            job.narrate("queen", "cold_start", f"no worker serves {wanted.model} on {wanted.hive_id}; starting one")
            spawn = op.WorkerSpawn(operation="worker_spawn", hive_id=wanted.hive_id, model=wanted.model, device=wanted.device)
            try:
                started = await self._child(job, job_commands.arguments(spawn) or [])
                break
            except NodeLocked as e:  # by another job that starts the same worker, most likely
                if time.monotonic() > limit:
                    raise
                job.narrate("queen", "cold_start", f"{e.message}; looking again")
                await asyncio.sleep(LOADING_POLL_S)
        worker = (started or {}).get("worker", {})
        await self._wait_routable(str(worker.get("worker_id")))
        body |= {"worker_id": worker.get("worker_id"), "model": worker.get("model_id") or wanted.model}
        return await self._generate(job, body, tokens=wanted.stream)

    async def _wait_routable(self, worker_id: str) -> None:
        """Wait until the worker has reported itself ready; raises LoadingTimeout."""
        limit = time.monotonic() + LOADING_LIMIT_S
        while time.monotonic() < limit:
            with contextlib.suppress(WorkerNotFound):
                worker = await self._internal.call("GET", f"/v1/workers/{worker_id}")
                if worker.get("status") in ROUTABLE_STATES:
                    return
            await asyncio.sleep(LOADING_POLL_S)
        raise LoadingTimeout(f"worker {worker_id} is not ready after {LOADING_LIMIT_S:.0f} s", hint="rbee-ctl hive status")

    async def _generate(self, job: Job, body: Mapping[str, Any], *, tokens: bool) -> dict[str, Any]:
        """Return what the stream's first and last events said, text and token ids; ``tokens``: each is told as it comes, too."""
        ended: dict[str, Any] = {}
        text: list[str] = []
        ids: list[int] = []
        async with aclosing(self._internal.stream("/v1/inference", body, state=job.caller)) as events:
            async for event in events:
                if event.get("type") == "token":
                    text.append(str(event.get("t", "")))
                    ids.append(int(event["id"]))
                if tokens or event.get("type") != "token":
                    job.publish(event)
                if event.get("type") in ("started", "end"):
                    ended |= {k: v for k, v in event.items() if k != "type"}
        return ended | {"text": "".join(text), "token_ids": ids}


async def _tail(stream: asyncio.StreamReader) -> str:
    """Return the last line of a stream, cut."""
    last = ""
    async for line in stream:
        last = line.decode("utf-8", "replace").strip() or last
    return last[-400:]


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a child that still runs, in order if it can, and whatever is below it."""
    if process.returncode is not None:
        return
    below = process_tree.descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(asyncio.shield(process.wait()), GRACE_S)
    except TimeoutError:
        below += process_tree.descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    process_tree.kill(below)
    limit = time.monotonic() + GRACE_S  # whoever cancelled is told when all of it has gone
    while any(map(process_tree.alive, below)) and time.monotonic() < limit:  # noqa: ASYNC110 -- they are not our children
        await asyncio.sleep(_GONE_POLL_S)
