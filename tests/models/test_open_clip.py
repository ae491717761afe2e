"""open_clip's image towers, with random weights: its own embeddings and transform, unchanged."""

import open_clip
import pytest
import torch
from PIL import Image

from models.errors import InputError
from models.heads.embed import Embed
from models.model import Model
from models.preprocess import collate, create_transform, normalize
from models.towers import open_clip_preprocess
from models.trunk import OpenClipTrunk, Placement

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
    assert torch.equal(normalize(pixels, spec), expected)
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
