"""Which worker gets a request. A pure function of what the registry knows (SPEC CAP-92).

model -> filters (node, device, worker id) -> not hidden, failed or full -> preferred class -> not suspect -> least loaded
-> least recently used, which makes equals go round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from rbee_serve.contract.errors import AllSlotsBusy, InvalidRequest, ModelNotFound, NoWorkerAvailable, RbeeError
from rbee_serve.queen.registry import Registry, Worker

#: Seconds after which a refused client may try again. A slot frees at no known time; this is a polite pause.
RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the request asks for. ``continuation_class``: whose streams it should be able to continue exactly."""

    model: str | None = None
    node: str | None = None
    device: int | None = None
    worker_id: str | None = None
    continuation_class: str | None = None

    def admits(self, worker: Worker) -> bool:
        """Apply the filters other than the model."""
        record = worker.record
        return (
            (self.worker_id is None or record.id == self.worker_id)
            and (self.node is None or record.hive_id == self.node)
            and (self.device is None or record.device == self.device)
        )

    def filters(self) -> dict[str, str | int]:
        """Return the filters in force, for messages."""
        named = {"node": self.node, "device": self.device, "worker_id": self.worker_id}
        return {name: value for name, value in named.items() if value is not None}


def serves(worker: Worker, model: str) -> bool:
    """Say whether ``model`` names what the worker serves: its id, its reference, or ``[hf:]org/repo`` of the reference."""
    record = worker.record
    if model == record.model_id:
        return True
    ref = record.model_ref
    if ref is None:
        return False
    return any(name == ref or (name.startswith("hf:") and ref.startswith(name + ":")) for name in (model, f"hf:{model}"))


def continues_exactly(before: Worker, after: Worker, length: int) -> bool:
    """Say whether ``after`` goes on as ``before`` would have: same class, and a context still short enough for it."""
    a, b = before.record, after.record
    if a.continuation_class is None or a.continuation_class != b.continuation_class:
        return False
    return all(length <= r.model_info.get("exact_context_tokens", length) for r in (a, b))


def known_models(workers: Iterable[Worker]) -> list[str]:
    """Return the ids of all models that the workers serve, sorted."""
    return sorted({w.record.model_id for w in workers})


def _candidates(workers: list[Worker], wanted: Wanted) -> list[Worker]:
    known = known_models(workers)
    if not known:
        raise NoWorkerAvailable(
            "no worker has reported to the queen",
            hint="rbee-ctl status; rbee-ctl worker start --node NODE --model MODEL",
            retry_after_s=RETRY_AFTER_S,
        )
    if wanted.model is not None:
        found = [w for w in workers if serves(w, wanted.model)]
        if not found:
            raise ModelNotFound(
                f"model {wanted.model!r} is not served; known: {', '.join(known)}",
                hint=f"rbee-ctl worker start --node NODE --model {wanted.model}",
                model=wanted.model,
                known=known,
            )
        return found
    if wanted.worker_id is None and len(known) > 1:
        raise InvalidRequest(f"model: required, since several are served: {', '.join(known)}", field="model", known=known)
    return workers


def choose(registry: Registry, wanted: Wanted, now: float, *, exclude: Collection[Worker] = ()) -> Worker:
    """Return the worker that should get the request; ``exclude`` are those that have failed it already.

    Raises ModelNotFound (nobody serves it; names the known ones), InvalidRequest (no model named and several served),
    NoWorkerAvailable (served, but nobody that fits is up) and AllSlotsBusy (with totals). A worker that is full only by
    its own last word is still tried, after the others: its word may be old, and admission is its own business (E-03).
    """
    model, wanted_class = wanted.model, wanted.continuation_class
    if model is None and wanted.worker_id is None:
        _candidates(list(registry), wanted)  # several models served: which one is the client's to say
    filtered = bool(wanted.filters())
    best: Worker | None = None
    best_cost: tuple[bool, bool, bool, float, int, str] | None = None
    # One pass without intermediate lists: with 1,000 workers this is what a request pays (goal: p99 <= 1 ms).
    for w in registry:
        record = w.record
        if model is not None and record.model_id != model and not serves(w, model):
            continue
        total = record.slots_total
        if w.in_flight >= total or w in exclude or (filtered and not wanted.admits(w)) or not registry.routable(w, now):
            continue
        busy = w.in_flight + w.foreign
        other_class = wanted_class is not None and record.continuation_class != wanted_class
        cost = (busy >= total, other_class, w.suspect_until > now, busy / total, w.last_used, record.id)
        if best_cost is None or cost < best_cost:
            best, best_cost = w, cost
    if best is None:
        raise _why_nobody(registry, wanted, now, exclude)
    return best


def _why_nobody(registry: Registry, wanted: Wanted, now: float, exclude: Collection[Worker]) -> RbeeError:
    """Return the error for a request that nobody can take; raises ModelNotFound and its like for one nobody ever could."""
    candidates = _candidates(list(registry), wanted)
    up = [w for w in candidates if wanted.admits(w) and registry.routable(w, now) and w not in exclude]
    if not up:
        return _nobody(registry, candidates, wanted, now, exclude)
    total, busy = sum(w.record.slots_total for w in up), sum(min(w.busy, w.record.slots_total) for w in up)
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
