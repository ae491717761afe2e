"""The Open Inference Protocol, version 2: what its REST and gRPC sides share.

https://github.com/open-inference/open-inference-protocol
"""
