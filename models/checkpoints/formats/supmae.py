"""SupMAE (arXiv 2205.14540, github.com/enyac-group/supmae): MAE's pre-training with a classifier.

The classifier `cls_head` reads the mean of the patch tokens after the norm, or the class token.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import Known, flag
from models.checkpoints.families.mae import decoder_assumed, decoder_state, request, without_decoder
from models.checkpoints.families.mae import outputs as mae_outputs
from models.checkpoints.families.vit import MARKS, vit_checkpoint
from models.reference_outputs import ReferenceRun

NAME = "supmae"

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if keys >= MARKS and any(key.startswith("cls_head.") for key in keys):
        return "a ViT in timm's names with a classifier cls_head beside it"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `global_pool` (the training script's, else false), and the decoder's."""
    tensors = container.tensors
    kept, _ = without_decoder(tensors)
    head = {k.removeprefix("cls_head."): v for k, v in tensors.items() if k.startswith("cls_head.")}
    if "weight" in head:  # a single layer
        head = {f"0.{key}": value for key, value in head.items()}
    known = Known(arguments, container.script)
    mean = flag("global_pool", known.get("global_pool", False))
    settings: dict[str, Any] = {"layers": [-1], "mean": "alone" if mean else None}
    if "3.weight" in head:
        settings["activations"] = {"2": "relu"}
    classifier = {f"classifier.{key}": value for key, value in head.items()}
    heads = decoder_state(container, arguments) | {"linear": HeadState(classifier, settings)}
    assumed = decoder_assumed(heads, container, arguments) | known.assumed
    return vit_checkpoint(NAME, kept, arguments, positions="bicubic", heads=heads, assumed=assumed)


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """MAE's outputs; `embedding`, the classifier's input; and `embedding_cls`, the class token.

    At other sizes than that of training, upstream evaluates with MAE's code, and `embedding` is the
    class token.
    """
    head: Any = run.heads["classify"]
    named = mae_outputs(run)
    first = run.output.tokens_BTD[:, 0]
    trained = tuple(run.inputs["pixel_values"].shape[2:]) == run.trunk.preprocess.input_size
    return named | {
        "embedding": head.features(run.output) if trained else first,
        "embedding_cls": first,
    }
