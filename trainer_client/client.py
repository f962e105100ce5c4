"""`connect`: the way to a weighting service, and what can be asked of it besides a job's own calls."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from protos.weighting.v1 import weighting_pb2 as pb
from trainer_client import wire
from trainer_client.breaker import CircuitBreaker
from trainer_client.counters import logger
from trainer_client.credentials import StrPath
from trainer_client.job import Job, OnFailure
from trainer_client.link import JobLink, OlderService
from trainer_client.settings import Limits, Timeouts
from trainer_client.transports import Transport, is_embedded, open_transport
from weighting_contract.errors import Internal, InvalidArgument, WeighbridgeError
from weighting_contract.export import PRETAUGHT, export_files, write_export
from weighting_contract.spec import WeighterSpec

if TYPE_CHECKING:  # needs torch
    from weighting_contract.ngrams import Row
    from weighting_contract.profile import Profile


def connect(
    url: str = "grpc://localhost:50051",
    *,
    token: StrPath | None = None,
    ca: StrPath | None = None,
    cert: StrPath | None = None,
    key: StrPath | None = None,
    insecure_token: bool = False,
    timeouts: Timeouts | None = None,
    limits: Limits | None = None,
    on_failure: OnFailure = "uniform",
    on_older_service: OlderService = "resend",
) -> Client:
    """A client of the service at `url`. Contacts nothing yet, so it neither waits nor fails because that is away.

    Args:
        url: grpc(s)://host:port[,host:port...], http(s)://host:port, embedded:///path/to/state, or embedded (a service
            in this process whose weighters end with it).
        token: of the service's tokens, or the path (`Path`) of a file that holds it and is read again when it changes;
            None: the environment variable WEIGHBRIDGE_TOKEN, "": none.
        ca: PEM file of the CA that the service's certificate must be of; None: WEIGHBRIDGE_CA, "": the well-known ones.
        cert, key: PEM files of the client's own certificate and its key, for services that ask for one (mTLS); None:
            WEIGHBRIDGE_CERT and WEIGHBRIDGE_KEY, "": none.
        insecure_token: send the token unencrypted to another machine, where the network is trusted.
        timeouts: None: `Timeouts()`, or `Timeouts.embedded()` for an embedded service.
        limits: None: `Limits()`.
        on_failure: of jobs: "uniform" trains on with uniform weights, "raise" raises, for debugging.
        on_older_service: of jobs, where the weighter has lost updates that it had acknowledged, because the service was
            restored from an older state or the weighter made anew. "resend": the newest of them, which the job keeps
            (`Limits.kept_updates`), are sent again, in order and before any later one; as update ids make each of them
            count once, that is safe, and so the default. "continue": teaching goes on from there. "stop": the job
            scores uniformly and teaches nothing any more (`Job.failure` says why); `Job.load_state_dict` raises that.

    Raises:
        InvalidArgument: a malformed url, an unknown on_failure or on_older_service, an embedded service that is not
            installed, files of credentials that can't be used, or a token that would travel unencrypted.
        WeighbridgeError: the state of an embedded service can't be opened, or is in use by another one.
    """
    if on_failure not in ("uniform", "raise"):
        raise InvalidArgument(f"on_failure is {on_failure!r}, expected 'uniform' or 'raise'")
    if on_older_service not in get_args(OlderService):
        raise InvalidArgument(f"on_older_service is {on_older_service!r}, expected 'resend', 'continue' or 'stop'")
    if timeouts is None:
        timeouts = Timeouts.embedded() if is_embedded(url) else Timeouts()
    transport = open_transport(url, token=token, ca=ca, cert=cert, key=key, insecure_token=insecure_token)
    return Client(
        transport,
        timeouts=timeouts,
        limits=limits or Limits(),
        on_failure=on_failure,
        on_older_service=on_older_service,
    )


class Client:
    """Made by `connect`. Its own methods raise WeighbridgeError; those of its jobs obey `on_failure`."""

    def __init__(
        self,
        transport: Transport,
        *,
        timeouts: Timeouts,
        limits: Limits,
        on_failure: OnFailure,
        on_older_service: OlderService = "resend",
    ) -> None:
        self._transport = transport
        self._timeouts = timeouts
        self._limits = limits
        self._on_failure: OnFailure = on_failure
        self._on_older_service: OlderService = on_older_service
        self._breaker = CircuitBreaker(limits.breaker_period_s, limits.breaker_max_period_s)
        self._jobs_lock = threading.Lock()
        self._jobs: list[Job] = []

    def create_weighter(
        self,
        name: str,
        spec: WeighterSpec | dict[str, Any] | None = None,
        exist_ok: bool = True,
        initial: StrPath = "",
    ) -> pb.Weighter:
        """A weighter of this name and spec, made where it is missing.

        Args:
            spec: what it reads and how it is built; None: that of `initial`. A dict that says nothing of inputs changes
                single values of that, such as {"learning": {"learning_rate": 1e-4}}.
            initial: "pretaught" starts from the weighter that comes with the service, "" from fresh parameters; any
                other text or path is the folder of an exported weighter, whose parameters it starts from.

        Raises:
            AlreadyExists: the name belongs to a weighter of another spec or beginning.
            InvalidArgument: a folder that holds no whole export, before anything is sent; or a spec that its parameters
                don't fit.
        """
        weighter: pb.Weighter = self._call("CreateWeighter", _creation(name, spec, exist_ok, initial))
        return weighter

    def get_weighter(self, name: str) -> pb.Weighter:
        """Spec, position and learning statistics. NotFound where there is none."""
        weighter: pb.Weighter = self._call("GetWeighter", pb.GetWeighterRequest(name=name))
        return weighter

    def list_weighters(self) -> list[pb.Weighter]:
        return list(self._call("ListWeighters", pb.ListWeightersRequest()).weighters)

    def delete_weighter(self, name: str) -> None:
        """Deletes it with all that it learned."""
        self._call("DeleteWeighter", pb.DeleteWeighterRequest(name=name))

    def share_weighter(self, name: str, tenants: Sequence[str]) -> pb.Weighter:
        """Says which tenants may use it beside its own: "*" stands for all, none for its own alone."""
        if isinstance(tenants, str):
            raise InvalidArgument(f"tenants is the string {tenants!r}, expected a list of names")
        weighter: pb.Weighter = self._call("ShareWeighter", pb.ShareWeighterRequest(name=name, tenants=list(tenants)))
        return weighter

    def rollback_weighter(
        self, name: str, to_position: int, expected_position: int | None = None
    ) -> pb.RollbackWeighterResponse:
        """Puts the state of an earlier snapshot back, as a new entry of the log.

        Args:
            to_position: one of the `snapshot_positions` of `get_weighter`.
            expected_position: of the log's end. FailedPrecondition where it is another one by now; None: wherever.
        """
        request = pb.RollbackWeighterRequest(name=name, to_position=to_position, expected_position=expected_position)
        response: pb.RollbackWeighterResponse = self._call("RollbackWeighter", request)
        return response

    def export_weighter(self, name: str, folder: str | Path) -> Path:
        """Writes the weighter at its applied position into `folder`, made where it is missing; returns the folder.

        `create_weighter` and `open_job` take it as `initial`, `Weighter.from_pretrained` loads it. An export that is
        there is replaced as a whole, other files are left alone.

        Raises:
            Internal: what the service sent is no whole export; nothing was written.
        """
        files: dict[str, bytes] = dict(self._call("ExportWeighter", pb.ExportWeighterRequest(name=name)).files)
        try:
            return write_export(folder, files)
        except InvalidArgument as exc:
            raise Internal(f"the service sent no whole export of {name!r}: {exc.message}") from exc

    def watch_weighter(self, name: str) -> Iterator[pb.Weighter]:
        """The weighter now, and again whenever its applied position moves; blocks in between, without end."""
        return self._transport.watch(name)

    # ---- References -------------------------------------------------------------------------------------------------

    def put_reference(
        self, name: str, files: str | os.PathLike[str] | Mapping[str, bytes], exist_ok: bool = True
    ) -> pb.Reference:
        """Gives the service a reference to host under `name`.

        Args:
            files: the folder of `python -m trainer_client.reference`, or its files by name.
            exist_ok: the same reference may be there already.

        Raises:
            InvalidArgument: files that are no whole reference, before anything is sent.
            AlreadyExists: another reference has the name, or, without `exist_ok`, this one.
        """
        from weighting_contract.reference import check_reference, reference_files  # needs safetensors

        if not isinstance(files, Mapping):
            files = reference_files(files)
        check_reference(files, "the reference")
        request = pb.PutReferenceRequest(name=name, files=dict(files), exist_ok=exist_ok)
        reference: pb.Reference = self._call("PutReference", request)
        return reference

    def get_reference(self, name: str, files: Sequence[str] = ()) -> pb.Reference:
        """What the service knows of a reference, and the files that are named, such as tokenizer.json. NotFound.

        A counted reference has no config.json and no model.safetensors: they are left out.
        """
        if isinstance(files, str):
            raise InvalidArgument(f"files is the string {files!r}, expected a list of names")
        reference: pb.Reference = self._call("GetReference", pb.GetReferenceRequest(name=name, files=list(files)))
        return reference

    def list_references(self) -> list[pb.Reference]:
        return list(self._call("ListReferences", pb.ListReferencesRequest()).references)

    def delete_reference(self, name: str) -> None:
        """Deletes an uploaded reference. FailedPrecondition while open jobs use it."""
        self._call("DeleteReference", pb.DeleteReferenceRequest(name=name))

    # ---- Jobs -------------------------------------------------------------------------------------------------------

    def open_job(
        self,
        job_id: str | None = None,
        *,
        weighter: str = "default",
        role: Literal["learn", "frozen"] = "learn",
        spec: WeighterSpec | dict[str, Any] | None = None,
        initial: StrPath = "",
        feature_names: Sequence[str] | None = None,
        read_your_writes: bool = True,
        reference: str = "",
        reference_checksum: str = "",
        reference_files: Mapping[str, bytes] | None = None,
        tokenizer_checksum: str = "",
        profile: Profile | Sequence[Row] | None = None,
    ) -> Job:
        """A job attached to a weighter, or, where that fails now, one that scores uniformly and attaches later.

        Args:
            job_id: of an earlier run that goes on; None: a new one, chosen here.
            weighter: its name.
            role: "learn" scores and teaches, "frozen" scores only.
            spec, initial: as of `create_weighter`, make the weighter where it is missing; neither: it must be there.
            feature_names: the columns that the job sends, in its order; None: those of the weighter's spec.
            read_your_writes: each score waits for the job's own updates before it, which makes a run reproducible.
            reference: the service's model that turns the job's tokens into the statistics that the weighter reads; "":
                the job sends what the weighter reads itself.
            reference_checksum: of the reference that is expected; "": whichever has the name.
            reference_files: give the service the reference where it is missing, whenever the job is attached; None: it
                must be there.
            tokenizer_checksum: SHA-256, in hex, of the tokenizer.json that the job's samples are of; weighters whose
                spec names one take no other. "": not known.
            profile: the target's, for weighters that read statistics against it (`trainer_client.profile` makes one),
                or the token ids of the target's documents, one row each; the service keeps it with the job.

        Raises:
            InvalidArgument: arguments that can't be right whatever the service says.
            WeighbridgeError: with `on_failure="raise"`, where the job can't be attached; else see `Job.failure`.
        """
        if role not in wire.ROLES:
            raise InvalidArgument(f"role is {role!r}, expected one of {', '.join(wire.ROLES)}")
        if isinstance(feature_names, str):
            raise InvalidArgument(f"feature_names is the string {feature_names!r}, expected a list of names")
        opening = pb.OpenJobRequest(
            weighter=weighter,
            job_id=job_id or uuid.uuid4().hex,
            role=wire.ROLES[role],
            feature_names=list(feature_names or ()),
            reference=wire.reference_message(reference, reference_checksum, tokenizer_checksum),
        )
        if profile is not None:
            if not reference:
                raise InvalidArgument("profile is given without a reference; name the one that it was made against")
            opening.profile.CopyFrom(wire.profile_message(profile))
        creation = _creation(weighter, spec, True, initial) if spec is not None or initial else None
        upload = None
        if reference_files is not None:
            upload = pb.PutReferenceRequest(name=reference, files=dict(reference_files), exist_ok=True)
        link = JobLink(self._transport, self._breaker, opening, creation, upload, self._on_older_service)
        try:
            link.attach(self._timeouts.admin_s, trial=True)  # no job's thread may be there to make one
        except WeighbridgeError as exc:
            if self._on_failure == "raise":
                raise
            logger.warning(
                "job %s is not attached to weighter %r, uniform weights until it is: %s",
                link.job_id,
                weighter,
                exc.message,
            )
        job = Job(
            link,
            timeouts=self._timeouts,
            limits=replace(self._limits, kept_updates=0) if self._on_older_service != "resend" else self._limits,
            on_failure=self._on_failure,
            read_your_writes=read_your_writes,
        )
        with self._jobs_lock:
            self._jobs = [j for j in self._jobs if not j.closed] + [job]
        return job

    def quarantine_job(self, job_id: str, reason: str) -> pb.Job:
        """Keeps a job from teaching, for a reason that it is told; an empty reason lets it teach again."""
        job: pb.Job = self._call("QuarantineJob", pb.QuarantineJobRequest(job_id=job_id, reason=reason))
        return job

    def close(self) -> None:
        """Closes the jobs that are still open, then the transport; idempotent."""
        with self._jobs_lock:
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, request: Any) -> Any:
        return self._transport.call(method, request, self._timeouts.admin_s)


def _creation(
    name: str, spec: WeighterSpec | dict[str, Any] | None, exist_ok: bool, initial: StrPath
) -> pb.CreateWeighterRequest:
    initial = os.fspath(initial)
    if spec is None and not initial:
        raise InvalidArgument("neither spec nor initial is given: say what the weighter reads, or initial='pretaught'")
    request = pb.CreateWeighterRequest(name=name, exist_ok=exist_ok)
    if initial and isinstance(spec, dict) and not ("features" in spec or "tokens" in spec):
        request.spec.CopyFrom(wire.spec_changes(spec))
    elif spec is not None:
        request.spec.CopyFrom(wire.spec_message(spec))
    if initial in ("", PRETAUGHT):
        request.initial = initial
    else:
        request.files.update(export_files(initial))
    return request
