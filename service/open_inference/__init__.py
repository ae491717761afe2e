"""The Open Inference Protocol, version 2: what its REST and gRPC interfaces share.

https://github.com/open-inference/open-inference-protocol
"""
