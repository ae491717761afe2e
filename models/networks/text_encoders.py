"""Text encoders that transformers implements."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def create_encoder(kind: str, *, pools: bool, **sizes: Any) -> "PreTrainedModel":
    """An encoder with random weights.

    Args:
        kind: `bert`, `roberta`, `mt5` or `m2m_100`.
        pools: with BERT's or RoBERTa's pooling layer.
        sizes: arguments of transformers' configuration.

    Raises:
        ValueError: no such kind, or sizes that do not fit together.
    """
    # Imported here because it takes a tenth of a worker's start, and few models need it.
    from transformers import (
        BertConfig,
        BertModel,
        M2M100Config,
        MT5Config,
        RobertaConfig,
        RobertaModel,
    )
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder
    from transformers.models.mt5.modeling_mt5 import MT5Stack

    encoder: PreTrainedModel
    match kind:
        case "bert":
            encoder = BertModel(BertConfig(**sizes), add_pooling_layer=pools)
        case "roberta":
            encoder = RobertaModel(RobertaConfig(**sizes), add_pooling_layer=pools)
        case "mt5":
            encoder = MT5Stack(MT5Config(**sizes))
        case "m2m_100":
            encoder = M2M100Encoder(M2M100Config(**sizes))
        case _:
            raise ValueError(f"no text encoder {kind!r}")
    return encoder
