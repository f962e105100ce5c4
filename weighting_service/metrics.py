"""Prometheus metrics of one service; names are stable and documented in docs/operations.md."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weighting_service.engine import PassReport

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """One registry a service, so that several can live in one process (tests, embedded use)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("weighbridge_requests", "Calls answered", ["method", "code", "job_class"], registry=r)
        self.request_seconds = Histogram(
            "weighbridge_request_seconds", "Time from call to answer", ["method"], buckets=SECONDS, registry=r
        )
        self.queued_calls = Gauge("weighbridge_queued_calls", "Score calls waiting for the device", registry=r)
        self.queue_wait = Histogram(
            "weighbridge_queue_wait_seconds", "Longest wait of a pass's calls", buckets=SECONDS, registry=r
        )
        self.pass_calls = Histogram("weighbridge_pass_calls", "Calls a forward pass", buckets=SIZES, registry=r)
        self.pass_samples = Histogram("weighbridge_pass_samples", "Samples a forward pass", buckets=SIZES, registry=r)
        self.device_seconds = Counter("weighbridge_device_seconds", "Time spent in forward passes", registry=r)
        per_reference = [
            Counter(f"weighbridge_reference_{name}", words, ["reference"], registry=r)
            for name, words in (
                ("seconds", "Share of the device's time that references took"),
                ("samples", "Samples scored by references"),
                ("known_samples", "Of these, samples that nothing had to be computed for"),
                ("cut_samples", "Samples that were longer than the reference takes"),
                ("tokens", "Tokens computed by references"),
                ("padded_tokens", "Tokens that this took with padding"),
            )
        ]
        (
            self.reference_seconds,
            self.reference_samples,
            self.reference_known_samples,
            self.reference_cut_samples,
            self.reference_tokens,
            self.reference_padded_tokens,
        ) = self._per_reference = per_reference
        self.position = Gauge("weighbridge_position", "Last position in the log", ["weighter"], registry=r)
        self.applied = Gauge("weighbridge_applied_position", "Position that Score uses", ["weighter"], registry=r)
        self.updates = Counter("weighbridge_updates", "Meta-updates taken", ["weighter"], registry=r)
        self.duplicates = Counter("weighbridge_updates_duplicate", "Retries recognised", ["weighter"], registry=r)
        self.refused = Counter(
            "weighbridge_updates_refused", "Meta-updates refused", ["weighter", "code", "reason"], registry=r
        )
        self.weighters = Gauge("weighbridge_weighters", "Weighters hosted", registry=r)
        self.weighters_failed = Gauge(
            "weighbridge_weighters_failed", "Weighters whose state can't be vouched for", registry=r
        )
        self.references = Gauge("weighbridge_references", "References offered", registry=r)
        self.references_failed = Gauge(
            "weighbridge_references_failed", "References on disk that are damaged", registry=r
        )
        self.jobs_open = Gauge("weighbridge_jobs_open", "Jobs open", registry=r)
        self.jobs_expired = Counter("weighbridge_jobs_expired", "Jobs closed as nobody heard of them", registry=r)
        self.log_bytes = Gauge("weighbridge_log_bytes", "Size of the update log", registry=r)
        self.snapshot_bytes = Gauge("weighbridge_snapshot_bytes", "Size of all snapshots", registry=r)
        self.log_reachable = Gauge("weighbridge_log_reachable", "1 where the log answered the last call", registry=r)
        self.disk_free_bytes = Gauge("weighbridge_disk_free_bytes", "Free space of the disk of --state", registry=r)
        self.job_trust = Gauge(
            "weighbridge_job_trust", "Factor on the logits of an open job", ["weighter", "job"], registry=r
        )
        self.fallback_steps = Gauge(
            "weighbridge_client_fallback_steps", "Steps trained with uniform weights, by open jobs' reports", registry=r
        )

    def observe_queue(self, depth: Callable[[], float]) -> None:
        self.queued_calls.set_function(depth)

    def observe_pass(self, report: PassReport) -> None:
        self.queue_wait.observe(report.longest_wait_s)
        self.pass_calls.observe(report.calls)
        self.pass_samples.observe(report.samples)
        self.device_seconds.inc(report.device_s)
        if report.packing:
            self.reference_seconds.labels(report.reference).inc(report.reference_s)
            self.reference_samples.labels(report.reference).inc(report.packing.samples)
            self.reference_known_samples.labels(report.reference).inc(report.packing.known_samples)
            self.reference_cut_samples.labels(report.reference).inc(report.packing.cut_samples)
            self.reference_tokens.labels(report.reference).inc(report.packing.real_tokens)
            self.reference_padded_tokens.labels(report.reference).inc(report.packing.padded_tokens)

    def forget_weighter(self, weighter: str) -> None:
        """Drops a deleted weighter's series."""
        for metric in (self.position, self.applied, self.updates, self.duplicates, self.refused, self.job_trust):
            _drop(metric, weighter)

    def forget_job(self, weighter: str, job: str) -> None:
        """Drops a closed job's series."""
        _drop(self.job_trust, weighter, job)

    def forget_reference(self, reference: str) -> None:
        """Drops a deleted reference's series."""
        for metric in self._per_reference:
            _drop(metric, reference)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


def _drop(metric: Counter | Gauge, *labels: str) -> None:
    """Removes the series whose first labels are these; a copy is searched, as other threads add series meanwhile."""
    for values in [v for v in list(metric._metrics) if v[: len(labels)] == labels]:
        metric.remove(*values)
