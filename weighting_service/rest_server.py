"""REST around the use cases: JSON for people and scripts, health, metrics, OpenAPI. Thin, like the gRPC server."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import AfterValidator
from starlette.exceptions import HTTPException

from weighting_contract.errors import InvalidArgument, ResourceExhausted, Unavailable, WeighbridgeError
from weighting_service.auth import Authenticator
from weighting_service.calls import call
from weighting_service.rest_door import SLASH, Door, error_response
from weighting_service.rest_json import (
    CreateWeighterBody,
    ErrorBody,
    HeartbeatBody,
    MetaUpdateBody,
    OpenJobBody,
    PutReferenceBody,
    QuarantineJobBody,
    RollbackWeighterBody,
    ScoreBody,
    ScoreOnceBody,
    ScoreTextsBody,
    ShareWeighterBody,
    files_json,
    job_json,
    reference_json,
    scores_json,
    taught_json,
    text_scores_json,
    weighter_json,
)
from weighting_service.service import WeightingService
from weighting_service.tenancy import TenantService


async def _tenant(request: Request) -> TenantService:
    tenant: TenantService = request.state.tenant  # the door's
    return tenant


Tenant = Annotated[TenantService, Depends(_tenant)]
Name = Annotated[
    str,
    Path(description=f"another tenant's weighter or job is owner/name, written owner{SLASH}name"),
    AfterValidator(lambda name: name.replace(SLASH, "/")),
]


def build_app(service: WeightingService, *, max_body_bytes: int, auth: Authenticator) -> FastAPI:
    """The REST application over `service`; `/docs` shows it. Health and documentation need no token."""
    app = FastAPI(
        title="Weighbridge",
        description="Learned per-sample weights for language model pretraining. Every error is "
        '`{"error": {"code", "message"}}`; weights have mean 1 over their batch.',
        version="1",
        responses={"4XX": {"model": ErrorBody, "description": "the request is wrong"}, 422: {"model": ErrorBody}},
        dependencies=[Depends(HTTPBearer(auto_error=False))] if auth.enabled else [],  # for the documentation alone
    )
    _add_errors(app)
    app.add_middleware(Door, service=service, auth=auth, max_body_bytes=max_body_bytes)
    _add_weighters(app, service)
    _add_references(app, service)
    _add_jobs(app, service)
    _add_scores(app, service)
    _add_operations(app, service)
    return app


def _add_weighters(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/weighters", tags=["weighters"])
    async def create_weighter(tenant: Tenant, body: CreateWeighterBody) -> dict[str, Any]:
        with call(metrics, "CreateWeighter"):
            return weighter_json(
                await tenant.create_weighter(body.name, body.spec, body.exist_ok, body.initial, body.contents())
            )

    @app.get("/v1/weighters", tags=["weighters"])
    async def list_weighters(tenant: Tenant) -> dict[str, Any]:
        with call(metrics, "ListWeighters"):
            return {"weighters": [weighter_json(view) for view in await tenant.list_weighters()]}

    @app.get("/v1/weighters/{name}", tags=["weighters"])
    async def get_weighter(tenant: Tenant, name: Name) -> dict[str, Any]:
        with call(metrics, "GetWeighter"):
            return weighter_json(await tenant.get_weighter(name))

    @app.delete("/v1/weighters/{name}", tags=["weighters"])
    async def delete_weighter(tenant: Tenant, name: Name) -> dict[str, Any]:
        with call(metrics, "DeleteWeighter"):
            await tenant.delete_weighter(name)
            return {}

    @app.post("/v1/weighters/{name}/share", tags=["weighters"])
    async def share_weighter(tenant: Tenant, name: Name, body: ShareWeighterBody) -> dict[str, Any]:
        with call(metrics, "ShareWeighter"):
            return weighter_json(await tenant.share_weighter(name, tuple(body.tenants)))

    @app.post("/v1/weighters/{name}/rollback", tags=["weighters"])
    async def rollback_weighter(tenant: Tenant, name: Name, body: RollbackWeighterBody) -> dict[str, Any]:
        """Puts the state of an earlier snapshot back, as a new entry of the log."""
        with call(metrics, "RollbackWeighter"):
            taught = await tenant.rollback_weighter(name, body.to_position, body.expected_position)
            return {"position": taught.position, "applied_position": taught.applied_position}

    @app.get("/v1/weighters/{name}/export", tags=["weighters"])
    async def export_weighter(tenant: Tenant, name: Name) -> dict[str, Any]:
        """Files by name, base64."""
        with call(metrics, "ExportWeighter"):
            return {"files": files_json(await tenant.export_weighter(name))}


def _add_references(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.put("/v1/references/{name}", tags=["references"])
    async def put_reference(tenant: Tenant, name: Name, body: PutReferenceBody) -> dict[str, Any]:
        with call(metrics, "PutReference"):
            return reference_json(await tenant.put_reference(name, body.contents(), body.exist_ok))

    @app.get("/v1/references", tags=["references"])
    async def list_references(tenant: Tenant) -> dict[str, Any]:
        with call(metrics, "ListReferences"):
            return {"references": [reference_json(view) for view in await tenant.list_references()]}

    @app.get("/v1/references/{name}", tags=["references"])
    async def get_reference(
        tenant: Tenant, name: Name, files: Annotated[list[str] | None, Query()] = None
    ) -> dict[str, Any]:
        """`?files=tokenizer.json` sends that file along, base64."""
        with call(metrics, "GetReference"):
            return reference_json(await tenant.get_reference(name, files or ()))

    @app.delete("/v1/references/{name}", tags=["references"])
    async def delete_reference(tenant: Tenant, name: Name) -> dict[str, Any]:
        with call(metrics, "DeleteReference"):
            await tenant.delete_reference(name)
            return {}


def _add_scores(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/score", tags=["scores"])
    async def score_texts(tenant: Tenant, body: ScoreTextsBody) -> dict[str, Any]:
        """Weights for texts by a few example texts of the target; nothing needs to be made before."""
        with call(metrics, "ScoreTexts"):
            texts, target = tuple(body.texts), tuple(body.target)
            return text_scores_json(await tenant.score_texts(texts, target, body.weighter, body.reference))

    @app.post("/v1/weighters/{name}/score", tags=["scores"])
    async def score_once(tenant: Tenant, name: Name, body: ScoreOnceBody) -> dict[str, Any]:
        """Weights for a batch of texts, token ids or feature rows, without a job."""
        with call(metrics, "ScoreOnce"):
            return scores_json(await tenant.score_once(name, body.inputs.raw(), tuple(body.feature_names)))

    @app.post("/v1/jobs/{job_id}/score", tags=["scores"])
    async def score(tenant: Tenant, job_id: Name, body: ScoreBody) -> dict[str, Any]:
        with call(metrics, "Score"):
            scores = await tenant.score(
                job_id,
                body.inputs.raw(),
                min_position=body.min_position,
                min_effective_share=body.min_effective_share,
                return_statistics=body.return_statistics,
            )
            return scores_json(scores)

    @app.post("/v1/jobs/{job_id}/meta-updates", tags=["learning"])
    async def meta_update(tenant: Tenant, job_id: Name, body: MetaUpdateBody) -> dict[str, Any]:
        with call(metrics, "MetaUpdate"):
            return taught_json(await tenant.meta_update(job_id, body.request()))


def _add_jobs(app: FastAPI, service: WeightingService) -> None:
    metrics = service.metrics

    @app.post("/v1/jobs", tags=["jobs"])
    async def open_job(tenant: Tenant, body: OpenJobBody) -> dict[str, Any]:
        with call(metrics, "OpenJob"):
            return job_json(await tenant.open_job(body.request()))

    @app.post("/v1/jobs/{job_id}/close", tags=["jobs"])
    async def close_job(tenant: Tenant, job_id: Name) -> dict[str, Any]:
        with call(metrics, "CloseJob"):
            return job_json(await tenant.close_job(job_id))

    @app.post("/v1/jobs/{job_id}/heartbeat", tags=["jobs"])
    async def heartbeat(tenant: Tenant, job_id: Name, body: HeartbeatBody) -> dict[str, Any]:
        with call(metrics, "Heartbeat"):
            position, applied = await tenant.heartbeat(job_id, body.fallback_steps)
            return {"position": position, "applied_position": applied}

    @app.post("/v1/jobs/{job_id}/quarantine", tags=["jobs"])
    async def quarantine_job(tenant: Tenant, job_id: Name, body: QuarantineJobBody) -> dict[str, Any]:
        """Keeps a job from teaching, or, without a reason, lets it teach again."""
        with call(metrics, "QuarantineJob"):
            return job_json(await tenant.quarantine_job(job_id, body.reason))


def _add_operations(app: FastAPI, service: WeightingService) -> None:
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """200 while the engine's thread answers and the learning thread lives."""
        await service.check_alive()
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict[str, str]:
        """200 when every weighter, and every reference of an open job, is loaded and the service is not draining."""
        if reason := service.not_ready_because():
            raise Unavailable(reason)
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics(tenant: Tenant) -> Response:
        """Prometheus text format."""
        tenant.allow("GET /metrics")
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(WeighbridgeError)
    async def weighbridge_error(_: Request, exc: WeighbridgeError) -> JSONResponse:
        if not isinstance(exc, ResourceExhausted):
            return error_response(exc.code, exc.message, exc.http_status)
        headers = {"Retry-After": str(max(1, round(exc.retry_after_s)))}
        return error_response(exc.code, exc.message, exc.http_status, headers, retry_after_s=exc.retry_after_s)

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, exc: RequestValidationError) -> JSONResponse:
        first = exc.errors()[0]
        if first["type"] == "json_invalid":
            message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        else:
            field = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
            message = f"{field}: {first['msg']}, given: {repr(first.get('input'))[:80]}"
        return error_response(InvalidArgument.code, message, InvalidArgument.http_status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: HTTPException) -> JSONResponse:
        code = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 405: "UNIMPLEMENTED"}.get(exc.status_code, "UNKNOWN")
        return error_response(
            code, f"{request.method} {request.url.path}: {exc.detail}; /docs lists what there is", exc.status_code
        )
