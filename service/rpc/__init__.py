"""gRPC in front of a backend: Vision, the Open Inference Protocol, health and reflection."""
