"""Waiting for a condition, the one way that tests do it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0, about: Callable[[], str] = str) -> Any:
    """The first true value of `condition`; fails the test where there is none in time, with what `about` says then."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, f"the condition did not come true {about()}"
        time.sleep(0.005)
    return value
