"""The pages for people: the playground at `/`, and the API's at `/docs`.

All that they load is in `assets/`, so that they work without the internet.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

ASSETS = Path(__file__).with_name("assets")
# models/inputs/samples.py says whose it is.
SAMPLE = Path(__file__).parents[2] / "models" / "inputs" / "astronaut.jpg"

assets = StaticFiles(directory=ASSETS)


@router.get("/")
async def playground() -> FileResponse:
    return FileResponse(ASSETS / "index.html")


@router.get("/sample.jpg")
async def sample() -> FileResponse:
    return FileResponse(SAMPLE)


@router.get("/docs")
async def docs() -> FileResponse:
    return FileResponse(ASSETS / "docs.html")


@router.get("/redoc")
async def redoc() -> RedirectResponse:
    return RedirectResponse("docs")
