"""What one connection may take of the server: how long it may be silent, how much it may send, and what it may ask for.

gradio bounds the bytes of a file and the length of its queue. Here is the rest: a body has a size and a pace, so has the head of
a request, requests and uploads at once are counted, of each visitor and of all, and the files of uploads are handed to the folder
that bounds them together.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from devil_hf.demo.uploads import MAX_BYTES, OPENED, UploadFolder

CONNECTIONS = 512  # open at once; who comes then is told to come back
VISITOR_REQUESTS = 128  # of one visitor that are not answered to the end; a page that is open has two
HEAD_SECONDS = 15  # for the head of a request
BODY_SECONDS, BODY_PACE = 20, 64 * 2**10  # for its body: so long, and a second more for so many bytes
SEND_SECONDS = 60  # for a client to take a piece of an answer
MAX_JSON_BYTES = 2**20  # of a body that is no upload
UPLOADS_AT_ONCE, VISITOR_UPLOADS = 8, 2  # of all visitors, and of one
UPLOAD_WAIT = 20  # seconds that another waits for its turn
MULTIPART_BYTES = 2**16  # around the file of an upload
# What may be posted; gradio offers more (recordings, direct calls past the queue), which this page does not use.
POSTED = re.compile(r"(?:/gradio_api)?/(upload|queue/join|call/(?:v2/)?\w+|cancel|reset)/?")


class Refused(Exception):
    """An answer other than success, before anything was done."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Bounds:
    """ASGI middleware: refuses what is posted elsewhere, too much, too slowly, or too often at once.

    Args:
        app: what answers the rest.
        folder: where uploads lie.
        behind_proxy: whether a proxy, as of a Space, names the visitor in its header.
    """

    def __init__(self, app: ASGIApp, folder: UploadFolder, behind_proxy: bool = False):
        self.app, self.folder, self.behind_proxy = app, folder, behind_proxy
        self.requests: Counter[str] = Counter()  # of each visitor, that are open now
        self.uploads: Counter[str] = Counter()
        self.upload_ended = asyncio.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent, visitor = _Sending(send), self._visitor(scope)
        self.requests[visitor] += 1
        try:
            if self.requests[visitor] > VISITOR_REQUESTS:
                raise Refused(429, "Too much is open from your address; close some of it first.")
            if self.folder.due:
                await asyncio.to_thread(self.folder.make_room)
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                await self.app(scope, receive, sent)
            else:
                await self._post(scope, receive, sent, visitor)
        except Refused as refusal:
            if not sent.begun:
                await _refuse(sent, refusal)
        except ClientDisconnect:
            return  # in the middle of a body: no error of ours
        finally:
            self.requests -= Counter([visitor])  # which forgets who has none

    async def _post(self, scope: Scope, receive: Receive, sent: "_Sending", visitor: str) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        asked = POSTED.fullmatch(path)
        if scope["method"] != "POST" or asked is None:
            raise Refused(404, "There is nothing like this here.")
        if asked[1] != "upload":
            sent.asked = _Receiving(receive, scope, MAX_JSON_BYTES)
            return await self.app(scope, sent.asked, sent)
        async with self._turn(visitor):
            opened: list[Any] = []
            OPENED.set(opened)
            sent.kept = []
            try:
                sent.asked = _Receiving(receive, scope, MAX_BYTES + MULTIPART_BYTES)
                await self.app(scope, sent.asked, sent)
            finally:
                await asyncio.to_thread(self.folder.keep, visitor, _paths(b"".join(sent.kept)), opened)

    @asynccontextmanager
    async def _turn(self, visitor: str) -> AsyncIterator[None]:
        """One of the uploads at once, as soon as it may be."""
        try:
            async with asyncio.timeout(UPLOAD_WAIT), self.upload_ended:
                await self.upload_ended.wait_for(
                    lambda: self.uploads.total() < UPLOADS_AT_ONCE and self.uploads[visitor] < VISITOR_UPLOADS
                )
                self.uploads[visitor] += 1
        except TimeoutError as error:
            raise Refused(503, "Many are uploading just now; try again in a moment.") from error
        try:
            yield
        finally:
            self.uploads -= Counter([visitor])
            async with self.upload_ended:
                self.upload_ended.notify_all()

    def _visitor(self, scope: Scope) -> str:
        """The address of who asks; the last one that the proxy names, which nobody can make up."""
        headers = dict(scope["headers"])
        named = headers.get(b"x-forwarded-for", b"").decode("latin-1") if self.behind_proxy else ""
        return named.rpartition(",")[2].strip() or (scope.get("client") or ["nobody"])[0]


class _Receiving:
    """The body of a request, ended when it is too large or too slow."""

    def __init__(self, receive: Receive, scope: Scope, limit: int):
        self.receive, self.limit = receive, limit
        self.bytes, self.over = 0, False
        self.began = asyncio.get_running_loop().time()
        length = dict(scope["headers"]).get(b"content-length", b"0")
        self._check(int(length) if length.isdigit() else 0)

    async def __call__(self) -> Message:
        if self.over:  # the body is there; what comes now is the client's going away
            return await self.receive()
        until = self.began + BODY_SECONDS + self.bytes / BODY_PACE
        try:
            async with asyncio.timeout_at(until):
                message = await self.receive()
        except TimeoutError as error:
            raise Refused(408, "This request came too slowly.") from error
        self.bytes += len(message.get("body", b""))
        self._check(self.bytes)
        self.over = not message.get("more_body", False)
        return message

    def _check(self, size: int) -> None:
        if size > self.limit:
            raise Refused(413, f"At most {self.limit >> 20} MB can be sent here.")


class _Sending:
    """The answer to a request, given up when nobody takes it; `kept` is its body where somebody asks for it.

    An answer to a body (`asked`) that is not there as a whole ends the connection: nobody waits for the rest.
    """

    def __init__(self, send: Send):
        self.send = send
        self.begun = False
        self.kept: list[bytes] | None = None
        self.asked: _Receiving | None = None

    async def __call__(self, message: Message) -> None:
        if not self.begun and self.asked is not None and not self.asked.over:
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        self.begun = True
        if self.kept is not None:
            self.kept.append(message.get("body", b""))
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self.send(message)
        except TimeoutError as error:
            raise Refused(408, "Nobody took this answer.") from error


async def _refuse(send: Send, refusal: Refused) -> None:
    body = str(refusal).encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _paths(answer: bytes) -> list[str]:
    """The files that gradio says it has stored."""
    try:
        paths = json.loads(answer)
    except ValueError:
        return []
    return [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which waits `HEAD_SECONDS` for the head of a request and no longer."""

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self.deadline is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


__all__ = ["CONNECTIONS", "Bounds", "PatientProtocol"]
