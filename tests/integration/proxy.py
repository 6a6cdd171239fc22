"""A TCP proxy whose connections can be held and cut: the network between the queen and one worker."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time


class Proxy:
    """Forwards connections to ``target`` (a port of loopback) until ``cut`` resets all of them; new ones are let through.

    While ``hold_after`` is set, the first event of a stream that has these bytes is the last one that its reader gets: what
    comes behind it is lost with the connection, as if it had been on its way.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.hold_after: bytes | None = None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._lock = threading.Lock()
        self._copying: dict[tuple[socket.socket, socket.socket], int] = {}  # threads at work on each pair
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._listening.accept()
                try:
                    outer = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                except OSError:
                    inner.close()
                    continue
                outer.settimeout(None)
                with self._lock:
                    self._copying[inner, outer] = 2
                for a, b in ((inner, outer), (outer, inner)):
                    threading.Thread(target=self._copy, args=(a, b, (inner, outer)), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(OSError):
            self._forward(source, sink)
        for s in pair:  # either end closes both, as one connection would
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._copying[pair] -= 1
            if last := not self._copying[pair]:
                del self._copying[pair]
        if last:  # nobody reads from them any more
            for s in pair:
                s.close()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        before = b""  # the last bytes that went through: a mark may lie across two pieces
        ends = 0  # line ends of the last event that are still to come; none is held yet
        while data := source.recv(65536):
            start, mark = 0, self.hold_after
            if mark and not ends and (at := (before + data).find(mark)) >= 0:
                start, ends = max(0, at + len(mark) - len(before)), 2
            if ends:
                whole = [n + 1 for n in range(start, len(data)) if data[n] == ord("\n")][:ends]
                ends -= len(whole)
                if not ends:
                    sink.sendall(data[: whole[-1]])
                    while source.recv(65536):
                        pass
                    return
            before = (before + data)[-64:]
            sink.sendall(data)

    def cut(self) -> int:
        """Reset every connection; returns how many there were."""
        with self._lock:
            pairs = list(self._copying)
        for pair in pairs:
            for s in pair:
                self._reset(s)
        return len(pairs)

    @staticmethod
    def _reset(s: socket.socket) -> None:
        with contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._accepting.join(60)
        self._listening.close()
        self.cut()
        end = time.monotonic() + 10
        while self._copying and time.monotonic() < end:
            time.sleep(0.01)
