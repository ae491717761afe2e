"""Digest and size of a network's weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def state_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, however they were stored."""
    digest = hashlib.sha256()
    for key, value in sorted(state_dict.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()


def parameter_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers on their device."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
