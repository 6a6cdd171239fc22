"""Jobs as such: states, lanes, readers, bounds; every operation has its command line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, get_args

import pytest
import typer

from rbee_ctl import cli
from rbee_serve.contract.errors import InvalidModelRef, InvalidRequest, JobNotFound, ModelNotFound, RateLimited
from rbee_serve.contract.operations import OPERATIONS, Operation, parse_operation
from rbee_serve.queen import job_commands, jobs
from rbee_serve.queen.jobs import Job, Jobs, JobState

#: Fields that an operation can not do without.
REQUIRED: dict[str, Any] = {
    "worker_type": "cpu-llm-worker",
    "model": "hf:org/repo:Q4_1",
    "pid": 4711,
    "id": "smollm2",
    "worker_id": "lab1-cpu0",
    "prompt": "Hi",
}


def body(name: str) -> dict[str, Any]:
    fields = OPERATIONS[name].model_fields
    return {"operation": name} | {k: REQUIRED[k] for k, f in fields.items() if f.is_required() and k != "operation"}


def start(name: str = "hive_start", **fields: Any) -> Operation:
    return parse_operation(body(name) | fields)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


@pytest.mark.E32
def test_ended_jobs_are_counted_whatever_their_end() -> None:
    async def work(job: Job) -> None:
        if job.operation.operation == "hive_stop":
            raise ModelNotFound("no such model")
        if job.operation.operation == "hive_install":
            await asyncio.Event().wait()

    async def test() -> None:
        counted: list[tuple[str, str]] = []
        all_jobs = Jobs(work, lambda _: None, lambda *ended: counted.append(ended))
        begun = [all_jobs.submit(start(name)) for name in ("hive_start", "hive_stop", "hive_install")]
        for job in begun[:2]:
            await read(job)
        await all_jobs.close()
        assert sorted(counted) == [("hive_install", "cancelled"), ("hive_start", "completed"), ("hive_stop", "failed")]

    run(test)


def test_progress_is_the_newest_word_on_it() -> None:
    async def test() -> None:
        job = Job(start())
        assert job.progress is None
        for done in (1, 2):
            job.publish({"type": "progress", "done": done})
        job.narrate("ctl", "start", "something else")
        assert job.progress is not None
        assert job.progress["done"] == 2

    run(test)


async def read(job: Job) -> list[str]:
    return [str(e.get("human", e["type"])) async for e in job.events()]


# --- operations -----------------------------------------------------------------------------------------------------


def test_there_are_28_operations() -> None:
    assert len(OPERATIONS) == 28
    assert all(get_args(m.model_fields["operation"].annotation) == (name,) for name, m in OPERATIONS.items())


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_done_by_a_command_that_exists_or_by_the_queen(name: str) -> None:
    arguments = job_commands.arguments(parse_operation(body(name)))
    if arguments is None:
        assert name in ("status", "active_worker_list", "active_worker_get", "active_worker_retire", "infer")
        return
    assert "" not in arguments
    words = cli.command_name(arguments).split()
    assert arguments[: len(words)] == words
    assert len(words) >= 2, f"{arguments}: rbee-ctl has no such command"
    # rbee-ctl's own parser takes it as it is: nothing is missing, nothing unknown, and nothing is asked for on a terminal.
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    parsed = command.make_context(words[-1], arguments[len(words) :]).params
    assert parsed.get("yes", True), f"{arguments} would ask a terminal"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({}, "operation"),
        ({"operation": "fly"}, "operation"),
        ({"operation": 7}, "operation"),
        ({"operation": "model_download"}, "model"),
        ({"operation": "model_download", "model": "--help"}, "model"),
        ({"operation": "model_download", "model": "a\nb"}, "model"),
        ({"operation": "worker_process_get", "pid": "x; reboot"}, "pid"),
        ({"operation": "worker_process_get", "pid": 0}, "pid"),
        ({"operation": "hive_start", "alias": "../x"}, "alias"),
        ({"operation": "hive_start", "alias": "-x"}, "alias"),
        ({"operation": "hive_start", "alias": "a", "nonsense": 1}, "nonsense"),
        ({"operation": "hive_import_ssh", "ssh_config_path": "--x"}, "ssh_config_path"),
    ],
)
def test_what_is_no_operation_is_refused_by_field(data: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as e:
        parse_operation(data)
    assert e.value.details["field"] == field


def test_a_word_that_is_no_model_reference_is_refused_before_a_job_begins() -> None:
    with pytest.raises(InvalidModelRef, match="hf:org/repo"):
        parse_operation({"operation": "model_download", "hive_id": "a", "model": "hf:no-slash"})


def test_a_device_that_nobody_names_is_chosen_on_the_machine() -> None:
    spawn = {"operation": "worker_spawn", "hive_id": "a", "model": "m"}
    assert not [a for a in job_commands.arguments(parse_operation(spawn)) or [] if a.startswith("--device")]
    assert "--device=1" in (job_commands.arguments(parse_operation(spawn | {"device": 1})) or [])


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_a_job_runs_without_readers_and_late_ones_see_all() -> None:
    async def work(job: Job) -> dict[str, Any]:
        job.narrate("x", "y", "one")
        await asyncio.sleep(0)
        job.narrate("x", "y", "two")
        return {"a": 1}

    async def test() -> None:
        queue = Jobs(work, job_commands.lane)
        job = queue.submit(start())
        assert job.task is not None
        await job.task
        assert (job.state, job.result) == (JobState.COMPLETED, {"a": 1})
        first, second = await asyncio.gather(read(job), read(job))
        assert first == second == ["hive_start on localhost", "one", "two", "result", "hive_start completed"]

    run(test)


def test_two_jobs_never_mix_and_lines_have_the_agreed_form() -> None:
    async def work(job: Job) -> None:
        for n in range(50):
            job.narrate("actor-too-long", "do", f"{job.operation.node}-{n}")
            await asyncio.sleep(0)

    async def test() -> None:
        queue = Jobs(work, job_commands.lane)
        one, two = queue.submit(start(alias="lab1")), queue.submit(start(alias="lab2"))
        seen = await asyncio.gather(read(one), read(two))
        for node, lines in zip(("lab1", "lab2"), seen, strict=True):
            assert [line for line in lines if line.startswith("lab")] == [f"{node}-{n}" for n in range(50)]
        async for event in one.events():
            assert event["job_id"] == one.id
            if event["type"] == "narration":
                assert event["formatted"].startswith(("[actor-too-", "[queen     ]"))

    run(test)


def test_one_machine_is_serialised_and_others_are_not() -> None:
    running: list[str] = []
    most: dict[str, int] = {}
    together = asyncio.Event()

    async def work(job: Job) -> None:
        node = str(job.operation.node)
        running.append(node)
        most[node] = max(most.get(node, 0), running.count(node))
        if {"lab1", "lab2"} <= set(running):
            together.set()
        await together.wait()
        await asyncio.sleep(0)
        running.remove(node)

    async def test() -> None:
        queue = Jobs(work, job_commands.lane)
        all_jobs = [queue.submit(start(alias=n)) for n in ("lab1", "lab1", "lab1", "lab2")]
        lines = [await read(job) for job in all_jobs]
        assert most == {"lab1": 1, "lab2": 1}
        assert "another job works on lab1" in lines[1]
        assert all(job.state == JobState.COMPLETED for job in all_jobs)

    run(test)


def test_a_job_that_fails_tells_why_and_ends_its_readers() -> None:
    async def work(job: Job) -> None:
        raise ModelNotFound("no model x", hint="look")

    async def test() -> None:
        job = Jobs(work, job_commands.lane).submit(start())
        events = [e async for e in job.events()]
        assert (job.state, events[-1]["type"], events[-1]["code"], events[-1]["hint"]) == (
            JobState.FAILED,
            "error",
            "MODEL_NOT_FOUND",
            "look",
        )
        assert job.summary()["error"]["code"] == "MODEL_NOT_FOUND"

    run(test)


def test_cancelling_ends_a_running_and_a_waiting_job_and_is_idempotent() -> None:
    async def work(job: Job) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        queue = Jobs(work, job_commands.lane)
        running, waiting = queue.submit(start()), queue.submit(start())
        await asyncio.sleep(0.01)
        for job in (waiting, running, running):
            await queue.cancel(job.id)
            assert job.state == JobState.CANCELLED
        assert (await read(running))[-1] == "error"
        with pytest.raises(JobNotFound):
            await queue.cancel("job-0")

    run(test)


def test_an_end_that_has_begun_is_not_broken_off_by_who_asks_for_it_again() -> None:
    """A client that gave up waiting asks again; the queen ends meanwhile."""
    ending, may_end = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    async def work(job: Job) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await may_end.wait()
            ended.append(job.id)

    async def test() -> None:
        queue = Jobs(work, job_commands.lane)
        job = queue.submit(start())
        await asyncio.sleep(0)
        asked = [asyncio.create_task(queue.cancel(job.id))]
        await ending.wait()
        asked += [asyncio.create_task(queue.cancel(job.id)), asyncio.create_task(queue.close())]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(one.done() for one in asked)
        may_end.set()
        await asyncio.gather(*asked)
        assert (ended, job.state) == ([job.id], JobState.CANCELLED)

    run(test)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "EVENTS_MAX", 100)
    monkeypatch.setattr(jobs, "FINISHED_MAX", 3)
    monkeypatch.setattr(jobs, "UNFINISHED_MAX", 2)
    hold = asyncio.Event()

    async def work(job: Job) -> None:
        if job.operation.node == "held":
            await hold.wait()
            return
        for n in range(1000):
            job.narrate("x", "y", str(n))

    async def test() -> None:
        queue = Jobs(work, job_commands.lane)
        done = []
        for _ in range(6):
            job = queue.submit(start())
            assert job.task is not None
            await job.task
            done.append(job)
        assert len(queue.all()) == 4  # three finished ones and the newest
        lines = await read(done[-1])
        assert len(lines) <= 101
        assert "earlier events are not kept" in lines[0]
        assert lines[-2:] == ["999", "hive_start completed"]
        held = [queue.submit(start(alias="held")) for _ in range(2)]
        with pytest.raises(RateLimited):
            queue.submit(start())
        hold.set()
        await asyncio.gather(*(read(job) for job in held))

    run(test)
