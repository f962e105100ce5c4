"""`python -m weighting_service`: resolves settings and logging, serves, and turns mistakes into sentences.

Two commands stand beside serving: `token` makes a token, `migrate` moves a state to another log.
"""

from __future__ import annotations

import asyncio
import sys

from weighting_contract.errors import WeighbridgeError
from weighting_contract.memory import keep_freed_memory
from weighting_service import tokens
from weighting_service.logs import configure_logging
from weighting_service.settings import load_settings


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after a clean stop, 2 for a mistake in the settings or an address that can't be had.

    `migrate` has 1 for what stands in its way.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given[:1] == ["token"]:
            return tokens.main(given[1:])
        if given[:1] == ["migrate"]:
            from weighting_service.migrate import main as migrate  # imports more than other commands need

            return migrate(given[1:])
        settings = load_settings(given)
        configure_logging(settings.log_level, settings.log_format)
        keep_freed_memory()
        from weighting_service.app import serve_until_signal  # takes seconds, as torch does: --help need not wait

        asyncio.run(serve_until_signal(settings))
    except WeighbridgeError as exc:
        print(f"weighting_service: {exc.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
