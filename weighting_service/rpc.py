"""The RPCs as functions from message to message over the use cases; gRPC server and embedded service share them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_service import wire
from weighting_service.service import WeightingService
from weighting_service.tenancy import TenantService

Service = WeightingService | TenantService


async def create_weighter(service: Service, request: pb.CreateWeighterRequest) -> pb.Weighter:
    spec = wire.spec_values(request.spec)
    view = await service.create_weighter(request.name, spec, request.exist_ok, request.initial, dict(request.files))
    return wire.weighter_to_message(view)


async def get_weighter(service: Service, request: pb.GetWeighterRequest) -> pb.Weighter:
    return wire.weighter_to_message(await service.get_weighter(request.name))


async def list_weighters(service: Service, request: pb.ListWeightersRequest) -> pb.ListWeightersResponse:
    views = await service.list_weighters()
    return pb.ListWeightersResponse(weighters=[wire.weighter_to_message(view) for view in views])


async def delete_weighter(service: Service, request: pb.DeleteWeighterRequest) -> pb.DeleteWeighterResponse:
    await service.delete_weighter(request.name)
    return pb.DeleteWeighterResponse()


async def share_weighter(service: Service, request: pb.ShareWeighterRequest) -> pb.Weighter:
    return wire.weighter_to_message(await service.share_weighter(request.name, tuple(request.tenants)))


async def rollback_weighter(service: Service, request: pb.RollbackWeighterRequest) -> pb.RollbackWeighterResponse:
    expected = request.expected_position if request.HasField("expected_position") else None
    taught = await service.rollback_weighter(request.name, request.to_position, expected)
    return pb.RollbackWeighterResponse(position=taught.position, applied_position=taught.applied_position)


async def export_weighter(service: Service, request: pb.ExportWeighterRequest) -> pb.ExportWeighterResponse:
    return pb.ExportWeighterResponse(files=await service.export_weighter(request.name))


async def watch_weighter(service: Service, request: pb.WatchWeighterRequest) -> AsyncIterator[pb.Weighter]:
    async for view in service.watch_weighter(request.name):
        yield wire.weighter_to_message(view)


async def put_reference(service: Service, request: pb.PutReferenceRequest) -> pb.Reference:
    return wire.reference_to_message(await service.put_reference(request.name, dict(request.files), request.exist_ok))


async def get_reference(service: Service, request: pb.GetReferenceRequest) -> pb.Reference:
    return wire.reference_to_message(await service.get_reference(request.name, request.files))


async def list_references(service: Service, request: pb.ListReferencesRequest) -> pb.ListReferencesResponse:
    views = await service.list_references()
    return pb.ListReferencesResponse(references=[wire.reference_to_message(view) for view in views])


async def delete_reference(service: Service, request: pb.DeleteReferenceRequest) -> pb.DeleteReferenceResponse:
    await service.delete_reference(request.name)
    return pb.DeleteReferenceResponse()


async def open_job(service: Service, request: pb.OpenJobRequest) -> pb.Job:
    return wire.job_to_message(await service.open_job(wire.job_request_from_message(request)))


async def close_job(service: Service, request: pb.CloseJobRequest) -> pb.Job:
    return wire.job_to_message(await service.close_job(request.job_id))


async def heartbeat(service: Service, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
    position, applied = await service.heartbeat(request.job_id, request.fallback_steps)
    return pb.HeartbeatResponse(position=position, applied_position=applied)


async def quarantine_job(service: Service, request: pb.QuarantineJobRequest) -> pb.Job:
    return wire.job_to_message(await service.quarantine_job(request.job_id, request.reason))


async def score(service: Service, request: pb.ScoreRequest) -> pb.ScoreResponse:
    scores = await service.score(
        request.job_id,
        wire.inputs_from_message(request.inputs),
        min_position=request.min_position,
        min_effective_share=request.min_effective_share if request.HasField("min_effective_share") else None,
        return_statistics=request.return_statistics,
    )
    return wire.scores_to_message(scores)


async def meta_update(service: Service, request: pb.MetaUpdateRequest) -> pb.MetaUpdateResponse:
    taught = await service.meta_update(request.job_id, wire.meta_update_from_message(request))
    return pb.MetaUpdateResponse(
        position=taught.position, duplicate=taught.duplicate, applied_position=taught.applied_position
    )


Unary = Callable[[Service, Any], Awaitable[Any]]

UNARY: dict[str, Unary] = {
    "CreateWeighter": create_weighter,
    "GetWeighter": get_weighter,
    "ListWeighters": list_weighters,
    "DeleteWeighter": delete_weighter,
    "ShareWeighter": share_weighter,
    "RollbackWeighter": rollback_weighter,
    "ExportWeighter": export_weighter,
    "PutReference": put_reference,
    "GetReference": get_reference,
    "ListReferences": list_references,
    "DeleteReference": delete_reference,
    "OpenJob": open_job,
    "CloseJob": close_job,
    "Heartbeat": heartbeat,
    "QuarantineJob": quarantine_job,
    "Score": score,
    "MetaUpdate": meta_update,
}
