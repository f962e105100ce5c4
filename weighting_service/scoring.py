"""The use cases that give weights: for a job's batch, for a batch without a job, for texts against example texts.

Belongs to the service's event loop: checks what was sent, on a worker thread where it takes time, and hands it to the
engine.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from weighting_contract.columns import needs_profile
from weighting_contract.errors import InvalidArgument
from weighting_contract.ngrams import profile_table
from weighting_contract.profile import make_profile
from weighting_contract.rows import padded
from weighting_contract.spec import WeighterSpec
from weighting_service import pretaught
from weighting_service.core import Core, tenant_of
from weighting_service.domain import Inputs, JobRecord, RawInputs, ScoreOptions, Scores
from weighting_service.engine import TokenRows
from weighting_service.guards import the_job
from weighting_service.hosting import Entry, Weighters
from weighting_service.inputs import (
    check_feature_names,
    check_inputs,
    check_padded,
    check_samples,
    check_token_rows,
    text_rows,
)
from weighting_service.jobs import Jobs, check_fits
from weighting_service.reference import Reference
from weighting_service.references import ReferenceStore
from weighting_service.views import TextScores


class Scoring:
    """Weights from the weighters of one service."""

    def __init__(self, core: Core, weighters: Weighters, jobs: Jobs, references: ReferenceStore) -> None:
        self._core = core
        self._weighters = weighters
        self._jobs = jobs
        self._references = references

    async def score(
        self,
        job_id: str,
        raw: RawInputs,
        min_position: int = 0,
        min_effective_share: float | None = None,
        return_statistics: bool = False,
    ) -> Scores:
        """Weights for a job's batch, from a state of `min_position` or later."""
        with self._core.under_way.one_of(the_job(job_id)):
            return await self._score(job_id, raw, min_position, min_effective_share, return_statistics)

    async def _score(
        self,
        job_id: str,
        raw: RawInputs,
        min_position: int,
        min_effective_share: float | None,
        return_statistics: bool,
    ) -> Scores:
        job, entry = await self._jobs.get(job_id)
        if min_effective_share is not None and not 0 <= min_effective_share <= 1:
            raise InvalidArgument(f"min_effective_share is {min_effective_share}, expected a value from 0 to 1")
        options = ScoreOptions(job_id, min_effective_share)
        if job.reference and raw.features is None:
            batch: Inputs | TokenRows = await self._token_rows(job, entry, raw)
        elif return_statistics:
            reason = "sent features itself" if job.reference else "has no reference"
            raise InvalidArgument(
                f"return_statistics is set, but job {job_id!r} {reason}: there is nothing to return; leave it out"
            )
        else:
            batch = await self.inputs(entry, raw, job.feature_names)
        scores = await self._scored(entry, job_id, batch, options, min_position)
        return scores if return_statistics else replace(scores, statistics=None)

    async def score_once(
        self, weighter: str, raw: RawInputs, column_order: tuple[str, ...] = (), tenant: str = ""
    ) -> Scores:
        """Weights for a batch without a job. Each tenant has its own share of the device."""
        entry = await self._weighters.find(weighter)
        check_feature_names(column_order, entry.record.spec)
        with self._core.under_way.one_of(f"scoring by weighter {weighter!r} without a job", tenant):
            inputs = await self.inputs(entry, raw, column_order)
            return await self._scored(entry, f"{tenant}:weighter/{weighter}", inputs, ScoreOptions(), 0)

    async def score_texts(
        self,
        texts: tuple[str, ...],
        target: tuple[str, ...],
        weighter: str = "",
        reference: str = "",
        tenant: str = "",
    ) -> TextScores:
        """Weights for texts, by how they help towards a target that the example texts are of. Needs no job.

        Args:
            weighter: name; empty: the pretaught one of the package, which learns nothing.
            reference: name; empty: the one of the package.
            tenant: who asks; each has its own share of the device.
        """
        if not target:
            raise InvalidArgument("target has no texts; give at least one example of what the weights should favour")
        hosted = (await self._weighters.find(weighter)).weighter if weighter else await self._weighters.packaged()
        spec = hosted.spec
        known = await self._references.find(reference or pretaught.NAME)
        check_fits(spec, known.info, known.name, weighter or pretaught.NAME)
        loaded = await self._references.load(known)
        with self._core.under_way.one_of("scoring of texts without a job", tenant):
            batch = await asyncio.to_thread(self._texts, spec, loaded, texts, target, tenant)
            queue = f"{tenant}:texts"
            scores = await asyncio.wrap_future(self._core.engine.score(queue, hosted, batch, ScoreOptions()))
        return TextScores(scores, batch.names)

    async def inputs(self, entry: Entry, raw: RawInputs, column_order: tuple[str, ...]) -> Inputs:
        """What was sent, checked against the weighter's spec; texts are tokenised on a worker thread."""

        def check() -> Inputs:
            return check_inputs(
                raw,
                entry.record.spec,
                limits=self._core.limits.batch,
                vocabulary_size=entry.weighter.vocabulary_size,
                column_order=column_order,
                tokenize=entry.tokenize,
            )

        return check() if raw.texts is None else await asyncio.to_thread(check)

    async def _scored(
        self, entry: Entry, queue: str, batch: Inputs | TokenRows, options: ScoreOptions, min_position: int
    ) -> Scores:
        await self._weighters.wait_for(entry, min_position)
        return await asyncio.wrap_future(self._core.engine.score(queue, entry.weighter, batch, options))

    async def _token_rows(self, job: JobRecord, entry: Entry, raw: RawInputs) -> TokenRows:
        reference = await self._jobs.reference(job)
        names = _names(entry.record.spec)
        table = await self._jobs.table(job) if needs_profile(names) else None

        def check() -> TokenRows:
            rows, field = check_token_rows(raw, limits=self._core.limits.batch, tokenize=reference.tokenize)
            rows = reference.check_rows(rows, field)
            tokens = padded(rows)[0] if table is not None else None
            return TokenRows(reference, rows, names, table, tokens, tenant_of(job.job_id))

        return await asyncio.to_thread(check)

    def _texts(
        self, spec: WeighterSpec, reference: Reference, texts: tuple[str, ...], target: tuple[str, ...], tenant: str
    ) -> TokenRows:
        """The batch with a profile made of the example texts. Runs on a worker thread."""
        rows = self._text_rows(texts, "texts", reference)
        examples = self._text_rows(target, "target", reference)
        names = _names(spec)
        if not needs_profile(names):
            return TokenRows(reference, rows, names, scope=tenant)
        table = profile_table(make_profile(examples, reference.ngram_counts).log_ratios)
        return TokenRows(reference, rows, names, table, padded(rows)[0], tenant)

    def _text_rows(self, texts: tuple[str, ...], field: str, reference: Reference) -> list[np.ndarray]:
        limits = self._core.limits.batch
        check_samples(len(texts), limits)
        rows = text_rows(texts, field, reference.tokenize)
        check_padded(len(rows) * max(map(len, rows)), limits)
        return reference.check_rows(rows, field)


def _names(spec: WeighterSpec) -> tuple[str, ...]:
    return spec.features.names if spec.features else ()
