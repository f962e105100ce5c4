"""REST around the use cases: JSON for people and scripts, health, metrics, OpenAPI. Thin, like the gRPC server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from weighting_contract.errors import InvalidArgument, Unavailable, WeighbridgeError
from weighting_service.calls import call
from weighting_service.rest_json import (
    CreateWeighterBody,
    ErrorBody,
    HeartbeatBody,
    MetaUpdateBody,
    OpenJobBody,
    PutReferenceBody,
    ScoreBody,
    ScoreOnceBody,
    ScoreTextsBody,
    files_json,
    job_json,
    reference_json,
    scores_json,
    taught_json,
    text_scores_json,
    weighter_json,
)
from weighting_service.service import WeightingService


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
    _add_references(app, service)
    _add_jobs(app, service)
    _add_scores(app, service)
    _add_operations(app, service)
    return app


def _add_weighters(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/weighters", tags=["weighters"])
    async def create_weighter(body: CreateWeighterBody) -> dict[str, Any]:
        with call(metrics, "CreateWeighter"):
            return weighter_json(await service.create_weighter(body.name, body.spec, body.exist_ok, body.initial))

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
            return {"files": files_json(await service.export_weighter(name))}


def _add_references(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.put("/v1/references/{name}", tags=["references"])
    async def put_reference(name: str, body: PutReferenceBody) -> dict[str, Any]:
        with call(metrics, "PutReference"):
            return reference_json(await service.put_reference(name, body.contents(), body.exist_ok))

    @app.get("/v1/references", tags=["references"])
    async def list_references() -> dict[str, Any]:
        with call(metrics, "ListReferences"):
            return {"references": [reference_json(view) for view in await service.list_references()]}

    @app.get("/v1/references/{name}", tags=["references"])
    async def get_reference(name: str, files: Annotated[list[str] | None, Query()] = None) -> dict[str, Any]:
        """`?files=tokenizer.json` sends that file along, base64."""
        with call(metrics, "GetReference"):
            return reference_json(await service.get_reference(name, files or ()))

    @app.delete("/v1/references/{name}", tags=["references"])
    async def delete_reference(name: str) -> dict[str, Any]:
        with call(metrics, "DeleteReference"):
            await service.delete_reference(name)
            return {}


def _add_scores(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/score", tags=["scores"])
    async def score_texts(body: ScoreTextsBody) -> dict[str, Any]:
        """Weights for texts by a few example texts of the target; nothing needs to be made before."""
        with call(metrics, "ScoreTexts"):
            texts, target = tuple(body.texts), tuple(body.target)
            return text_scores_json(await service.score_texts(texts, target, body.weighter, body.reference))

    @app.post("/v1/weighters/{name}/score", tags=["scores"])
    async def score_once(name: str, body: ScoreOnceBody) -> dict[str, Any]:
        """Weights for a batch of texts, token ids or feature rows, without a job."""
        with call(metrics, "ScoreOnce"):
            return scores_json(await service.score_once(name, body.inputs.raw(), tuple(body.feature_names)))

    @app.post("/v1/jobs/{job_id}/score", tags=["scores"])
    async def score(job_id: str, body: ScoreBody) -> dict[str, Any]:
        with call(metrics, "Score"):
            scores = await service.score(
                job_id,
                body.inputs.raw(),
                min_position=body.min_position,
                min_effective_share=body.min_effective_share,
                return_statistics=body.return_statistics,
            )
            return scores_json(scores)

    @app.post("/v1/jobs/{job_id}/meta-updates", tags=["learning"])
    async def meta_update(job_id: str, body: MetaUpdateBody) -> dict[str, Any]:
        with call(metrics, "MetaUpdate"):
            return taught_json(await service.meta_update(job_id, body.request()))


def _add_jobs(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/jobs", tags=["jobs"])
    async def open_job(body: OpenJobBody) -> dict[str, Any]:
        with call(metrics, "OpenJob"):
            return job_json(await service.open_job(body.request()))

    @app.post("/v1/jobs/{job_id}/close", tags=["jobs"])
    async def close_job(job_id: str) -> dict[str, Any]:
        with call(metrics, "CloseJob"):
            return job_json(await service.close_job(job_id))

    @app.post("/v1/jobs/{job_id}/heartbeat", tags=["jobs"])
    async def heartbeat(job_id: str, body: HeartbeatBody) -> dict[str, Any]:
        with call(metrics, "Heartbeat"):
            position, applied = await service.heartbeat(job_id, body.fallback_steps)
            return {"position": position, "applied_position": applied}


def _add_operations(app: FastAPI, service: WeightingService) -> None:
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """200 while the engine's thread answers."""
        await service.check_alive()
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict[str, str]:
        """200 when every weighter, and every reference of an open job, is loaded and the service is not draining."""
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
