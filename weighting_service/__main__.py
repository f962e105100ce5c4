"""`python -m weighting_service`: resolves settings and logging, serves, and turns mistakes into sentences."""

from __future__ import annotations

import asyncio
import logging
import sys

from weighting_contract.errors import WeighbridgeError
from weighting_service.settings import load_settings


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after a clean stop, 2 for a mistake in the settings or an address that can't be had."""
    try:
        settings = load_settings(sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        from weighting_service.app import (
            serve_until_signal,
        )  # torch takes seconds to import: --help need not wait for it

        asyncio.run(serve_until_signal(settings))
    except WeighbridgeError as exc:
        print(f"weighting_service: {exc.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
