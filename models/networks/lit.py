"""Both towers of LiT (github.com/google-research/vision_transformer, `models_lit.py`).

Embeddings have unit length as the towers return them.
"""

from functools import partial
from typing import Any

from open_clip.transformer import LayerNorm, TextTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.errors import InputError
from models.networks.text_encoders import create_encoder
from models.networks.vit import Vit


class LitVit(Vit):
    """A ViT whose embedding is its pooled features, projected where it has a head."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The embedding (B, D), of unit length."""
        return normalize(super().forward_head(x, pre_logits=False), dim=-1)


class LitText(TextTransformer):  # type: ignore[misc]
    """CLIP's text transformer without a mask: padding is attended to, so texts have one length.

    Args:
        pool_type: the position that the embedding is read from, `last` or `first`.
        sizes: arguments of open_clip's `TextTransformer`.
    """

    def __init__(self, *, pool_type: str, **sizes: Any) -> None:
        super().__init__(
            no_causal_mask=True,
            pool_type=pool_type,
            proj_bias=True,
            act_layer=partial(nn.GELU, approximate="tanh"),
            norm_layer=partial(LayerNorm, eps=1e-6),
            **sizes,
        )

    def forward(self, text: Tensor) -> Tensor:
        """Token ids (B, T) to embeddings (B, D), of unit length.

        Raises:
            InputError: the ids are not padded to the context's length.
        """
        if text.shape[1] != self.context_length:
            raise InputError(
                f"{text.shape[1]} token ids; this model takes {self.context_length}, padded with "
                "the id of </s>",
                field="token_ids",
            )
        return normalize(super().forward(text), dim=-1)


class LitBert(nn.Module):
    """A BERT, whose class token is projected. Id 0 is padding, which is not attended to.

    Args:
        sizes: arguments of transformers' `BertConfig`.
    """

    def __init__(self, *, output_dim: int, **sizes: Any) -> None:
        super().__init__()
        # flax's GELU is approximated by tanh
        sizes = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-12, **sizes}
        self.bert: Any = create_encoder("bert", pools=False, **sizes)
        self.head = nn.Linear(int(self.bert.config.hidden_size), output_dim)

    def forward(self, text: Tensor) -> Tensor:
        """Token ids (B, T) to embeddings (B, D), of unit length."""
        hidden = self.bert(input_ids=text, attention_mask=(text != 0).long()).last_hidden_state
        return normalize(self.head(hidden[:, 0]), dim=-1)


NETWORKS = {"lit-bert": LitBert, "lit-text": LitText, "lit-vit": LitVit}
