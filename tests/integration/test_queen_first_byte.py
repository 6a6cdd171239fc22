"""A request that waits at its worker for somebody else's evaluation of the same prompt is alive, and the queen sees it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, events_of, ids_of

pytestmark = pytest.mark.integration

PREFIX = "The old map showed a river, two hills and a tower that nobody had ever seen. " * 85


def test_requests_that_share_a_cold_prompt_outlast_the_limit_on_the_first_byte(tmp_path: Path, model_path: Path) -> None:
    """Evaluating the prompt takes longer than the queen waits for headers; all that come meanwhile wait for it and copy."""
    seconds = {"connect_timeout_s": 2.0, "first_byte_timeout_s": 2.0, "stall_timeout_s": 60.0}
    fleet = Fleet(tmp_path, model_path, queen_settings=seconds, worker_settings={"ping_interval_s": 0.5})
    answers: list[list[dict[str, Any]]] = []

    def ask(end: str) -> None:
        with fleet.client() as client:
            body = {"prompt": PREFIX + end, "max_tokens": 4, "temperature": 0}
            with client.stream("POST", "/v1/inference", json=body) as response:
                assert response.status_code == 200, response.read()
                answers.append(list(events_of(response)))

    try:
        worker = fleet.add_worker("lab1", slots=3, context_tokens=2048, prompt_block_tokens=32)
        fleet.start_queen()
        fleet.wait_ready()
        threads = [threading.Thread(target=ask, args=(end,)) for end in ("One", "Two", "Three")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        assert [events[-1]["type"] for events in answers] == ["end"] * 3, answers
        assert [len(ids_of(events)) for events in answers] == [4] * 3
        started = [next(e for e in events if e["type"] == "started") for events in answers]
        assert sorted(s["cached_tokens"] > 600 for s in started) == [False, True, True]
        assert fleet.records()[worker]["status"] == "idle"
        with fleet.client() as client:
            assert 'queen_dispatches_total{result="ok"} 3.0' in client.get("/metrics").text
    finally:
        fleet.close()
