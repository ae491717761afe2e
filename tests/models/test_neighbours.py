"""Further published files of the fixtures' authors, with shapes of their own: EsViT's ResNet-50,
ResMLP, the hybrid of a ResNet's stem alone, and SigLIP's `.npz`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor

from models import load_checkpoint
from models.checkpoints.formats.resmlp import RENAMED
from models.errors import CheckpointError
from tests.models.test_classification_families import pixels, randomised, saved
from tests.models.test_fixtures import fixture, folder_of

RANDOM = np.random.default_rng(0)


def test_esvits_resnets_are_in_two_wrappers(tmp_path: Path) -> None:
    network = randomised(ResNet(Bottleneck, [1, 1, 1, 1], channels=(8, 8, 8, 8), num_classes=0))
    teacher = {f"module.backbone.backbone.{k}": v for k, v in network.state_dict().items()}
    teacher |= {f"module.{head}.last_layer.weight_v": torch.ones(5, 4)
                for head in ("head", "head_dense")}  # fmt: skip
    student = {key: value + 1 for key, value in teacher.items()}
    path = saved(tmp_path / "checkpoint.pth", {"student": student, "teacher": teacher})
    found = load_checkpoint(path).run(pixels(64, 64))
    assert torch.allclose(found["embedding"], network(pixels(64, 64)), atol=1e-5)
    assert torch.equal(found["feature_map"].mean((2, 3)), found["embedding"])


@pytest.mark.parametrize("classes", [0, 7])
def test_resmlp(classes: int, tmp_path: Path) -> None:
    """DINO's has no classifier."""
    network = randomised(
        MlpMixer(
            num_classes=classes, img_size=32, patch_size=8, num_blocks=2, embed_dim=24,
            mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine,
        )
    )  # fmt: skip
    state = {}
    for key, value in network.state_dict().items():
        for theirs, ours in RENAMED:
            key = key.replace(ours, theirs)
        state[key] = value.flatten() if key.endswith((".alpha", ".beta")) else value
    model = load_checkpoint(saved(tmp_path / "resmlp.pth", state))
    found = model.run(pixels(32, 32))["logits" if classes else "embedding"]
    assert torch.allclose(found, network(pixels(32, 32)), atol=1e-5)


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {k: RANDOM.normal(0, 0.2, s).astype(np.float32) for k, s in shapes.items()}


def encoder(prefix: str, blocks: tuple[str, ...], stack: tuple[int, ...]) -> dict[str, Any]:
    """A JAX encoder of width 32 with four heads."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}encoder_norm/scale": (32,), f"{prefix}encoder_norm/bias": (32,)
    }  # fmt: skip
    for block in blocks:
        for norm in "01":
            for part in ("scale", "bias"):
                shapes[f"{prefix}{block}/LayerNorm_{norm}/{part}"] = (*stack, 32)
        shapes |= {
            f"{prefix}{block}/{k}": (*stack, *s) for k, s in (attention() | mlp()).items()
        }  # fmt: skip
    return arrays(shapes)


def attention() -> dict[str, tuple[int, ...]]:
    name = "MultiHeadDotProductAttention_0"
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("query", "key", "value"):
        shapes |= {f"{name}/{part}/kernel": (32, 4, 8), f"{name}/{part}/bias": (4, 8)}
    return shapes | {f"{name}/out/kernel": (4, 8, 32), f"{name}/out/bias": (32,)}


def mlp() -> dict[str, tuple[int, ...]]:
    return {"MlpBlock_0/Dense_0/kernel": (32, 64), "MlpBlock_0/Dense_0/bias": (64,),
            "MlpBlock_0/Dense_1/kernel": (64, 32), "MlpBlock_0/Dense_1/bias": (32,)}  # fmt: skip


def siglip() -> dict[str, Any]:
    two = ("encoderblock_0", "encoderblock_1")
    pool = {f"params/img/MAPHead_0/{k}": s for k, s in (attention() | mlp()).items()}
    return (
        encoder("params/img/Transformer/", two, ())
        | encoder("params/txt/Encoder_0/", two, ())
        | arrays(pool)
        | arrays(
            {
                "params/img/embedding/kernel": (8, 8, 3, 32), "params/img/embedding/bias": (32,),
                "params/img/pos_embedding": (1, 16, 32), "params/img/MAPHead_0/probe": (1, 1, 32),
                "params/img/MAPHead_0/LayerNorm_0/scale": (32,),
                "params/img/MAPHead_0/LayerNorm_0/bias": (32,),
                "params/txt/Embed_0/embedding": (50, 32), "params/txt/pos_embedding": (1, 9, 32),
                "params/txt/head/kernel": (32, 32), "params/txt/head/bias": (32,),
                "params/t": (1,), "params/b": (1,),
            }
        )
    )  # fmt: skip


def siglips_reference(path: Path) -> Any:
    """open_clip's network with GELU by tanh, which reads these files itself."""
    from open_clip.convert import load_big_vision_weights
    from open_clip.model import CustomTextCLIP

    network = CustomTextCLIP(
        32,
        {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none",
         "image_size": 32},
        {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2,
         "mlp_ratio": 2, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
         "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
        init_logit_bias=-10,
    )  # fmt: skip
    from timm.models.vision_transformer import VisionTransformer

    network.visual.trunk = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2,
        class_token=False, global_pool="map", act_layer="gelu_tanh", num_classes=0,
    )  # fmt: skip
    load_big_vision_weights(network, str(path))
    return network.eval()


def test_siglip(tmp_path: Path) -> None:
    """With numbered and with stacked blocks."""
    content = siglip()
    path = tmp_path / "siglip.npz"
    np.savez(path, **content)
    ids = torch.arange(18).reshape(2, 9)
    reference = siglips_reference(path)
    stacked: dict[str, Any] = {}
    for key, value in content.items():
        if "encoderblock_0" in key:
            other = content[key.replace("block_0", "block_1")]
            stacked[key.replace("block_0", "block")] = np.stack([value, other])
        elif "encoderblock_1" not in key:
            stacked[key] = value
    np.savez(tmp_path / "stacked.npz", **stacked)
    expected: tuple[Tensor, Tensor] = (
        reference.encode_image(pixels(32, 32), normalize=True),
        reference.encode_text(ids, normalize=True),
    )
    for file in (path, tmp_path / "stacked.npz"):
        found = load_checkpoint(file).run(pixels(32, 32), ids)
        assert torch.allclose(found["image_embedding"], expected[0], atol=1e-5)
        assert torch.allclose(found["text_embedding"], expected[1], atol=1e-5)


def test_a_siglip_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    content = siglip()
    np.savez(tmp_path / "more.npz", **content, extra=content["params/t"])
    with pytest.raises(CheckpointError, match="left over: extra"):
        load_checkpoint(tmp_path / "more.npz")
    del content["params/img/MAPHead_0/MultiHeadDotProductAttention_0/out/bias"]
    np.savez(tmp_path / "less.npz", **content)
    with pytest.raises(CheckpointError, match="is missing"):
        load_checkpoint(tmp_path / "less.npz")


def test_a_hybrid_may_have_a_stem_alone(tmp_path: Path) -> None:
    content = encoder("Transformer/", ("encoderblock_0",), ())
    content |= arrays(
        {
            "conv_root/kernel": (7, 7, 3, 32), "gn_root/scale": (1, 1, 1, 32),
            "gn_root/bias": (1, 1, 1, 32), "embedding/kernel": (2, 2, 32, 32),
            "embedding/bias": (32,), "cls": (1, 1, 32),
            "Transformer/posembed_input/pos_embedding": (1, 17, 32),
        }
    )  # fmt: skip
    np.savez(tmp_path / "hybrid.npz", **content)
    model = load_checkpoint(tmp_path / "hybrid.npz")
    assert model.run(pixels(32, 32))["tokens"].shape == (2, 17, 32)


def test_a_mixer_may_lie_in_its_optimizer(tmp_path: Path) -> None:
    plain, golden, _ = fixture("mlp_mixer")
    with np.load(folder_of("mlp_mixer") / "checkpoint.npz") as content:
        np.savez(tmp_path / "all.npz", **{f"opt/target/{key}": content[key] for key in content})
    found = load_checkpoint(tmp_path / "all.npz").run(golden["pixel_values"])
    assert torch.equal(found["logits"], plain.run(golden["pixel_values"])["logits"])
