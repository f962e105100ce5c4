"""The ordered, durable history of every weighter: what is appended here is what a weighter has been taught.

`UpdateLog` is the interface that the service uses; `SqliteUpdateLog` keeps it in one file of this machine,
`RedisUpdateLog` in a Redis that several services share.
"""

from weighting_service.update_log.base import Appended, Heads, LogEntry, Trimmed, UpdateLog
from weighting_service.update_log.copies import JobCopy, TakenUpdate, Vouched, WeighterCopy
from weighting_service.update_log.redis import RedisUpdateLog
from weighting_service.update_log.sqlite import SqliteUpdateLog

__all__ = [
    "Appended",
    "Heads",
    "JobCopy",
    "LogEntry",
    "RedisUpdateLog",
    "SqliteUpdateLog",
    "TakenUpdate",
    "Trimmed",
    "UpdateLog",
    "Vouched",
    "WeighterCopy",
]
