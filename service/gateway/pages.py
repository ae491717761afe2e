"""The pages for people: the playground at `/`, and the API's at `/docs`.

All that they load is in `assets/`, so that they work without the internet.
"""

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from service.gateway.security_headers import Page

router = APIRouter(include_in_schema=False)

ASSETS = Path(__file__).with_name("assets")

assets = StaticFiles(directory=ASSETS)


@router.get("/", response_class=Page)
async def playground() -> Page:
    return Page(ASSETS / "index.html")


@router.get("/docs", response_class=Page)
async def docs() -> Page:
    return Page(ASSETS / "docs.html")


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The API's document. It takes the event loop's time only once, and that in a thread."""
    app = request.app
    if app.state.document is None:
        app.state.document = await asyncio.to_thread(lambda: JSONResponse(app.openapi()).body)
    return Response(app.state.document, media_type="application/json")


@router.get("/redoc")
async def redoc() -> RedirectResponse:
    return RedirectResponse("docs")
