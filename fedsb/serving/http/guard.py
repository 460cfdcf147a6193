"""Around every request: bodies that are too long are refused before anything is made of them, and each answer is counted."""

from collections.abc import MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import Counter

from fedsb.serving.http.service import error_body


class Guard:
    """ASGI middleware. most: bytes of a body; requests: a counter by path and status."""

    def __init__(self, app: Any, most: int, requests: Counter) -> None:
        self.app, self.most, self.requests = app, most, requests

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Read the body, and pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")  # as the routes have it, so that there are few
                self.requests.labels(path, str(message["status"])).inc()
            await send(message)

        body, more = bytearray(), True
        while more and len(body) <= self.most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self.most:
            error = error_body(f"the body is longer than {self.most} bytes; ask for less", 413, "too_large")
            await JSONResponse(error, 413)(scope, receive, counted)
            return
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replayed, counted)
