"""One model at a time: what transformers changes for all threads while it builds a model.

Two threads that build at once get models whose tied weights are missing. A service loads the references of several
jobs, and an embedded one shares its process with a trainer that builds its own model.
"""

from __future__ import annotations

import threading

ONE_AT_A_TIME = threading.RLock()  # around `from_pretrained` and `from_config` of models
