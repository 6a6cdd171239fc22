"""The engine process: loads the model, then one loop of reading messages and stepping. Begun by spawn.py.

Everything happens in one thread, so what it reports (a tick at least once a second) is proof that generation moves. A second
one only reads: it hears of a cancellation while llama.cpp computes and ends the evaluation of that prompt. One
more tokenizes what is long (tokenizing.py). At the start another one imports numpy and what else is needed last, while llama.cpp
makes the context: it asks nobody meanwhile, whereas it tells its progress of each matrix that it loads, and the front has done
with its own imports by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from rbee_serve.contract.errors import InferenceFailed, InvalidRequest, RbeeError
from rbee_serve.worker.engine import room
from rbee_serve.worker.engine.context import Context
from rbee_serve.worker.engine.interrupt import Interrupt
from rbee_serve.worker.engine.model_file import read_header
from rbee_serve.worker.engine.protocol import EngineConfig, GenerateRequest
from rbee_serve.worker.engine.weights import Weights, bindings
from rbee_serve.worker.engine.wire import Unpacker, pack

if TYPE_CHECKING:
    from rbee_serve.contract.api import SamplingParams
    from rbee_serve.worker.engine import llama
    from rbee_serve.worker.engine.embedding import Embedder
    from rbee_serve.worker.engine.scheduler import Event, Scheduler
    from rbee_serve.worker.engine.tokenizing import Tokenizing

TICK_S = 0.5
#: Tokens of quick steps are sent together, some sixty times a second. Each message costs the front 0.3 ms on cores that it
#: shares with the compute threads, which wait for one another: one by one, a small model lost a tenth of its speed. A
#: pause becomes longer by it only where a step takes longer than the one before, and by less than this.
HOLD_S = 0.02
#: How soon the interpreter's lock is passed on during the start: llama.cpp tells its progress of each matrix, and would wait.
_SWITCH_S = 1e-4
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
#: What ps and top call the process.
NAME = "rbee-engine"


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the worker's front goes: no orphan may hold the model's memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the worker's front is gone")


def as_params(values: dict[str, Any]) -> SamplingParams:
    """Return sampling parameters that the front has validated; pydantic stays out of this process (cold start)."""
    values["logit_bias"] = dict(values["logit_bias"])  # JSON keys are strings, so they came as pairs
    return cast("SamplingParams", SimpleNamespace(**values))


class FrontGone(SystemExit):
    """The front has closed the connection: the end of this process, with 0."""

    code = 0


class EngineLoop:
    """Connection to the front, and the loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()  # None: the front is gone
        self._interrupt = Interrupt()
        self._ticked = 0.0
        self._held: list[Event] = []
        self._gave_out = 0.0
        self._stepped = 0.0
        self._timed = 0.0
        self._busy_s = 0.0
        self._imports = threading.Thread(target=import_rest, name="imports")
        self.texts: Tokenizing | None = None

    def send(self, message: Any) -> None:
        """Send; ends the process when the front is gone."""
        self._ticked = time.monotonic()
        try:
            self._connection.sendall(pack(message))
        except OSError:
            raise FrontGone from None

    def give_out(self, events: list[Event]) -> None:
        """Send at once what was held and the events of one step, as one message."""
        self._held += events
        if self._held:
            self._gave_out = time.monotonic()
            events, self._held = self._held, []
            self.send({"events": events})

    def hold(self, events: list[Event]) -> None:
        """Send the events of a step that is followed at once by the next one. Mere tokens wait for those of the next step where
        these, if it takes as long as the last, will be there within ``HOLD_S`` after the tokens that were sent last."""
        now = time.monotonic()
        step_s, self._stepped = now - self._stepped, now
        if now + step_s - self._gave_out < HOLD_S and all(kind == "token" for kind, _, _ in events):
            self._held += events
        else:
            self.give_out(events)

    def receive(self, timeout_s: float) -> list[Any]:
        """Return the messages that have arrived, waiting up to ``timeout_s`` for the first."""
        messages: list[Any] = []
        if not timeout_s and self._messages.empty():
            return messages
        with contextlib.suppress(queue.Empty):
            messages.append(self._messages.get(timeout=timeout_s) if timeout_s else self._messages.get_nowait())
            while True:
                messages.append(self._messages.get_nowait())
        if None in messages:
            raise FrontGone
        return messages

    def listen(self) -> None:
        """Read in a thread of its own from now on."""
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def _listen(self) -> None:
        unpacker = Unpacker()
        try:
            while data := self._connection.recv(1 << 20):
                for message in unpacker.feed(data):
                    if (request_id := message.get("cancel")) is not None:
                        self._interrupt.cancel(request_id, partial(self._messages.put, message))
                    else:
                        self._messages.put(message)
        except OSError:
            pass
        finally:
            self._messages.put(None)
            self._interrupt.cancel_watched()

    def configuration(self) -> tuple[EngineConfig, bool]:
        """Wait for the first message: what to load, and whether that was said early."""
        first: Any = None
        if self._messages.empty():  # nothing to load yet
            self._imports.start()
        while first is None:
            with contextlib.suppress(queue.Empty):
                first = self._messages.get(timeout=60.0)
                if first is None:
                    raise FrontGone
        return EngineConfig(**first["config"]), first.get("early", False)

    def load(self, config: EngineConfig, *, early: bool = False) -> tuple[llama.Model, Scheduler]:
        """Load and prove that a token can be generated; progress goes to the front as it happens.

        ``early``: the front has not read its settings yet. Weights are loaded, and nothing else before it has.
        """
        header = read_header(Path(config.model_path))
        room.check(config, header)
        layers, seen = header.block_count, -1

        def progress(value: float) -> None:
            nonlocal seen
            loaded = min(layers, int(value * layers))
            if loaded != seen or time.monotonic() - self._ticked > TICK_S:
                seen = loaded
                self.send({"load": {"stage": "loading_to_vram", "layers_loaded": loaded, "layers_total": layers}})

        progress(0.0)
        weights = Weights(config, header, progress)
        if self._imports.ident is None:
            self._imports.start()
        while early:
            early = not any("settled" in message for message in self.receive(60.0))
        context = Context(weights, self._interrupt)

        from rbee_serve.worker.engine import llama
        from rbee_serve.worker.engine.prefix_store import PrefixStore
        from rbee_serve.worker.engine.scheduler import Scheduler

        model = llama.Model(context)
        store = None
        if config.prefix_store_dir is not None:
            store = PrefixStore(Path(config.prefix_store_dir), model.state_fingerprint, config.prefix_store_max_bytes)
        gap_s, draft_tokens = config.stream_gap_s, config.draft_tokens
        scheduler = Scheduler(model, config.slots, gap_s=gap_s, store=store, draft_tokens=draft_tokens)
        self_test(model, scheduler)
        self.send({"ready": model.facts(), "layers_total": layers})
        return model, scheduler

    def run(self, model: llama.Model, scheduler: Scheduler) -> None:
        """Step for ever: as fast as possible while there is work, else wait for a message."""
        from rbee_serve.worker.engine.embedding import LEAST_ROWS, Embedder
        from rbee_serve.worker.engine.tokenizing import Tokenizing, without_texts

        embedder = Embedder(model)
        texts = self.texts = Tokenizing(lambda message: without_texts(message, model, embedder), self._messages.put)
        model.decode_s = 0.0  # the self test does not count
        while True:
            began, idle = time.perf_counter(), not (scheduler.has_work or embedder.has_work)
            messages = self.receive(TICK_S if idle else 0.0)
            if idle:
                began = time.perf_counter()  # waiting is no work
            if messages:  # a text to tokenize or a prefix to read may take its time
                self.give_out([])
            events: list[Event] = []
            for came in messages:
                if (message := texts.ready(came)) is not None:
                    events += self._handle(message, scheduler, texts)
                    self._answer(message, model, embedder, texts)
            holds = scheduler.decodes_only and not embedder.has_work
            if events or not holds:
                self.give_out(events)
            if scheduler.has_work:
                try:
                    scheduler.step(self.hold if holds else self.give_out)
                except Exception:
                    self.give_out([])
                    raise
            self._busy_s += time.perf_counter() - began
            if embedder.has_work and (rows := scheduler.spare(LEAST_ROWS, embedder.token_s)) != 0:
                for number, part in embedder.step(rows):
                    if isinstance(part, RbeeError):
                        self._reply(number, part)
                    else:
                        self.send(part | {"number": number})
            if time.monotonic() - self._timed >= TICK_S:
                self._timed = time.monotonic()
                self.send({"totals": [self._busy_s, model.decode_s, scheduler.drafted, scheduler.accepted]})

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Whatever ends the loop ends the process at once while the tokenizer works: it reads what an orderly end takes away, and
        the front would hear of that crash instead of the reason."""
        try:
            yield
        except BaseException as e:
            if self.texts is None or not self.texts.busy:
                raise
            gone = isinstance(e, FrontGone)
            if not gone:
                sys.excepthook(type(e), e, e.__traceback__)  # flushes
            os._exit(0 if gone else 1)

    def _handle(self, message: dict[str, Any], scheduler: Scheduler, texts: Tokenizing) -> list[Event]:
        if (request := message.get("submit")) is not None:
            return scheduler.submit(GenerateRequest(params=as_params(request.pop("params")), **request))
        if (request_id := message.get("cancel")) is not None:
            self._interrupt.heard(request_id)
            return texts.cancel(request_id) or scheduler.cancel(request_id)
        if (request_id := message.get("refuse")) is not None:
            return [("error", request_id, message["error"])]
        return []

    def _answer(self, message: dict[str, Any], model: llama.Model, embedder: Embedder, texts: Tokenizing) -> None:
        """Answer what is asked under a number; embeddings are answered when they are there."""
        if (question := message.get("tokenize")) is not None:
            ids = model.tokenize(question["text"], parse_special=question["parse_special"], add_bos=question["add_bos"])
            self._reply(message["number"], ids)
        elif (tokens := message.get("detokenize")) is not None:
            self._reply(message["number"], detokenize(model, tokens, special=message["special"]))
        elif (inputs := message.get("embed")) is not None:
            try:
                embedder.submit(message["number"], inputs)
            except RbeeError as e:
                self._reply(message["number"], e)
        elif (answer := message.get("told")) is not None:
            self._reply(message["number"], answer)
        elif (number := message.get("forget")) is not None:
            texts.cancel(number)
            embedder.cancel(number)

    def _reply(self, number: int, answer: Any) -> None:
        if isinstance(answer, RbeeError):
            self.send({"refused": answer.envelope()["error"], "number": number})
        else:
            self.send({"answer": answer, "number": number})


def detokenize(model: llama.Model, ids: list[int], *, special: bool) -> str | RbeeError:
    """Return the text of ``ids``; control tokens are left out, or spelled with ``special``."""
    if bad := [i for i in ids if not 0 <= i < model.n_vocab]:
        return InvalidRequest(f"token_ids: {bad[0]} is no token of this model, which has {model.n_vocab}", field="token_ids")
    return b"".join(map(model.shown if special else model.piece, ids)).decode("utf-8", "replace")


def self_test(model: llama.Model, scheduler: Scheduler) -> None:
    """Generate one token, or embed one text where that is what the model does; raises InferenceFailed when it does not work."""
    if not model.causal:
        from rbee_serve.worker.engine.embedding import Embedder

        embedder = Embedder(model)
        embedder.submit(0, ["a"])
        answers: list[Any] = []
        while embedder.has_work:
            answers += [answer for _, answer in embedder.step()]
        if not isinstance(answers[-1], dict):
            raise InferenceFailed(f"self test of one embedding failed: {answers}")
        return
    params = {"max_tokens": 1, "temperature": 0, "seed": 0, "stop": [], "ignore_eos": False}
    params |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": None}
    params |= {"typical_p": 1, "grammar": None, "json_schema": None}
    events = scheduler.submit(GenerateRequest("self-test", "a", False, True, as_params(params)))
    while scheduler.has_work:
        scheduler.step(events.extend)
    if "finished" not in [kind for kind, _, _ in events]:
        raise InferenceFailed(f"self test of one token failed: {events}")


def import_rest() -> None:
    """Import what comes after the weights; what is missing is said by who needs it."""
    with contextlib.suppress(ImportError):
        from rbee_serve.worker.engine import embedding, llama, prefix_store, scheduler, tokenizing  # noqa: F401


def run(connection: socket.socket, parent: int) -> None:
    """Be the engine: the first message is the configuration. Returns never; ends with SystemExit."""
    gc.disable()
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else an assert starts gdb first
    # Device numbers are nvidia-smi's, as everywhere in rbee; CUDA by itself puts the fastest first.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    die_with(parent)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, NAME.encode())
    # Ctrl+C in a terminal and systemd's SIGTERM reach the whole group: the front decides, streams may still be draining.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    loop = EngineLoop(connection)
    loop.listen()
    with contextlib.suppress(RbeeError):  # loading says it again, to somebody who listens
        bindings()
    config, early = loop.configuration()
    try:
        model, scheduler = loop.load(config, early=early)
    except RbeeError as e:
        loop.send({"failed": e.envelope()["error"]})
        raise SystemExit(1) from None
    sys.setswitchinterval(usual_s)
    gc.freeze()  # modules stay: no collection looks at them again
    gc.enable()
    with loop.ending():
        try:
            loop.run(model, scheduler)
        except FrontGone:
            scheduler.park()
            raise


if __name__ == "__main__":  # ``child FD PARENT_PID``
    run(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
