"""Health checks and metrics."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from service.gateway.auth import require_admin_key, require_metrics_key
from service.metrics import exposition
from service.types import Health

router = APIRouter(tags=["system"])


@router.get("/healthz")
async def healthz(request: Request) -> JSONResponse:
    """200 unless a restart is needed, because a device thread is dead or stuck."""
    health: Health = request.app.state.backend.health()
    status = "ok" if health.live else "failed"
    return JSONResponse(
        {"status": status, "reasons": list(health.reasons)}, 200 if health.live else 503
    )


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """200 when every start-up model is ready and idle trunks pass their probes.

    `status` is `ready`, `degraded` (ready, but not on all workers) or `not ready`.
    """
    health: Health = request.app.state.backend.health()
    degraded = health.ready and bool(health.reasons)
    status = "degraded" if degraded else "ready" if health.ready else "not ready"
    return JSONResponse(
        {"status": status, "reasons": list(health.reasons)}, 200 if health.ready else 503
    )


@router.get("/debug/queues", dependencies=[Depends(require_admin_key)])
async def debug_queues(request: Request) -> dict[str, Any]:
    """What is in flight, waits and runs in this process now, by trunk and client, with the limits;
    of a gateway apart, what it knows of its workers. Needs an admin key."""
    state = request.app.state
    return {"budget": state.budget.state(), **state.backend.state()}


@router.get("/metrics", response_class=Response, dependencies=[Depends(require_metrics_key)])
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format, or where traces are on in OpenMetrics' if that is
    accepted."""
    state = request.app.state
    state.metrics.prune(state.backend.knows)
    content, media_type = exposition(
        state.metrics.registry,
        request.headers.get("accept", ""),
        triton=state.settings.triton_metrics,
    )
    return Response(content, headers={"Content-Type": media_type})
