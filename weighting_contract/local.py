"""What both sides ask of the machine that they run on: whether a file has changed, whether an address is its own."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path


def file_version(path: Path) -> tuple[int, ...]:
    """Changes with the file; of one that is missing, nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address; a name other than localhost might be anybody's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
