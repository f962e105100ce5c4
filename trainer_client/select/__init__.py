"""Batches chosen from candidates that a weighter scored ahead of time; training never stops because of it.

    with connect("grpc://localhost:50051").open_job(weighter="mine", reference="pool", profile=profile) as job:
        batches = select(loader, job, candidates=4)
        for batch in batches:                       # a batch of the loader's size, chosen from four of its batches
            ...
            if batches.due:                         # every few steps
                batches.teach(cotangent)            # of the first samples of the batch

`choose` is the rule, `Selector` the scoring in the background, `select` the two around a loader. `choose` and
`Selector` need no torch.
"""

from trainer_client.cadence import CADENCE_TAUGHT, Cadence
from trainer_client.select.batches import SelectedBatches, select
from trainer_client.select.choice import Selection, choose
from trainer_client.select.selector import Selector

__all__ = ["CADENCE_TAUGHT", "Cadence", "SelectedBatches", "Selection", "Selector", "choose", "select"]
