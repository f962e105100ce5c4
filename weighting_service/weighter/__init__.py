"""The data weighting model and how it learns: torch only, no threads, no transport, no log.

The one state machine of a weighter: `score` reads its published state, `apply` moves it on by one meta-update.
"""

from weighting_service.weighter.export import load_parameters, weighter_files
from weighting_service.weighter.learner import Published, Weighter
from weighting_service.weighter.model import count_parameters

__all__ = [
    "Published",
    "Weighter",
    "count_parameters",
    "load_parameters",
    "weighter_files",
]
