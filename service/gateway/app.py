"""The ASGI application."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from fastapi import FastAPI

from service.backend import Backend
from service.gateway import pages
from service.gateway.collections import routes as collection_routes
from service.gateway.collections.thumbnails import ThumbnailMaker
from service.gateway.dialects import cohere, immich, infinity, pooling, tei
from service.gateway.entrance import Entrance
from service.gateway.error_responses import document_errors
from service.gateway.fetch import ImageFetcher
from service.gateway.lateness import Lateness
from service.gateway.middleware import RequestContext
from service.gateway.open_inference import memory_routes
from service.gateway.open_inference import routes as open_inference_routes
from service.gateway.openai import routes as openai_routes
from service.gateway.ports import SeparatePorts
from service.gateway.problems import install_handlers
from service.gateway.rest import head_routes, model_routes, system_routes, task_routes
from service.keys import Keys
from service.limits import Budget
from service.metrics import Metrics
from service.open_inference.shared_memory import SharedMemory
from service.sampling import sampling
from service.search.opening import StoreOpener
from service.settings import Settings

# Files of heads that are read at a time: a file's bytes are counted only once they are written to a
# connection.
HEADS_READ = 4


def create_app(
    settings: Settings,
    backend: Backend,
    metrics: Metrics,
    beside: AbstractAsyncContextManager[None] | None = None,
    keys: Keys | None = None,
    budget: Budget | None = None,
    memory: SharedMemory | None = None,
    stop_beside: Callable[[float], Awaitable[None]] | None = None,
) -> FastAPI:
    """The routes and middleware in front of a backend.

    The application's lifespan starts and closes the backend.

    Args:
        beside: entered while the application runs: a gRPC server on the same backend.
        keys, budget: shared with that server, so that they hold for both together.
        stop_beside: stops that server once its calls have ended, or after some seconds.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        async with sampling(metrics, app.state.budget), beside or nullcontext():
            yield
        await backend.close()
        await app.state.fetcher.close()
        await app.state.collections.close()
        app.state.folder_threads.shutdown(wait=False, cancel_futures=True)
        app.state.thumbnails.close()

    app = FastAPI(
        title="Vitrail",
        description="Serving vision transformers: one trunk pass shared by all heads.",
        lifespan=lifespan,
        openapi_url=None,  # FastAPI's own makes the text for each request
        docs_url=None,  # FastAPI's own pages load from the internet
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.document = None  # the API's, once it was asked for
    app.state.keys = keys or Keys(settings)
    app.state.budget = budget or Budget(settings)
    app.state.lateness = Lateness()
    app.state.memory = memory or SharedMemory(settings.shared_memory)
    app.state.backend = backend
    app.state.stop_beside = stop_beside
    app.state.metrics = metrics
    app.state.fetcher = ImageFetcher(settings)
    app.state.collections = StoreOpener(settings.collections)
    # Of their own: a network mount that hangs holds up requests for folders alone.
    app.state.folder_threads = ThreadPoolExecutor(2, "folders")
    app.state.reading_heads = asyncio.Semaphore(HEADS_READ)
    app.state.thumbnails = ThumbnailMaker(settings, metrics)
    install_handlers(app)
    modules = (
        task_routes,
        model_routes,
        head_routes,
        collection_routes,
        open_inference_routes,
        memory_routes,
        openai_routes,
        tei,
        cohere,
        immich,
        infinity,
        pooling,
        system_routes,
        pages,
    )
    for module in modules:
        app.include_router(module.router)
    # the last one is the outermost
    routes = [route for module in modules for route in module.router.routes]
    app.add_middleware(Entrance, routes=routes)
    app.add_middleware(SeparatePorts, settings=settings)
    app.add_middleware(RequestContext)
    app.mount("/assets", pages.assets)
    document_errors(app)
    return app
