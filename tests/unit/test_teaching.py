"""Meta-updates whose call is cut short: what was made durable is applied all the same."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from weighting_service.domain import MetaUpdate, RawInputs
from weighting_service.references import ReferenceStore
from weighting_service.service import WeightingService
from weighting_service.snapshots import SnapshotStore
from weighting_service.update_log import Appended, SqliteUpdateLog
from weighting_service.views import JobRequest, MetaUpdateRequest

FEATURES = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)


class HeldLog(SqliteUpdateLog):
    """Appends when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun, self.let = threading.Event(), threading.Event()

    def append(self, weighter_uid: str, update: MetaUpdate) -> Appended:
        self.begun.set()
        assert self.let.wait(60)
        return super().append(weighter_uid, update)


def test_a_retry_of_a_call_that_was_cancelled_while_it_appended(tmp_path: Path) -> None:
    async def main() -> None:
        log = HeldLog(tmp_path / "log.sqlite")
        references = ReferenceStore(tmp_path / "references", models_dir=None, device=torch.device("cpu"))
        service = WeightingService(log, SnapshotStore(tmp_path / "snapshots"), references, device=torch.device("cpu"))
        await service.start()
        await service.create_weighter("w", {"features": {"names": ["a", "b"]}})
        await service.open_job(JobRequest("w", "job"))
        update = MetaUpdateRequest(0, RawInputs(FEATURES), FEATURES[:, 0])
        call = asyncio.create_task(service.meta_update("job", update))
        await asyncio.to_thread(log.begun.wait)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        log.let.set()
        again = await service.meta_update("job", update)
        assert (again.position, again.duplicate) == (1, True)
        scores = await asyncio.wait_for(service.score("job", RawInputs(FEATURES), min_position=1), 60)
        assert scores.position == 1
        await service.stop()

    asyncio.run(main())
