"""Vitrail's service. A request passes these files, top to bottom:

gateway/app.py               the ASGI application: middleware, routes, lifespan
gateway/rest/task_routes.py  one route per task: parse, send, render
gateway/rest/body.py         deadline, priority, body and parameters -> InferRequest
gateway/dispatch.py          InferRequest -> backend, cancelled if the client disconnects
rpc/vision.py                or, over gRPC: a message -> InferRequest -> backend -> a message
backend.py                   the seam: a backend in this process, or workers elsewhere
remote/backend.py            elsewhere: the least busy worker, over gRPC, and there rpc/vision.py
worker/backend.py            here: calls resolved to heads, prompts embedded
worker/execution_plan.py     calls grouped into the trunk passes that they share
worker/pipeline.py           a place in the queue, decoding, the passes
worker/scheduler.py          which inputs run next: pure policy
worker/batcher.py            the threads that ask it
worker/runner.py             a batch: the trunk once, each head on its own rows
worker/postprocess.py        rows -> answers
gateway/rest/responses.py    answers -> JSON, .npy or PNG

worker/head_store.py keeps the folder of heads, worker/fit_jobs.py trains them in the background.
"""
