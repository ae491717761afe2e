"""open_clip's models, with random weights: its own embeddings, scores and transform, unchanged."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from models.errors import InputError
from models.heads.embed import Embed
from models.heads.prompted import Similarity
from models.heads.zero_shot import ZeroShot
from models.inputs.normalize import Normalize, collate
from models.inputs.prompts import expand_templates
from models.inputs.transforms import create_transform
from models.model import Model
from models.trunks.devices import Placement
from models.trunks.open_clip import OpenClipTrunk
from models.trunks.two_tower import (
    load_open_clip,
    open_clip_preprocess,
    split_towers,
)

pytestmark = pytest.mark.filterwarnings("ignore")

# shortest side and centre crop; squash
ARCHITECTURES = ("ViT-S-32-alt", "ViT-B-32-SigLIP2-256")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_and_transforms_are_open_clips(
    name: str, photos: dict[str, Image.Image]
) -> None:
    torch.manual_seed(0)
    network = open_clip.create_model(name).eval()
    theirs = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(network)),
        is_train=False,
    )
    spec = open_clip_preprocess(network)
    expected = torch.stack([theirs(photo) for photo in photos.values()])
    transform = create_transform(spec)
    pixels = collate([transform(photo) for photo in photos.values()])
    assert torch.equal(Normalize(spec)(pixels), expected)
    with torch.inference_mode():
        embeddings = network.encode_image(expected)
    trunk = OpenClipTrunk(name, network, spec, Placement())
    model = Model("clip", trunk, Embed(trunk))
    entries = model.predict(list(photos.values()), normalize=False)
    ours = torch.tensor([entry["embedding"] for entry in entries])
    assert torch.allclose(ours, embeddings, atol=1e-5)
    for pooling in ("cls", "mean", "max", "gem"):
        with pytest.raises(InputError, match="leave pooling out"):
            model.predict([photos["coffee"]], pooling=pooling)


def test_a_tags_activation_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's weights want QuickGELU, which open_clip's default for the architecture has not."""
    asked: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> None:
        asked.update(options)
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(RuntimeError, match="far enough"):
            load_open_clip("ViT-B-32", tag, Placement(), {})
        assert asked["force_quick_gelu"] is quick


# CLIP, CLIP with EVA's towers, MobileCLIP, SigLIP 2 (sigmoid scores; its tokenizer is on the hub,
# so that CLIP's stands in for it)
FAMILIES = ("ViT-S-32-alt", "EVA02-B-16", "MobileCLIP-S1", "ViT-B-32-SigLIP2-256")


@pytest.mark.parametrize("name", FAMILIES)
def test_both_towers_and_their_scores_are_open_clips(
    name: str, photos: dict[str, Image.Image]
) -> None:
    torch.manual_seed(0)
    network = open_clip.create_model(name).eval()
    siglip = "SigLIP" in name
    tokenizer = SimpleTokenizer(context_length=64) if siglip else open_clip.get_tokenizer(name)
    if siglip:
        torch.nn.init.constant_(network.logit_bias, -1.0)
    spec = open_clip_preprocess(network)
    transform = create_transform(spec)
    pixels = Normalize(spec)(collate([transform(photos["coffee"])]))
    labels = ["cat", "coffee", "rocket"]
    with torch.inference_mode():
        image = network.encode_image(pixels, normalize=True)
        text = network.encode_text(
            tokenizer([f"a photo of a {label}." for label in labels]), normalize=True
        )
        logits = network.logit_scale.exp() * image @ text.T
        scores = (logits + network.logit_bias).sigmoid() if siglip else logits.softmax(-1)
    towers = split_towers(name, network, spec, tokenizer, Placement())
    similarity = Similarity(towers.scale, towers.bias)
    templates = expand_templates("photo")
    head = ZeroShot.create_prompted(towers.image, towers.text, similarity, templates=templates)
    model = Model("clip", towers.image, head, text=towers.text)
    [answer] = model.predict([photos["coffee"]], labels=labels)
    got = {item["label"]: item["score"] for item in answer["predictions"]}
    assert [got[label] for label in labels] == pytest.approx(scores[0].tolist(), abs=1e-5)
    embedded = model.embed_texts([f"a photo of a {label}." for label in labels])
    assert np.allclose(embedded, text.numpy(), atol=1e-5)
