"""The HTTP client towards workers, against a real server on loopback that does what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rbee_serve.queen.http_client import Answer, BrokenError, PooledClient, WokenError

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    """``handler`` gets each connection; counts them and what was asked."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.connections = 0
        self.requests: list[bytes] = []
        self.url = ""

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1/x?y=1"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        return self.requests[-1]

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()


def until(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def whole(answer: Answer) -> bytes:
    assert await answer.head(until()) == 200
    body = b""
    while data := await answer.read(until()):
        body += data
    return body


def play(handler: Callable[[Server], Handler], talk: Callable[[PooledClient, Server], Awaitable[None]]) -> None:
    async def run() -> None:
        server = Server(lambda r, w: handler(server)(r, w))
        client = PooledClient(1.0)
        async with server:
            await talk(client, server)
            await client.aclose()

    asyncio.run(run())


def answering(*answers: bytes) -> Callable[[Server], Handler]:
    """Answer each request of a connection with the next of these, then close."""

    def make(server: Server) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for answer in answers:
                await server.request(reader)
                writer.write(answer)
                await writer.drain()
            await reader.read()

        return handle

    return make


def test_complete_answer_leaves_the_connection_for_the_next_request() -> None:
    async def talk(client: PooledClient, server: Server) -> None:
        for _ in range(3):
            answer = await client.send("POST", server.url, b"body", {"x-name": "value"})
            assert await whole(answer) == b"hello"
            answer.close()
            answer.close()
        assert server.connections == 1
        assert server.requests[0].startswith(b"POST /v1/x?y=1 HTTP/1.1\r\nhost: 127.0.0.1:")
        assert b"x-name: value\r\n" in server.requests[0]
        assert server.requests[0].endswith(b"\r\n\r\nbody")

    play(answering(OK, OK, OK), talk)


def test_unfinished_answer_closes_the_connection() -> None:
    gone = asyncio.Event()

    def make(server: Server) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.request(reader)
            writer.write(CHUNKED + b"3\r\nabc\r\n")
            await reader.read()
            gone.set()

        return handle

    async def talk(client: PooledClient, server: Server) -> None:
        answer = await client.send("POST", server.url, b"", {})
        assert await answer.head(until()) == 200
        assert await answer.read(until()) == b"abc"
        answer.close()
        await asyncio.wait_for(gone.wait(), 5)

    play(make, talk)


def test_wait_can_be_ended_and_nothing_is_lost() -> None:
    def make(server: Server) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.request(reader)
            writer.write(CHUNKED + b"3\r\nabc\r\n0\r\n\r\n")
            await reader.read()

        return handle

    async def talk(client: PooledClient, server: Server) -> None:
        answer = await client.send("POST", server.url, b"", {})
        await answer.head(until())
        answer.wake()
        with pytest.raises(WokenError):
            await answer.read(until())
        assert await whole(answer) == b"abc"

        late = await client.send("POST", server.url, b"", {}, fresh=True)
        await late.head(until())
        assert await late.read(until()) == b"abc"
        with pytest.raises(TimeoutError):
            await Answer().read(until(0.02))
        late.close()
        answer.close()

    play(make, talk)


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (b"", b""),
        (CHUNKED + b"3\r\nabc\r\n", b"abc"),
        (b"garbage\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", b"abc"),
    ],
)
def test_broken_connection_is_told_after_what_had_arrived(sent: bytes, got: bytes) -> None:
    def make(server: Server) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.request(reader)
            writer.write(sent)

        return handle

    async def talk(client: PooledClient, server: Server) -> None:
        answer = await client.send("POST", server.url, b"", {})
        seen = b""

        async def read() -> None:
            nonlocal seen
            await answer.head(until())
            while data := await answer.read(until()):
                seen += data

        with pytest.raises(BrokenError) as e:
            await read()
        assert (seen, e.value.stale) == (got, False)
        answer.close()

    play(make, talk)


def test_kept_connection_that_the_server_closes_is_stale() -> None:
    def make(server: Server) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.request(reader)
            writer.write(OK)
            await server.request(reader)

        return handle

    async def talk(client: PooledClient, server: Server) -> None:
        first = await client.send("POST", server.url, b"", {})
        assert await whole(first) == b"hello"
        first.close()
        second = await client.send("POST", server.url, b"", {})
        with pytest.raises(BrokenError) as e:
            await second.head(until())
        assert e.value.stale
        second.close()
        third = await client.send("POST", server.url, b"", {}, fresh=True)
        assert await whole(third) == b"hello"
        third.close()
        assert server.connections == 2

    play(make, talk)


def test_nobody_listens() -> None:
    async def talk(client: PooledClient, server: Server) -> None:
        await server.__aexit__()
        with pytest.raises(BrokenError, match="no connection"):
            await client.send("POST", server.url, b"", {})

    play(answering(), talk)


@pytest.mark.E39
def test_slow_reader_slows_the_server_and_gets_everything_in_order() -> None:
    piece, count = b"x" * 1000, 20_000  # 20 MB: no socket buffer holds it
    sent = 0

    def make(server: Server) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await server.request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * count))
            for sent in range(1, count + 1):  # noqa: B007
                writer.write(piece)
                await writer.drain()
            await reader.read()

        return handle

    async def talk(client: PooledClient, server: Server) -> None:
        answer = await client.send("POST", server.url, b"", {})
        await answer.head(until())
        before = -1
        while before != sent:  # until the server can go no further
            before = sent
            await asyncio.sleep(0.1)
        assert sent < count
        assert await whole(answer) == piece * count
        answer.close()

    play(make, talk)
