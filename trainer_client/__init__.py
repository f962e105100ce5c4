"""Weights for the samples of a training batch from a weighting service, without ever stopping the training.

    with connect("grpc://localhost:50051").open_job(weighter="default") as job:
        scores = job.score(features, step)          # uniform weights where the service can't be asked
        job.meta_update(cotangent, features, step)  # delivered in the background

Needs neither torch nor a server. What computes losses, features and cotangents (torch) is imported by name.
"""

from trainer_client.client import Client, connect
from trainer_client.counters import Counters
from trainer_client.job import Job, Scores
from trainer_client.settings import Limits, Timeouts
from weighting_contract.errors import WeighbridgeError

__all__ = ["Client", "Counters", "Job", "Limits", "Scores", "Timeouts", "WeighbridgeError", "connect"]
