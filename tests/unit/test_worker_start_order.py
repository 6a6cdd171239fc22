"""What a worker's start waits for, and what not: the order of imports is its speed (worker/main.py)."""

import subprocess
import sys

from rbee_serve.worker.engine.spawn import environment


def imported_by(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has after ``code``."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_engine_begins_before_anything_large_is_imported() -> None:
    loaded = imported_by("import rbee_serve.worker.main")
    assert not loaded & {"argparse", "asyncio", "logging", "pydantic", "tomllib", "starlette", "rbee_serve.contract.settings"}
    forked = imported_by("import rbee_serve.worker.engine.child, rbee_serve.worker.engine.spawn")
    assert not forked & {"argparse", "asyncio", "logging", "pydantic", "tomllib", "numpy", "llama_cpp"}


def test_the_front_imports_neither_numpy_nor_what_only_some_requests_need() -> None:
    loaded = imported_by("import rbee_serve.worker.service")
    assert "rbee_serve.worker.app" in loaded
    assert not loaded & {"numpy", "llama_cpp", "jinja2", "httpx"}


def test_the_engine_can_load_weights_and_make_its_context_before_numpy_is_imported_and_never_imports_pydantic() -> None:
    loaded = imported_by("import rbee_serve.worker.engine.child as child\nchild.bindings()")
    assert {"rbee_serve.worker.engine.weights", "rbee_serve.worker.engine.context", "llama_cpp.llama_cpp"} <= loaded
    assert not loaded & {"numpy", "rbee_serve.worker.engine.llama", "rbee_serve.worker.engine.scheduler"}
    rest = imported_by("import rbee_serve.worker.engine.child as child\nchild.import_rest()")
    assert {"numpy", "rbee_serve.worker.engine.llama", "rbee_serve.worker.engine.scheduler"} <= rest
    assert not rest & {"pydantic", "asyncio", "starlette", "jinja2"}


def test_messages_are_built_when_one_is_read() -> None:
    code = (
        "from rbee_serve.contract.api import InferenceRequest\n"
        "assert not InferenceRequest.__pydantic_complete__\n"
        "assert InferenceRequest.model_validate({'prompt': 'a'}).prompt == 'a'\n"
        "assert InferenceRequest.__pydantic_complete__"
    )
    assert "pydantic" in imported_by(code)


def test_compute_threads_soon_let_others_have_the_core_unless_an_administrator_wants_it_otherwise() -> None:
    assert environment({"A": "b"}) == {"A": "b", "OPENBLAS_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    assert environment({"GOMP_SPINCOUNT": "7", "OPENBLAS_NUM_THREADS": "2"}) == {
        "GOMP_SPINCOUNT": "7",
        "OPENBLAS_NUM_THREADS": "2",
    }
    assert environment({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active", "OPENBLAS_NUM_THREADS": "1"}
