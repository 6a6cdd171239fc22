"""Routes of the job server (SPEC 3.2): begin, list, look, follow, end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve.common.http import JsonResponse, read_json, sse
from rbee_serve.common.openapi import takes
from rbee_serve.contract.errors import JobNotFound, OperationNotAllowed
from rbee_serve.contract.events import DONE, encode
from rbee_serve.contract.operations import AnyOperation, Operation, parse_operation
from rbee_serve.queen.job_commands import READ_ONLY
from rbee_serve.queen.jobs import Job, Jobs
from rbee_serve.queen.state import Queen, caller, require_admin


def routes(queen: Queen, jobs: Jobs) -> list[Route]:
    """Return the routes under ``/v1/jobs``."""
    api = _JobsApi(queen, jobs)
    return [
        Route("/v1/jobs", api.begin, methods=["POST"]),
        Route("/v1/jobs", api.list_all),
        Route("/v1/jobs/{job_id}", api.look),
        Route("/v1/jobs/{job_id}", api.cancel, methods=["DELETE"]),
        Route("/v1/jobs/{job_id}/progress", api.progress),
        Route("/v1/jobs/{job_id}/stream", api.follow),
    ]


class _JobsApi:
    def __init__(self, queen: Queen, jobs: Jobs) -> None:
        self._queen, self._jobs = queen, jobs

    @takes(AnyOperation)
    async def begin(self, request: Request) -> Response:
        """Begin a job: a wrong operation or field is refused at once."""
        operation = parse_operation(await read_json(request))
        self._check_allowed(request, operation)
        job = self._jobs.submit(operation, request.scope.get("state"))
        return JsonResponse({"job_id": job.id, "sse_url": f"/v1/jobs/{job.id}/stream"})

    async def list_all(self, request: Request) -> Response:
        """List jobs, newest first: all of them to an administrator, one's own to others."""
        return JsonResponse({"jobs": [job.summary() for job in self._jobs.all() if _may_see(request, job)]})

    async def look(self, request: Request) -> Response:
        """Show one job with its result."""
        job = self._job(request)
        return JsonResponse(job.summary() | {"result": job.result})

    async def progress(self, request: Request) -> Response:
        """Tell how far a job is, for those who can not follow its stream: its newest ``progress`` event, if there is one."""
        job = self._job(request)
        return JsonResponse({"job_id": job.id, "state": job.state.value, "progress": job.progress})

    async def cancel(self, request: Request) -> Response:
        """End a job and all that it started: 204, also when it has ended already."""
        await self._jobs.cancel(self._job(request).id)
        return Response(status_code=204)

    @takes(streams="text/event-stream")
    async def follow(self, request: Request) -> Response:
        """Stream a job's events from the first one on."""
        return sse(_lines(self._job(request)), ping_interval_s=self._queen.settings.ping_interval_s)

    def _job(self, request: Request) -> Job:
        job = self._jobs.get(request.path_params["job_id"])
        if not _may_see(request, job):
            raise JobNotFound("no such job", hint="GET /v1/jobs lists them")  # nor is it told that there is one
        return job

    def _check_allowed(self, request: Request, operation: Operation) -> None:
        """Refuse fleet operations to those who could do no more than infer before.

        Raises OperationNotAllowed for a key that is no administrator's, and where the queen asks for no key at all: any
        program on this machine could send it.
        """
        if isinstance(operation, READ_ONLY):
            return
        if self._queen.client_keys is None and operation.operation != "infer":
            raise OperationNotAllowed(
                "this queen asks for no key, so it runs no fleet operations",
                hint="give it client keys (client_keys_file), or use rbee-ctl",
                operation=operation.operation,
            )
        if operation.operation != "infer":
            require_admin(request, "run fleet operations")


def _may_see(request: Request, job: Job) -> bool:
    """Whether the job is the caller's own, or the caller an administrator."""
    key = caller(request)
    return key is None or key.admin or job.caller.get("caller") == key


async def _lines(job: Job) -> AsyncGenerator[bytes]:
    async with aclosing(job.events()) as events:
        async for event in events:
            yield encode(event)
    yield DONE
