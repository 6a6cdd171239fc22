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


def test_it_goes_with_a_front_that_is_killed() -> None:
    script = """
import os, signal, sys
from rbee_serve.worker.engine import child, spawn
engine = spawn.EngineChild(child.run)
print(engine.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    front = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert front.stdout is not None
    with front.stdout:
        pid = int(front.stdout.readline())
        assert front.stdout.read() == "", "the engine, which holds the same pipe, has ended"
    assert front.wait(60) == -9
    assert pid > 0
