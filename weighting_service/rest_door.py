"""What every REST call passes: it gets an id, is asked for its token, and may not be too large. Knows no route.

Plain ASGI, so that a call without a token is answered before its body is read.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weighting_contract.errors import InvalidArgument, Unauthenticated
from weighting_contract.tracing import TRACEPARENT
from weighting_service.auth import Authenticator
from weighting_service.calls import NO_JOB
from weighting_service.logs import REQUEST_ID, begin_request
from weighting_service.service import WeightingService
from weighting_service.tenancy import TenantService
from weighting_service.tracing import TRACER

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})

SLASH = "%2F"  # how the slash in owner/name is written in a path


class Door:
    """ASGI middleware; puts the caller's `TenantService` into the state of the request, as `tenant`."""

    def __init__(self, app: ASGIApp, *, service: WeightingService, auth: Authenticator, max_body_bytes: int) -> None:
        self._app = app
        self._service = service
        self._auth = auth
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = begin_request(headers.get(REQUEST_ID))
        TRACER.begin(headers.get(TRACEPARENT))

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        scope["path"] = _path(scope)
        refusal = self._refusal(scope, headers)
        await (refusal or self._app)(scope, receive, identified)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        """The answer to a call that goes no further."""
        if scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization")
            try:
                caller = self._auth.caller(given)
            except Unauthenticated as exc:
                self._service.metrics.requests.labels("unknown", exc.code, NO_JOB).inc()
                challenge = 'Bearer realm="weighbridge"' + (', error="invalid_token"' if given else "")
                return error_response(exc.code, exc.message, exc.http_status, {"WWW-Authenticate": challenge})
            scope.setdefault("state", {})["tenant"] = TenantService(self._service, caller)
        if "transfer-encoding" in headers:
            message = "a body needs a Content-Length header, not a Transfer-Encoding"
            return error_response(InvalidArgument.code, message, 411)
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body_bytes:
            message = f"the body has {length} bytes, this service takes at most {self._max_body_bytes}"
            return error_response(InvalidArgument.code, f"{message} (--max-message-mb)", 413)
        return None


def error_response(
    code: str, message: str, status: int, headers: dict[str, str] | None = None, **details: Any
) -> JSONResponse:
    """What every error looks like."""
    return JSONResponse({"error": {"code": code, "message": message, **details}}, status, headers)


def _path(scope: Scope) -> str:
    """The path, decoded but for slashes inside of a name, which must not end it."""
    raw = scope.get("raw_path")
    if not raw or b"%2f" not in raw.lower():
        return str(scope["path"])
    parts = re.split(rb"(?i)%2f", raw)
    return SLASH.join(unquote_to_bytes(part).decode("utf-8", "replace") for part in parts)
