"""Vitrail's service: how a request goes.

gateway/app.py         the ASGI application: middleware, routes, lifespan
gateway/images_in.py   multipart, raw or JSON body -> encoded images and parameters
gateway/routes.py      parameters -> InferRequest -> backend -> answer
rpc/vision.py          or: a gRPC message -> InferRequest -> backend -> message
backend.py             the seam: the engine in this process, or
remote/backend.py      the least busy worker, over gRPC, and there rpc/vision.py again
worker/engine.py       calls resolved to models and heads, labels read
worker/inputs.py       admit, decode + preprocess in a pool, queue, finish
worker/scheduler.py    which images go to the device next: pure policy
worker/batcher.py      the threads that ask it
worker/runner.py       trunk once, each head on its own rows

worker/heads.py        the folder of heads, and worker/fits.py: fitting them in the background
"""
