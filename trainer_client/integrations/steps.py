"""The weights of one optimiser step after the other, over all ranks and micro-batches, and the teaching in between.

    L = sum_i w_i S_i / N        S_i: summed token NLL of sample i, N: real tokens of the whole batch

which with w_i = 1 is the mean over tokens that trainers minimise. Knows ranks and jobs, but no framework: integrations
say when a step begins and what its token losses are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from trainer_client.cadence import Cadence, usual_cadence
from trainer_client.client import Client, connect
from trainer_client.features import FEATURE_NAMES
from trainer_client.group_job import GroupJob, group_job
from trainer_client.hypergradient import cotangent
from trainer_client.job import Job, OnFailure, Scores
from trainer_client.linear_loss import linear_token_losses
from trainer_client.loss import per_sample_loss, token_losses
from trainer_client.packed import Documents, document_token_losses
from trainer_client.ranks import Ranks
from trainer_client.run.deliver import deliver
from weighting_contract.columns import batch_columns
from weighting_contract.errors import FailedPrecondition, InvalidArgument, WeighbridgeError
from weighting_contract.statistics import RAW_NAMES, raw_statistics, unigram_nll_table

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Weighting:
    """Which weighter a run is attached to, and how it teaches it. Credentials may be in the environment (`connect`).

    Args:
        url: of the service, or "embedded".
        weighter: its name; made to read the portable statistics where it is missing.
        role: "learn" scores and teaches, "frozen" scores only.
        on_failure: "uniform" trains on with equal weights, "raise" raises, for debugging.
        cadence: the steps that are taught in; None: every tenth, or those that a frozen job's trust needs.
        meta_batch: samples of a step, over all ranks, that a meta-update is made of; at most a micro-batch a rank.
        validation_batch: validation samples that one is taken towards, over all ranks.
        counts: [V] how often each token occurs in the training data; None: counted in the first `counted_steps` steps.
        counted_steps: after these the counts stay, so that the features keep their meaning.
        alpha: length of the perturbation, as of `cotangent`; None: by the precision of the call.
        packed: rows hold several documents, each of which is a sample and has a weight (Hugging Face: `position_ids`
            say where they begin). A meta-update is then made of a rank's whole first micro-batch.
        fused: losses straight from the hidden states, without the logits in memory, where the integration makes them
            (Hugging Face).
        seed: of the validation samples that are drawn, together with the step.
        connection: further arguments of `connect`.

    Raises:
        InvalidArgument: a number below 1.
    """

    url: str = "grpc://localhost:50051"
    weighter: str = "default"
    role: Literal["learn", "frozen"] = "learn"
    on_failure: OnFailure = "uniform"
    cadence: Cadence | None = None
    meta_batch: int = 12
    validation_batch: int = 4
    counts: Tensor | None = None
    counted_steps: int = 64
    alpha: float | None = None
    packed: bool = False
    fused: bool = False
    seed: int = 0
    connection: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("meta_batch", "validation_batch", "counted_steps"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}, expected 1 or more")

    @classmethod
    def of(cls, given: Self | str) -> Self:
        """Settings as they are, or the defaults with a service's URL."""
        return cls(given) if isinstance(given, str) else given


@dataclass(frozen=True)
class TokenLosses:
    """What is known of the samples of a micro-batch once the model has read them."""

    losses: Tensor  # [b, T] nats, 0 where there is no real token
    mask: Tensor  # [b, T] bool
    labels: Tensor  # [b, T] token ids; anything where there is no real token
    vocabulary: int
    packed: bool = False  # whether samples are documents, and not rows of what the model reads

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> TokenLosses:
        """Of logits [b, T, V] and the labels [b, T] at the same places; -100 where there is no real token."""
        losses, mask = token_losses(logits, labels)
        return cls(losses, mask, labels, logits.shape[-1])

    @classmethod
    def of_hidden(cls, hidden: Tensor, weight: Tensor, labels: Tensor, **settings: Any) -> TokenLosses:
        """The same without logits in memory, of hidden states [b, T, d] and output matrix [V, d].

        settings: of `linear_token_losses`.
        """
        losses, mask = linear_token_losses(hidden, weight, labels, **settings)
        return cls(losses, mask, labels, len(weight))

    def by_document(self, documents: Documents) -> TokenLosses:
        """The documents of packed rows as samples; losses and labels are at the places of `document_labels`."""
        losses, inside = document_token_losses(self.losses, documents)
        labels, _ = document_token_losses(self.labels, documents)
        real, _ = document_token_losses(self.mask, documents)
        return TokenLosses(losses, inside & (real != 0), labels, self.vocabulary, packed=True)

    @property
    def sums(self) -> Tensor:
        """[b] summed over each sample's tokens."""
        return torch.where(self.mask, self.losses, 0.0).sum(1)


class WeightedSteps:
    """Weights and teaching of a run. All ranks call the same methods in the same order; `open` it, and `close` it.

        weights = steps.weigh(micro_batches, step)
        for each micro-batch: steps.loss(micro_batch, its weights).backward()
        if steps.due(step): steps.teach(...)
        optimizer.step()

    Attributes:
        scores: of the step that was weighed last, this rank's rows; None before the first.
    """

    def __init__(self, weighting: Weighting | str) -> None:
        self.weighting = Weighting.of(weighting)
        self.scores: Scores | None = None
        self._ranks: Ranks | None = None
        self._client: Client | None = None
        self._own: Job | None = None  # the first rank's
        self._group: GroupJob | None = None
        self._left: dict[str, Any] | None = None  # state of the job that was closed, on the first rank
        self._counts = None if self.weighting.counts is None else torch.as_tensor(self.weighting.counts).cpu()
        self._table: Tensor | None = None  # [V] unigram NLL, of the counts
        self._first_rows = torch.zeros(0, len(RAW_NAMES))  # raw rows of this rank's first micro-batch
        self._packed = False
        self._tokens, self._samples = 0.0, 0  # of the whole batch
        self._told = {"fallback_steps": 0, "updates": 0, "degenerate": 0}

    def open(self, ranks: Ranks | None = None) -> Self:
        """Attaches the job on the first rank; None: all ranks that there are.

        Raises:
            WeighbridgeError: on all ranks, for arguments that can't be right, or with `on_failure="raise"`.
        """
        self._ranks = ranks or Ranks.current()
        self._ranks.from_first(self._attach)
        self._group = group_job(self._own, self._ranks)
        return self

    def close(self) -> None:
        """Delivers what is outstanding; idempotent."""
        if self._own is not None:  # checkpoints may be written after a run
            self._job_state()
        if self._group is not None:
            self._group.close()
        if self._client is not None:
            self._client.close()
        self._group = self._client = self._own = None

    @property
    def ranks(self) -> Ranks:
        if self._ranks is None:
            raise FailedPrecondition("the steps are not open; call open() once the process group is there")
        return self._ranks

    def weigh(self, micro_batches: Sequence[TokenLosses], step: int) -> list[Tensor]:
        """The weights of this rank's micro-batches, [b] each; their mean over all ranks and micro-batches is 1."""
        table = self._unigram_nll(micro_batches, step)
        raw = [_raw_rows(part, table) for part in micro_batches]
        features, everyone = self._columns(torch.cat(raw))
        scores = self._opened().score(features, step)
        self.scores, self._first_rows, self._packed = scores, raw[0], micro_batches[0].packed
        self._tokens = float(everyone[:, RAW_NAMES.index("tokens")].sum())
        self._samples = len(everyone)
        self._told["fallback_steps"] += scores.fallback
        weights: tuple[Tensor, ...] = scores.weights.split([len(part.losses) for part in micro_batches])
        return [w.to(part.losses.device) for w, part in zip(weights, micro_batches, strict=True)]

    def loss(self, micro_batch: TokenLosses, weights: Tensor) -> Tensor:
        """This micro-batch's share of L, times the number of ranks, as data parallel trainers average over them."""
        share: Tensor = (weights * micro_batch.sums).sum()
        return share * (self.ranks.world / max(self._tokens, 1.0))

    def due(self, step: int) -> bool:
        """Whether the weighter is taught in this step."""
        usual = usual_cadence(chooses=False, frozen=self.weighting.role == "frozen")
        return (self.weighting.cadence or usual).due(step)

    @property
    def taught_rows(self) -> int:
        """The first so many samples of this rank's first micro-batch are what a meta-update is made of."""
        if self._packed:  # documents can't be cut off a row
            return len(self._first_rows)
        return min(math.ceil(self.weighting.meta_batch / self.ranks.world), len(self._first_rows))

    def teach(
        self,
        model: _Model,
        read: Callable[[_Model, Any], TokenLosses],
        batch: Any,
        validation_batch: Any,
        *,
        learning_rate: float,
        step: int,
    ) -> bool:
        """One meta-update, between the backward passes and the optimiser's step; whether there was one to send.

        Args:
            model: as for `cotangent`.
            read: (model, batch) -> the token losses.
            batch: for `read`, the first `taught_rows` samples of this rank's first micro-batch.
            validation_batch: for `read`, this rank's.
            learning_rate: of the step; with 0, as in the first step of a warm-up, there is nothing to teach.
        """
        if learning_rate <= 0:
            return False
        samples_by_tokens = self._samples / max(self._tokens, 1.0)
        features, _ = self._columns(self._first_rows[: self.taught_rows])
        try:
            computed = cotangent(
                model,
                lambda model, batch: read(model, batch).sums * samples_by_tokens,
                batch,
                validation_batch,
                learning_rate=learning_rate,
                validation_loss=lambda model, batch: _mean_loss(read(model, batch)),
                group=self.ranks.group,
                alpha=self.weighting.alpha,
            )
        except WeighbridgeError as exc:
            self._nothing_to_teach(step, exc)
            return False
        even = torch.ones(len(features), dtype=torch.bool)
        self._opened().meta_update(computed.cpu(), features, step, probes=even)
        self._told["updates"] += 1
        return True

    def metrics(self) -> dict[str, float]:
        """What a trainer logs; empty before the first step."""
        if self.scores is None:
            return {}
        shown = {
            "effective_sample_size": self.scores.effective_sample_size,
            "trust": self.scores.trust,
            "position": self.scores.position,
            **self._told,
        }
        return {f"weighbridge/{name}": float(value) for name, value in shown.items()}

    def state_dict(self, *, everywhere: bool = False) -> dict[str, Any]:
        """What a checkpoint needs: "job" (JSON values; None on all ranks but the first) and "counts" ([V], or None).

        Waits until the meta-updates so far are delivered, where the service is there to take them.

        Args:
            everywhere: for checkpoints that any rank may write: all ranks call it, and get the whole state.
        """
        job = self.ranks.from_first(self._job_state) if everywhere else self._job_state()
        return {"job": job, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the job of a checkpoint. All ranks call it; the first one's state counts.

        Raises:
            WeighbridgeError: on all ranks, as of `Job.load_state_dict`.
        """
        self._opened()
        own, job = self._own, state["job"]
        self.ranks.from_first(lambda: None if own is None or job is None else own.load_state_dict(job))
        if self.weighting.counts is None:
            self._counts = None if state["counts"] is None else torch.as_tensor(state["counts"])
            self._table = None

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        names = list(FEATURE_NAMES)
        self._client = connect(self.weighting.url, on_failure=self.weighting.on_failure, **self.weighting.connection)
        self._own = self._client.open_job(
            weighter=self.weighting.weighter,
            role=self.weighting.role,
            spec={"features": {"names": names}},
            feature_names=names,
        )

    def _job_state(self) -> dict[str, Any] | None:
        if self._own is not None:
            deliver(self._own)
            self._left = self._own.state_dict()
        return self._left

    def _opened(self) -> GroupJob:
        if self._group is None:
            raise FailedPrecondition("the steps are not open; call open() before the first one")
        return self._group

    def _unigram_nll(self, micro_batches: Sequence[TokenLosses], step: int) -> Tensor:
        """[V] of the counts, which all ranks share: features must not depend on how a batch is split."""
        counting = self.weighting.counts is None and step < self.weighting.counted_steps
        if counting or self._counts is None:
            size = micro_batches[0].vocabulary
            seen = sum(torch.bincount(_ids(part)[part.mask].cpu(), minlength=size) for part in micro_batches)
            assert isinstance(seen, Tensor)
            summed = self.ranks.all_rows(seen[None]).sum(0)
            self._counts = summed if self._counts is None else self._counts + summed
            self._table = None
        if self._table is None:
            self._table = unigram_nll_table(self._counts)
        return self._table

    def _columns(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's features [b, F], relative to all ranks' rows, and the raw rows of all [B, R]."""
        tagged = torch.cat([raw, torch.full((len(raw), 1), float(self.ranks.rank))], 1)
        everyone = self.ranks.all_rows(tagged)
        rows, owner = everyone[:, :-1], everyone[:, -1]
        return batch_columns(rows, FEATURE_NAMES)[owner == self.ranks.rank], rows

    def _nothing_to_teach(self, step: int, exc: WeighbridgeError) -> None:
        if self.weighting.on_failure == "raise":
            raise exc
        self._told["degenerate"] += 1
        if self._told["degenerate"] == 1 and self.ranks.is_first:
            logger.warning("step %d has nothing to teach the weighter with, and goes on: %s", step, exc.message)


def _raw_rows(part: TokenLosses, table: Tensor) -> Tensor:
    """[b, R] on the CPU; b may be 0 where a row holds no document."""
    if not part.losses.numel():
        return torch.zeros(len(part.losses), len(RAW_NAMES))
    losses = part.losses.detach()
    return raw_statistics(losses, table.to(losses.device)[_ids(part)], part.mask).cpu()


def _ids(part: TokenLosses) -> Tensor:
    return torch.where(part.mask, part.labels, 0).long()


def _mean_loss(part: TokenLosses) -> Tensor:
    return per_sample_loss(part.losses, part.mask).mean()
