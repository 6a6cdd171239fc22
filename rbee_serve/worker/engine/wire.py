"""Messages between front and engine process: four bytes of length, then JSON."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from rbee_serve.worker.engine.protocol import EngineConfig

_HEADER = struct.Struct("<I")


def pack(message: Any) -> bytes:
    """Return one message as bytes."""
    body = orjson.dumps(message)
    return _HEADER.pack(len(body)) + body


def configuration(config: EngineConfig) -> bytes:
    """Return the first message to an engine process."""
    return pack({"config": dataclasses.asdict(config)})


def early_configuration(fields: dict[str, Any]) -> bytes:
    """Return the first message to an engine process where it is not certain yet: weights are loaded, then SETTLED is awaited."""
    return pack({"config": fields, "early": True})


#: Says that the settings mean what the engine was told early.
SETTLED = pack({"settled": True})


class Unpacker:
    """Turns a byte stream back into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield each message that ``data`` completes."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield orjson.loads(body)
