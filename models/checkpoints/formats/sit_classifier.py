"""SiT's fine-tuned classifier (arXiv 2104.03602, github.com/Sara-Ahmed/SiT).

A ViT in timm's names under `model`; its classifier of two layers reads the concatenation of the
class token and the mean patch token. No such file is published; the layout is assumed.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.vit import MARKS, vit_checkpoint
from models.reference_outputs import ReferenceRun

NAME = "sit-classifier"
HEAD = ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    tensors = container.tensors
    if not tensors.keys() >= MARKS | set(HEAD):
        return None
    if tensors[HEAD[0]].shape[-1] == 2 * tensors["cls_token"].shape[-1]:
        return "a ViT in timm's names with two layers on twice its channels"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    tensors = dict(container.tensors)
    head = {key.replace("head.", "classifier."): tensors.pop(key) for key in HEAD}
    settings = {"layers": [-1], "mean": "appended", "activations": {"1": "gelu"}}
    heads = {"linear": HeadState(head, settings)}
    return vit_checkpoint(NAME, tensors, arguments, positions="dino", heads=heads)


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding` (B, 2 D), the classifier's input."""
    head: Any = run.heads["classify"]
    return {"embedding": head.features(run.output)}
