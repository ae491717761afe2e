"""FastAPI without batching: each worker runs one request at a time in a thread."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request

from benchmarks.rivals.classifier import Answer, Classifier
from benchmarks.rivals.forms import read_images
from benchmarks.rivals.options import Options


@asynccontextmanager
async def load(app: FastAPI) -> AsyncIterator[None]:
    """Load the model before the first request."""
    app.state.classifier = Classifier(Options.from_environment())
    app.state.thread = ThreadPoolExecutor(1)
    yield


app = FastAPI(lifespan=load)


@app.get("/ready")
def ready() -> bool:
    """Whether the model is loaded."""
    return True


@app.post("/predict")
async def predict(request: Request) -> dict[str, Answer]:
    """Classify the images of a request."""
    images, state = await read_images(request), app.state
    loop = asyncio.get_running_loop()
    [answer] = await loop.run_in_executor(state.thread, state.classifier.classify, [images])
    return {"results": answer}


if __name__ == "__main__":
    options = Options.from_environment()
    uvicorn.run(
        "benchmarks.rivals.plain_fastapi:app",
        host="127.0.0.1",
        port=options.port,
        workers=options.workers,
        timeout_worker_healthcheck=120,  # importing torch may take longer than the default of 5 s
    )
