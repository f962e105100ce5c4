"""The ordered, durable history of every weighter: what is appended here is what a weighter has been taught.

`UpdateLog` is the interface that the service uses; `SqliteUpdateLog` keeps it in one file of this machine.
"""

from weighting_service.update_log.base import Appended, UpdateLog
from weighting_service.update_log.sqlite import SqliteUpdateLog

__all__ = ["Appended", "SqliteUpdateLog", "UpdateLog"]
