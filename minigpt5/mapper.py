"""Feature mapper: voken states → the conditioning of the diffusion model (paper section 3.2).

Shapes: R pictures, N vokens a picture, H language width, Q conditioning positions (77), E diffusion width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.errors import InputError
from minigpt5.config import MapperConfig


class FeatureMapper(nn.Module):
    """Two-layer MLP on each voken's state, then what makes Q conditioning positions of the N vokens.

    ``transformer``: an encoder-decoder transformer whose Q decoder queries are learned. ``mlp``: one learned
    linear map from the N positions to the Q, the same for every channel.

    Args:
        config: kind, depth, heads and number of queries.
        vokens: N.
        language_width: H.
        diffusion_width: E, the width of the UNet's cross-attention.

    Raises:
        InputError: the heads do not divide the diffusion width.
    """

    def __init__(self, config: MapperConfig, vokens: int, language_width: int, diffusion_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(language_width, diffusion_width),
            nn.GELU(),
            nn.Linear(diffusion_width, diffusion_width),
        )
        if config.kind == "mlp":
            self.positions = nn.Linear(vokens, config.num_queries)
        else:
            self.transformer = _build_transformer(config, diffusion_width)
            self.queries = nn.Parameter(torch.randn(1, config.num_queries, diffusion_width))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.mlp.parameters()).dtype

    def freeze_aligned(self) -> None:
        """Freeze what the multimodal stage keeps from the alignment stage: the MLP and, if any, the queries.

        What goes on training is the transformer (the published configuration) or the map of positions.
        """
        self.mlp.requires_grad_(False)
        if hasattr(self, "queries"):
            self.queries.requires_grad_(False)

    def forward(self, vokens_RNH: Tensor) -> Tensor:
        """Return the conditioning ``[R, Q, E]``."""
        source_RNE = self.mlp(vokens_RNH)
        if hasattr(self, "positions"):
            return self.positions(source_RNE.transpose(1, 2)).transpose(1, 2)
        return self.transformer(source_RNE, self.queries.expand(len(vokens_RNH), -1, -1))


def _build_transformer(config: MapperConfig, width: int) -> nn.Transformer:
    if width % config.num_heads:
        raise InputError(f"model.mapper.num_heads: {config.num_heads} does not divide the diffusion width {width}")
    arguments: dict[str, Any] = {
        "d_model": width,
        "nhead": config.num_heads,
        "dim_feedforward": config.feedforward_ratio * width,
        "dropout": 0.0,
        "batch_first": True,
        "norm_first": True,
    }
    # Built here only to switch nested tensors off, which nn.Transformer's own encoder warns about.
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**arguments),
        config.encoder_layers,
        nn.LayerNorm(width),
        enable_nested_tensor=False,
    )
    return nn.Transformer(num_decoder_layers=config.decoder_layers, custom_encoder=encoder, **arguments)
