"""Vitrail's service. A request passes through these files, from top to bottom:

gateway/app.py               the ASGI application: middleware, routes, lifespan
gateway/entrance.py          refused by its headers? then nothing else is done for it
gateway/rest/task_routes.py  one route per task: parse, send, render
gateway/rest/body.py         deadline, priority, body and parameters -> InferRequest
gateway/dispatch.py          InferRequest -> backend, cancelled if the client disconnects
rpc/vision.py                over gRPC instead: a message -> InferRequest -> backend -> a message
backend.py                   the interface of backends: workers elsewhere, or this process
remote/backend.py            workers elsewhere: the least busy one, over gRPC to its rpc/vision.py
worker/backend.py            this process: calls resolved to heads, prompts embedded
worker/execution_plan.py     calls grouped into the trunk passes that they share
worker/pipeline.py           a request's places in the queues, until its deadline
worker/admission.py          can it be finished by its deadline? then it takes places
worker/request_run.py        its inputs: from the decode pool to the lanes to results
worker/decode_queue.py       which inputs are decoded next
decoding/pool.py             a process that decodes an image, and can be killed
worker/scheduler.py          which inputs run next: pure policy
worker/batcher.py            the threads that run the scheduler's batches
worker/runner.py             a batch: the trunk once, then each head on its rows
worker/postprocess.py        rows -> results
gateway/rest/responses.py    results -> JSON, .npy or PNG

worker/head_store.py serves a folder of heads, worker/fit_jobs.py trains them in the background.
"""
