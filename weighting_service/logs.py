"""The service's log: one line a record, as text or as JSON, with the id of the call that it belongs to.

Knows no transport; those begin a call's id here, and send it back.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

REQUEST_ID = "x-request-id"  # the header or metadata that carries it, both ways

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_SANE = re.compile(r"[A-Za-z0-9._:/=+@-]{1,128}")  # nothing that could forge a log line


def begin_request(given: str | None) -> str:
    """The id of the call that begins in this context: the one that its caller gave, if it is sane, or a new one."""
    chosen = given if given and _SANE.fullmatch(given) else uuid.uuid4().hex
    _request_id.set(chosen)
    return chosen


def current_request_id() -> str:
    """Of the call under way in this context, empty outside of one."""
    return _request_id.get()


def configure_logging(level: str, form: Literal["text", "json"]) -> None:
    """Sends the process's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """`time level logger: message [request id]`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return f"{line} [{request_id}]" if (request_id := current_request_id()) else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; request_id and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id():
            values["request_id"] = request_id
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)
