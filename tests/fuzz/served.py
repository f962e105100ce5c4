"""`python -m tests.fuzz.served FLAGS`: the service as `python -m weighting_service` starts it, which says its memory.

At SIGUSR1 it gives back what it does not need and logs `resident: N bytes`. Linux only, as /proc is.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
from pathlib import Path

from weighting_service.app import serve
from weighting_service.logs import configure_logging
from weighting_service.settings import load_settings

log = logging.getLogger(__name__)


async def main(arguments: list[str]) -> None:
    settings = load_settings(arguments)
    configure_logging(settings.log_level, settings.log_format)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, say_memory)
    await serve(settings, stop)


def say_memory() -> None:
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # glibc keeps what was freed
    log.info("resident: %d bytes", resident_bytes())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
