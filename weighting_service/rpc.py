"""The RPCs as functions from message to message over the use cases; gRPC server and embedded service share them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from protos.weighting.v1 import weighting_pb2 as pb
from weighting_contract.errors import InvalidArgument
from weighting_contract.tensors import from_message
from weighting_service import wire
from weighting_service.service import WeightingService


async def create_weighter(service: WeightingService, request: pb.CreateWeighterRequest) -> pb.Weighter:
    spec = wire.spec_from_message(request.spec)
    return wire.weighter_to_message(await service.create_weighter(request.name, spec, request.exist_ok))


async def get_weighter(service: WeightingService, request: pb.GetWeighterRequest) -> pb.Weighter:
    return wire.weighter_to_message(await service.get_weighter(request.name))


async def list_weighters(service: WeightingService, request: pb.ListWeightersRequest) -> pb.ListWeightersResponse:
    views = await service.list_weighters()
    return pb.ListWeightersResponse(weighters=[wire.weighter_to_message(view) for view in views])


async def delete_weighter(service: WeightingService, request: pb.DeleteWeighterRequest) -> pb.DeleteWeighterResponse:
    await service.delete_weighter(request.name)
    return pb.DeleteWeighterResponse()


async def export_weighter(service: WeightingService, request: pb.ExportWeighterRequest) -> pb.ExportWeighterResponse:
    return pb.ExportWeighterResponse(files=await service.export_weighter(request.name))


async def watch_weighter(service: WeightingService, request: pb.WatchWeighterRequest) -> AsyncIterator[pb.Weighter]:
    async for view in service.watch_weighter(request.name):
        yield wire.weighter_to_message(view)


async def open_job(service: WeightingService, request: pb.OpenJobRequest) -> pb.Job:
    role = wire.role_from_message(request.role)
    view = await service.open_job(request.weighter, request.job_id, role, tuple(request.feature_names))
    return wire.job_to_message(view)


async def close_job(service: WeightingService, request: pb.CloseJobRequest) -> pb.Job:
    return wire.job_to_message(await service.close_job(request.job_id))


async def heartbeat(service: WeightingService, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
    position, applied = await service.heartbeat(request.job_id, request.fallback_steps)
    return pb.HeartbeatResponse(position=position, applied_position=applied)


async def score(service: WeightingService, request: pb.ScoreRequest) -> pb.ScoreResponse:
    inputs = wire.inputs_from_message(request.inputs)
    return wire.scores_to_message(await service.score(request.job_id, inputs, request.min_position))


async def meta_update(service: WeightingService, request: pb.MetaUpdateRequest) -> pb.MetaUpdateResponse:
    if not request.HasField("cotangent"):
        raise InvalidArgument("cotangent is missing, expected floats of [B]")
    taught = await service.meta_update(
        request.job_id,
        request.step,
        wire.inputs_from_message(request.inputs),
        from_message(request.cotangent, "cotangent"),
        update_id=request.update_id,
        scored_position=request.scored_position,
        estimator=wire.estimator_from_message(request.estimator),
    )
    return pb.MetaUpdateResponse(
        position=taught.position, duplicate=taught.duplicate, applied_position=taught.applied_position
    )


Unary = Callable[[WeightingService, Any], Awaitable[Any]]

UNARY: dict[str, Unary] = {
    "CreateWeighter": create_weighter,
    "GetWeighter": get_weighter,
    "ListWeighters": list_weighters,
    "DeleteWeighter": delete_weighter,
    "ExportWeighter": export_weighter,
    "OpenJob": open_job,
    "CloseJob": close_job,
    "Heartbeat": heartbeat,
    "Score": score,
    "MetaUpdate": meta_update,
}
