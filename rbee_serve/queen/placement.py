"""Which worker gets a request. A pure function of what the registry knows (SPEC CAP-92).

model -> filters (node, backend, device, worker id, labels) -> not hidden, failed or full -> preferred class -> not suspect
-> has the prompt's beginning in its cache, unless it is much busier than another -> least loaded, failures of late counted
as load -> least recently used, which makes equals go round. Dormant workers are never chosen here: waking.py wakes them
when nobody else has room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rbee_serve.contract.api import WorkerState
from rbee_serve.contract.errors import AllSlotsBusy, InvalidRequest, ModelNotFound, NoWorkerAvailable, RbeeError
from rbee_serve.queen.registry import Registry, Worker

#: Seconds after which a refused client may try again. A slot frees at no known time; this is a polite pause.
RETRY_AFTER_S = 1
#: A worker that knows the prompt's beginning may be busier than the least busy one by this share of its slots. More, and one
#: popular system prompt would pile all work on one worker.
AFFINITY_SPREAD = 0.5

Reason = Literal["prefix", "least-loaded", "pinned", "probe"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A worker and why: ``probe`` means that it is full by its own word, which may be old."""

    worker: Worker
    reason: Reason


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the request asks for. ``continuation_class``: whose streams it should be able to continue exactly, or must
    (``exact``)."""

    model: str | None = None
    node: str | None = None
    backend: str | None = None
    device: int | None = None
    worker_id: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    continuation_class: str | None = None
    exact: bool = False

    def admits(self, worker: Worker) -> bool:
        """Apply the filters other than the model."""
        record = worker.record
        if (
            (self.worker_id is not None and record.id != self.worker_id)
            or (self.node is not None and record.hive_id != self.node)
            or (self.backend is not None and record.backend != self.backend)
            or (self.device is not None and record.device != self.device)
            or (self.exact and record.continuation_class != self.continuation_class)
        ):
            return False
        for name, value in self.labels:  # noqa: SIM110 -- all() over a generator costs as much as everything above
            if record.labels.get(name) != value:
                return False
        return True

    def filters(self) -> dict[str, str | int]:
        """Return the filters in force, for messages."""
        named = {"node": self.node, "backend": self.backend, "device": self.device, "worker_id": self.worker_id}
        labels = {f"label {name}": value for name, value in self.labels}
        return {name: value for name, value in named.items() if value is not None} | labels


def serves(worker: Worker, model: str) -> bool:
    """Say whether ``model`` names what the worker serves: its id, its reference, or ``[hf:]org/repo`` of the reference."""
    return means(model, worker.record.model_id, worker.record.model_ref)


def means(model: str, model_id: str, ref: str | None) -> bool:
    """Say whether ``model`` is a name of the model that has this id and reference."""
    if model == model_id:
        return True
    if ref is None:
        return False
    return any(name == ref or (name.startswith("hf:") and ref.startswith(name + ":")) for name in (model, f"hf:{model}"))


def continues_exactly(before: Worker, after: Worker, length: int) -> bool:
    """Say whether ``after`` goes on as ``before`` would have: same class, and a context still short enough for it.

    ``length``: tokens at the end, at most. A stream ends with the context at the latest, and with equal ones at the same token.
    """
    a, b = before.record, after.record
    if a.continuation_class is None or a.continuation_class != b.continuation_class:
        return False
    if a.context_tokens is not None and a.context_tokens == b.context_tokens:
        length = min(length, a.context_tokens)
    return all(length <= r.model_info.get("exact_context_tokens", length) for r in (a, b))


def known_models(workers: Iterable[Worker]) -> list[str]:
    """Return the ids of all models that the workers serve, sorted."""
    return sorted({w.record.model_id for w in workers})


def _candidates(registry: Registry, wanted: Wanted, now: float) -> list[Worker]:
    workers, expected = list(registry), registry.expected(now)
    known = sorted({*known_models(workers), *(model_id for model_id, _ in expected.values())})
    if not workers and not expected:
        raise NoWorkerAvailable(
            "no worker has reported to the queen",
            hint="rbee-ctl status; rbee-ctl worker start --node NODE --model MODEL",
            retry_after_s=RETRY_AFTER_S,
        )
    if wanted.model is None and wanted.worker_id is None and len(known) > 1:
        raise InvalidRequest(f"model: required, since several are served: {', '.join(known)}", field="model", known=known)
    found = [w for w in workers if wanted.model is None or serves(w, wanted.model)]
    if not found and awaited(registry, wanted, now):
        raise NoWorkerAvailable(
            f"the queen has just been restarted: no worker for model {wanted.model or known[0]!r} has reported yet",
            hint="try again in some seconds; rbee-ctl worker list",
            retry_after_s=RETRY_AFTER_S,
        )
    if not found:
        raise ModelNotFound(
            f"model {wanted.model!r} is not served; known: {', '.join(known)}",
            hint=f"rbee-ctl worker start --node NODE --model {wanted.model}",
            model=wanted.model,
            known=known,
        )
    return found


def resolve(registry: Registry, model: str | None, now: float, worker_id: str | None = None) -> str:
    """Return the id of the model that a request means, by whatever name it has there.

    Right after a restart of the queen that may be a model whose workers have yet to report (``awaited``). Raises
    ModelNotFound (nobody serves it; names the known ones), InvalidRequest (no model named and several served) and
    NoWorkerAvailable (no worker at all).
    """
    if model is not None and any(w.model_id == model for w in registry):
        return model
    if worker_id is not None and registry.known(worker_id) is None:
        for found in _awaited(registry, model, worker_id, now):
            return found
    try:
        candidates = _candidates(registry, Wanted(model=model, worker_id=worker_id), now)
    except NoWorkerAvailable:
        coming = next(_awaited(registry, model, worker_id, now), None)
        if coming is None:
            raise
        return coming
    pinned = [w for w in candidates if w.id == worker_id]
    return (pinned or candidates)[0].model_id


def awaited(registry: Registry, wanted: Wanted, now: float) -> bool:
    """Say whether a worker for the request is likely to report soon: it was up when the queen went down for a restart."""
    return any(True for _ in _awaited(registry, wanted.model, wanted.worker_id, now))


def _awaited(registry: Registry, model: str | None, worker_id: str | None, now: float) -> Iterator[str]:
    for name, (model_id, ref) in registry.expected(now).items():
        if worker_id in (None, name) and (model is None or means(model, model_id, ref)):
            yield model_id


def pick(
    registry: Registry,
    wanted: Wanted,
    now: float,
    *,
    exclude: Collection[Worker] = (),
    affinity: Mapping[Worker, int] | None = None,
) -> Choice | None:
    """Return the worker that should get the request, None when nobody has room.

    ``exclude``: those that have failed it already. ``affinity``: how many blocks of the prompt a worker has seen. A worker
    that is full only by its own last word is still tried, after the others: its word may be old, and admission is its own
    business (E-03).
    """
    model, wanted_class, stale_after_s = wanted.model, wanted.continuation_class, registry.stale_after_s
    filtered = wanted.exact or bool(wanted.filters())
    best: Worker | None = None
    best_cost: tuple[bool, bool, bool, float, int, str] | None = None
    least = 0.0  # load of the best, the number that most candidates fail by
    # One pass without intermediate lists: with 1,000 workers this is what a request pays (goal: p99 <= 1 ms).
    for w in registry:
        total = w.slots_total
        if (
            w.in_flight >= total
            or not w.takes
            or w.failed
            or now - w.seen_at > stale_after_s
            or (model is not None and w.model_id != model and not serves(w, model))
            or w in exclude
            or (filtered and not wanted.admits(w))
        ):
            continue
        busy = w.in_flight + w.foreign
        full = busy >= total
        if full and w.full_until > now:
            continue
        load = busy / total
        if w.failures:
            load += w.penalty(now)
        if best_cost is not None and load > least and not best_cost[0] and not best_cost[1] and not best_cost[2]:
            continue
        other_class = wanted_class is not None and w.record.continuation_class != wanted_class
        cost = (full, other_class, w.suspect_until > now, load, w.last_used, w.id)
        if best_cost is None or cost < best_cost:
            best, best_cost, least = w, cost, load
    if best is None or best_cost is None:
        return None
    if wanted.worker_id is not None:
        return Choice(best, "pinned")
    if best_cost[0]:
        return Choice(best, "probe")
    if affinity:
        knowing = _knowing(registry, wanted, now, exclude, affinity, best_cost)
        if knowing is not None:
            return Choice(knowing, "prefix")
    return Choice(best, "least-loaded")


def _knowing(
    registry: Registry,
    wanted: Wanted,
    now: float,
    exclude: Collection[Worker],
    affinity: Mapping[Worker, int],
    best_cost: tuple[bool, bool, bool, float, int, str],
) -> Worker | None:
    """Return the worker that knows most of the prompt and is as fit as the best one but for a bounded load."""
    _, other_class, suspect, least, _, _ = best_cost
    found: Worker | None = None
    found_cost: tuple[int, float, int, str] | None = None
    for w, blocks in affinity.items():
        if (
            w.busy >= w.slots_total
            or not registry.routable(w, now)
            or registry.known(w.id) is not w
            or w in exclude
            or (wanted.model is not None and not serves(w, wanted.model))
            or not wanted.admits(w)
        ):
            continue
        load = w.busy / w.slots_total + w.penalty(now)
        foreign_class = wanted.continuation_class is not None and w.record.continuation_class != wanted.continuation_class
        if load - least > AFFINITY_SPREAD or (foreign_class and not other_class) or (w.suspect_until > now and not suspect):
            continue
        cost = (-blocks, load, w.last_used, w.id)
        if found_cost is None or cost < found_cost:
            found, found_cost = w, cost
    return found


def choose(
    registry: Registry,
    wanted: Wanted,
    now: float,
    *,
    exclude: Collection[Worker] = (),
    affinity: Mapping[Worker, int] | None = None,
) -> Worker:
    """Return what ``pick`` does, or raise why there is none.

    Raises ModelNotFound (nobody serves it; names the known ones), InvalidRequest (no model named and several served),
    NoWorkerAvailable (served, but nobody that fits is up) and AllSlotsBusy (with totals).
    """
    if wanted.model is None and wanted.worker_id is None:
        _candidates(registry, wanted, now)  # several models served: which one is the client's to say
    choice = pick(registry, wanted, now, exclude=exclude, affinity=affinity)
    if choice is None:
        raise why_nobody(registry, wanted, now, exclude)
    return choice.worker


def worth_waiting_for(registry: Registry, wanted: Wanted, now: float, exclude: Collection[Worker] = ()) -> list[Worker]:
    """Return the workers that may take the request in time: full ones, those that load, those that can be woken."""
    return [
        w
        for w in registry
        if w not in exclude
        and not w.failed
        and (w.takes or w.record.status in (WorkerState.LOADING, WorkerState.DORMANT))
        and registry.fresh(w, now)
        and (wanted.model is None or serves(w, wanted.model))
        and wanted.admits(w)
    ]


def why_nobody(registry: Registry, wanted: Wanted, now: float, exclude: Collection[Worker]) -> RbeeError:
    """Return the error for a request that nobody can take; raises ModelNotFound and its like for one nobody ever could."""
    candidates = _candidates(registry, wanted, now)
    up = [w for w in candidates if wanted.admits(w) and registry.routable(w, now) and w not in exclude]
    if not up:
        return _nobody(registry, candidates, wanted, now, exclude)
    total, busy = sum(w.slots_total for w in up), sum(min(w.busy, w.slots_total) for w in up)
    return AllSlotsBusy(
        f"all {total} slots of {len(up)} worker(s) are busy",
        hint="try again later, or start another worker: rbee-ctl worker start --node NODE --model MODEL",
        slots_total=total,
        slots_busy=busy,
        retry_after_s=RETRY_AFTER_S,
    )


def _nobody(
    registry: Registry, candidates: list[Worker], wanted: Wanted, now: float, exclude: Collection[Worker]
) -> NoWorkerAvailable:
    fitting = sorted((w for w in candidates if wanted.admits(w)), key=lambda w: w.id)
    what = f"model {wanted.model!r}" if wanted.model else "the request"
    if not fitting:
        filters = ", ".join(f"{name}={value}" for name, value in wanted.filters().items())
        why = f"{what} is served, but by no worker with {filters}"
    else:
        states = {w.id: "failed" if w in exclude else str(w.state) if registry.fresh(w, now) else "silent" for w in fitting}
        why = f"no worker for {what} takes requests now: " + ", ".join(f"{name} is {state}" for name, state in states.items())
    return NoWorkerAvailable(why, hint="rbee-ctl worker list", retry_after_s=RETRY_AFTER_S, filters=wanted.filters())
