"""`python append_until_killed.py STORAGE`: appends `update_of` 1, 2, 3, ... and prints each position once it is told.

STORAGE is the path of a SQLite log, or the URL of one in Redis.
"""

from __future__ import annotations

import sys

from log_samples import JOB, UID, WEIGHTER, update_of

from weighting_service.update_log import RedisUpdateLog, SqliteUpdateLog, UpdateLog


def open_log(storage: str) -> UpdateLog:
    return RedisUpdateLog(storage) if storage.startswith("redis://") else SqliteUpdateLog(storage)


if __name__ == "__main__":
    with open_log(sys.argv[1]) as log:
        log.create_weighter(WEIGHTER)
        log.put_job(JOB)
        step = 1
        while True:
            print(log.append(UID, update_of(step)).position, flush=True)
            step += 1
