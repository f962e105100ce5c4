"""The target profile of a job: made of its validation samples against the reference's pool, or read from a file."""

from __future__ import annotations

from trainer_client.profile import load_profile
from trainer_client.run.reference import RunReference
from trainer_client.run.task import Task
from weighting_contract.errors import InvalidArgument
from weighting_contract.profile import Profile, documents_checksum, make_profile


def job_profile(path: str, task: Task, reference: RunReference) -> Profile:
    """The profile that a job hands over.

    Args:
        path: of a profile file; empty: it is made of the validation samples that are not held out.

    Raises:
        InvalidArgument: a file that can't be read, or is of another reference, size, or of other documents than the
            validation set's.
    """
    if not path:
        return make_profile(task.profile_tokens, reference.ngrams)
    profile = load_profile(path, reference_checksum=reference.checksum)
    if len(profile.log_ratios) != len(reference.ngrams):
        raise InvalidArgument(
            f"--profile {path} has {len(profile.log_ratios)} buckets, but the reference {reference.name!r} counts "
            f"{len(reference.ngrams)}: make the profile again with that reference"
        )
    if profile.documents_checksum not in (documents_checksum(task.val.tokens), task.val_checksum):
        raise InvalidArgument(
            f"--profile {path} was made of other documents than this run's validation set (checksum "
            f"{profile.documents_checksum[:12]}..., expected {task.val_checksum[:12]}... of the documents): make it of "
            "them, or leave it out"
        )
    return profile
