"""REST around the use cases: JSON for people and scripts, health, metrics, OpenAPI. Thin, like the gRPC server."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from weighting_contract.errors import InvalidArgument, Unavailable, WeighbridgeError
from weighting_contract.spec import WeighterSpec
from weighting_service.calls import call
from weighting_service.domain import Estimator, LearningStatistics, RawInputs, Role, Scores
from weighting_service.service import JobView, WeighterView, WeightingService

INT64 = 2**63 - 1

Rows = Annotated[list[list[float]], Field(description="one row a sample")]


class Body(BaseModel):
    """Base of the request bodies: unknown fields are errors, not silence."""

    model_config = ConfigDict(extra="forbid")


class InputsBody(Body):
    """The samples of one batch; give what the weighter's spec reads."""

    features: Rows | None = Field(None, description="[B, F] columns in the order of feature_names or of the spec")
    hidden: Rows | None = Field(None, description="[B, H] pooled hidden states")
    tokens: list[list[int]] | None = Field(None, description="B lists of token ids, of any lengths")
    texts: list[str] | None = Field(None, description="B texts, for weighters with a tokenizer")

    def raw(self) -> RawInputs:
        tokens, lengths = _pad(self.tokens)
        texts = None if self.texts is None else tuple(self.texts)
        return RawInputs(_floats(self.features, "features"), _floats(self.hidden, "hidden"), tokens, lengths, texts)


class ErrorDetail(BaseModel):
    code: str = Field(examples=["INVALID_ARGUMENT"])
    message: str
    retry_after_s: float | None = None


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorDetail


class CreateWeighterBody(Body):
    name: str = Field(examples=["default"])
    spec: dict[str, Any] = Field(examples=[{"features": {"names": ["loss", "length"]}}])
    exist_ok: bool = False


class OpenJobBody(Body):
    weighter: str
    job_id: str = Field("", description="empty: the service chooses; a known id resumes that job")
    role: Role = Role.LEARN
    feature_names: list[str] = Field([], description="the job's columns in its order; empty: those of the spec")


class HeartbeatBody(Body):
    fallback_steps: int = Field(0, ge=0, le=INT64)


class ScoreBody(Body):
    inputs: InputsBody
    step: int = Field(0, ge=0, le=INT64)
    min_position: int = Field(0, ge=0, le=INT64, description="wait until this position is applied")


class ScoreOnceBody(Body):
    inputs: InputsBody
    feature_names: list[str] = Field([], description="names of the feature columns in the order sent")


class MetaUpdateBody(Body):
    inputs: InputsBody
    cotangent: list[float] = Field(description="[B] dL_val/dw")
    step: int = Field(ge=0, le=INT64)
    update_id: str = Field("", description="idempotency key within the job; empty: the step")
    scored_position: int = Field(0, ge=0, le=INT64, description="position that the step's weights were scored at")
    estimator: Estimator = Estimator.VJP


def build_app(service: WeightingService, *, max_body_bytes: int) -> FastAPI:
    """The REST application over `service`; `/docs` shows it."""
    app = FastAPI(
        title="Weighbridge",
        description="Learned per-sample weights for language model pretraining. Every error is "
        '`{"error": {"code", "message"}}`; weights have mean 1 over their batch.',
        version="1",
        responses={"4XX": {"model": ErrorBody, "description": "the request is wrong"}, 422: {"model": ErrorBody}},
    )
    _add_errors(app)
    _add_body_limit(app, max_body_bytes)
    _add_weighters(app, service)
    _add_jobs(app, service)
    _add_operations(app, service)
    return app


def _add_weighters(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/weighters", tags=["weighters"])
    async def create_weighter(body: CreateWeighterBody) -> dict[str, Any]:
        with call(metrics, "CreateWeighter"):
            spec = WeighterSpec.from_dict(body.spec)
            return weighter_json(await service.create_weighter(body.name, spec, body.exist_ok))

    @app.get("/v1/weighters", tags=["weighters"])
    async def list_weighters() -> dict[str, Any]:
        with call(metrics, "ListWeighters"):
            return {"weighters": [weighter_json(view) for view in await service.list_weighters()]}

    @app.get("/v1/weighters/{name}", tags=["weighters"])
    async def get_weighter(name: str) -> dict[str, Any]:
        with call(metrics, "GetWeighter"):
            return weighter_json(await service.get_weighter(name))

    @app.delete("/v1/weighters/{name}", tags=["weighters"])
    async def delete_weighter(name: str) -> dict[str, Any]:
        with call(metrics, "DeleteWeighter"):
            await service.delete_weighter(name)
            return {}

    @app.get("/v1/weighters/{name}/export", tags=["weighters"])
    async def export_weighter(name: str) -> dict[str, Any]:
        """Files by name, base64."""
        with call(metrics, "ExportWeighter"):
            files = await service.export_weighter(name)
            return {"files": {file: base64.b64encode(data).decode() for file, data in files.items()}}

    @app.post("/v1/weighters/{name}/score", tags=["scores"])
    async def score_once(name: str, body: ScoreOnceBody) -> dict[str, Any]:
        """Weights for a batch of texts, token ids or feature rows, without a job."""
        with call(metrics, "ScoreOnce"):
            return scores_json(await service.score_once(name, body.inputs.raw(), tuple(body.feature_names)))


def _add_jobs(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/jobs", tags=["jobs"])
    async def open_job(body: OpenJobBody) -> dict[str, Any]:
        with call(metrics, "OpenJob"):
            names = tuple(body.feature_names)
            return job_json(await service.open_job(body.weighter, body.job_id, body.role, names))

    @app.post("/v1/jobs/{job_id}/close", tags=["jobs"])
    async def close_job(job_id: str) -> dict[str, Any]:
        with call(metrics, "CloseJob"):
            return job_json(await service.close_job(job_id))

    @app.post("/v1/jobs/{job_id}/heartbeat", tags=["jobs"])
    async def heartbeat(job_id: str, body: HeartbeatBody) -> dict[str, Any]:
        with call(metrics, "Heartbeat"):
            position, applied = await service.heartbeat(job_id, body.fallback_steps)
            return {"position": position, "applied_position": applied}

    @app.post("/v1/jobs/{job_id}/score", tags=["scores"])
    async def score(job_id: str, body: ScoreBody) -> dict[str, Any]:
        with call(metrics, "Score"):
            return scores_json(await service.score(job_id, body.inputs.raw(), body.min_position))

    @app.post("/v1/jobs/{job_id}/meta-updates", tags=["learning"])
    async def meta_update(job_id: str, body: MetaUpdateBody) -> dict[str, Any]:
        with call(metrics, "MetaUpdate"):
            taught = await service.meta_update(
                job_id,
                body.step,
                body.inputs.raw(),
                np.array(body.cotangent, np.float64),
                update_id=body.update_id,
                scored_position=body.scored_position,
                estimator=body.estimator,
            )
            return {
                "position": taught.position,
                "duplicate": taught.duplicate,
                "applied_position": taught.applied_position,
            }


def _add_operations(app: FastAPI, service: WeightingService) -> None:
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """200 while the engine's thread answers."""
        await service.check_alive()
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict[str, str]:
        """200 when every weighter is loaded and warm, and the service is not draining."""
        if reason := service.not_ready_because():
            raise Unavailable(reason)
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(WeighbridgeError)
    async def weighbridge_error(_: Request, exc: WeighbridgeError) -> JSONResponse:
        return _error(exc.code, exc.message, exc.http_status, getattr(exc, "retry_after_s", None))

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, exc: RequestValidationError) -> JSONResponse:
        first = exc.errors()[0]
        if first["type"] == "json_invalid":
            message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        else:
            field = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
            message = f"{field}: {first['msg']}, given: {repr(first.get('input'))[:80]}"
        return _error(InvalidArgument.code, message, InvalidArgument.http_status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: HTTPException) -> JSONResponse:
        code = {404: "NOT_FOUND", 405: "UNIMPLEMENTED"}.get(exc.status_code, "UNKNOWN")
        return _error(
            code, f"{request.method} {request.url.path}: {exc.detail}; /docs lists what there is", exc.status_code
        )


def _error(code: str, message: str, status: int, retry_after_s: float | None = None) -> JSONResponse:
    body: dict[str, Any] = {"code": code, "message": message}
    headers = {}
    if retry_after_s is not None:
        body["retry_after_s"] = retry_after_s
        headers["Retry-After"] = str(max(1, round(retry_after_s)))
    return JSONResponse({"error": body}, status, headers)


def _add_body_limit(app: FastAPI, max_body_bytes: int) -> None:
    @app.middleware("http")
    async def body_limit(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers:
            return _error(InvalidArgument.code, "a body needs a Content-Length header, not a Transfer-Encoding", 411)
        if length.isdigit() and int(length) > max_body_bytes:
            message = f"the body has {length} bytes, this service takes at most {max_body_bytes} (--max-message-mb)"
            return _error(InvalidArgument.code, message, 413)
        return await call_next(request)


def _floats(rows: list[list[float]] | None, field: str) -> np.ndarray | None:
    """[B, F] float64; what does not fit into float32 is found out where all inputs are checked."""
    if rows is None:
        return None
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise InvalidArgument(f"{field}[{i}] has {len(row)} columns, but {field}[0] has {len(rows[0])}")
    return np.array(rows, np.float64).reshape(len(rows), len(rows[0]) if rows else 0)


def _pad(rows: list[list[int]] | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Rows of any lengths as [B, T] and [B]."""
    if rows is None:
        return None, None
    for i, row in enumerate(rows):
        if not row:
            raise InvalidArgument(f"tokens[{i}] has no tokens, expected at least one")
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), max([1, *lengths])), np.int64)
    for i, row in enumerate(rows):
        try:
            tokens[i, : len(row)] = row
        except OverflowError as exc:
            raise InvalidArgument(f"tokens[{i}] holds an id that is no 64-bit integer") from exc
    return tokens, lengths


def scores_json(scores: Scores) -> dict[str, Any]:
    return {
        "weights": scores.weights.tolist(),
        "logits": scores.logits.tolist(),
        "position": scores.position,
        "effective_sample_size": scores.effective_sample_size,
    }


def weighter_json(view: WeighterView) -> dict[str, Any]:
    return {
        "name": view.record.name,
        "spec": view.record.spec.to_dict(),
        "position": view.position,
        "applied_position": view.applied_position,
        "parameters": view.parameters,
        "jobs_open": view.jobs_open,
        "learning": _learning_json(view.learning) | {"duplicates": view.duplicates, "refused": view.refused},
        "created_unix_ms": view.record.created_unix_ms,
    }


def _learning_json(learning: LearningStatistics) -> dict[str, Any]:
    values = dict(vars(learning))
    return values | {"jobs": {job_id: dict(vars(job)) for job_id, job in learning.jobs.items()}}


def job_json(view: JobView) -> dict[str, Any]:
    return {
        "job_id": view.record.job_id,
        "weighter": view.weighter,
        "role": view.record.role.value,
        "open": view.record.open,
        "resumed": view.resumed,
        "position": view.position,
        "last_step": view.last_step,
        "last_position": view.last_position,
        "spec": view.spec.to_dict(),
    }
