"""The engine's process as it is forked off the worker (engine/spawn.py), each case in a worker of one thread of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest

_WORKER = """
import json, os, signal, sys
from rbee_serve.worker.engine.spawn import EngineChild
parents = open(os.devnull, "rb")
def body(connection, parent):
    {body}
child = EngineChild(body)
said = child.connection.recv(65536).decode()
words = child.process.stderr.read().decode()
code = child.process.wait()
child.close()
print(json.dumps({{"said": said, "words": words, "code": code, "again": child.process.wait(), "mine": parents.fileno()}}))
"""


def ran(body: str) -> dict[str, Any]:
    """Return what a forked process with this body said, wrote and ended with."""
    done = subprocess.run(
        [sys.executable, "-c", _WORKER.format(body=body)], capture_output=True, text=True, timeout=60, check=True
    )
    found = json.loads(done.stdout)  # one line: nothing of the front's own runs twice
    assert isinstance(found, dict)
    return found


def test_it_has_nothing_of_the_front_but_the_connection_and_knows_its_parent() -> None:
    facts = "{'fds': sorted(map(int, os.listdir('/proc/self/fd'))), 'in': os.read(0, 1).decode()"
    facts += ", 'parent': parent == os.getppid(), 'spin': os.environ['GOMP_SPINCOUNT'], 'connection': connection.fileno()}"
    found = ran(f"connection.sendall(json.dumps({facts}).encode())")
    said = json.loads(found["said"])
    assert (said["in"], said["parent"], said["spin"]) == ("", True, "1000")
    assert set(said["fds"]) >= {0, 1, 2, said["connection"]}
    assert len(said["fds"]) == 5, "the fifth is the folder that is read"
    assert (found["words"], found["code"], found["again"]) == ("", 0, 0)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('the front is gone')", 1, "the front is gone\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt\n"),
        ("print('last words', file=sys.stderr, end='')", 0, "last words"),
        ("raise ValueError('what went wrong')", 1, "ValueError: what went wrong\n"),
    ],
)
def test_its_end_and_its_last_words_are_its_own(body: str, code: int, words: str) -> None:
    found = ran(body)
    assert found["said"] == ""
    assert (found["code"], found["again"]) == (code, code)
    assert found["words"].endswith(words)
    assert bool(found["words"]) == bool(words)


_ENDS = """
    from types import SimpleNamespace
    from rbee_serve.worker.engine.child import EngineLoop, FrontGone
    class Model:
        def __del__(self):
            print("freed", file=sys.stderr)
    def loop_runs(model):
        raise {reason}
    loop, model = EngineLoop(connection), Model()
    loop.texts = SimpleNamespace(busy={busy})
    with loop.ending():
        loop_runs(model)
"""


@pytest.mark.parametrize(("reason", "code"), [("FrontGone", 0), ("RuntimeError('decode failed')", 1)])
@pytest.mark.parametrize("busy", [True, False])
def test_nothing_is_taken_away_from_a_tokenizer_that_works_and_the_reason_is_told(reason: str, code: int, busy: bool) -> None:
    found = ran(_ENDS.format(reason=reason, busy=busy))
    assert found["code"] == code
    assert ("RuntimeError: decode failed\n" in found["words"]) == bool(code)
    assert ("freed" in found["words"]) == (not busy)


def test_where_nobody_may_wait_its_end_is_known_all_the_same() -> None:
    """A supervisor or a shell may have made SIGCHLD ignored, which programs inherit: the kernel then keeps no exit code."""
    script = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from rbee_serve.worker.engine.spawn import EngineChild
child = EngineChild(lambda connection, parent: sys.exit(3))
print(child.process.wait(), child.process.wait())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "0"]


def test_without_a_standard_error_nothing_of_the_front_runs_in_it_either() -> None:
    script = """
import os, sys
from rbee_serve.worker.engine.spawn import EngineChild
try:
    code = EngineChild(lambda connection, parent: sys.exit(7)).process.wait()
finally:
    os.write(1, b"once ")
print(code)
"""
    shell = '"$0" -c "$1" 2>&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["once", "7"]


_MAIN = """
import os, signal, sys
from pathlib import Path
from rbee_serve.worker import main
engine = main._begin_engine()
while (name := Path(f"/proc/{engine.process.pid}/comm").read_text().strip()) != "rbee-engine":
    pass
"""


def test_the_worker_forks_it_while_it_has_one_thread() -> None:
    script = """
own, theirs = (Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ("self", engine.process.pid))
print(own == theirs, len(os.listdir("/proc/self/task")))
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", _MAIN + script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "1"]


def test_it_goes_with_a_front_that_is_killed_though_it_stands_still() -> None:
    """It can not find the connection closed: the kernel ends it."""
    script = """
os.kill(engine.process.pid, signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGKILL)
"""
    front = subprocess.Popen([sys.executable, "-c", _MAIN + script], stdout=subprocess.PIPE)
    assert front.stdout is not None
    with front.stdout:
        assert front.stdout.read() == b"", "whoever holds the pipe has ended"
    assert front.wait(60) == -9
