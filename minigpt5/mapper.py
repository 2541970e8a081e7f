"""Feature mapper: voken states → the conditioning of the diffusion model (paper section 3.2).

Shapes: R pictures, N vokens a picture, H language width, Q conditioning positions (77), E diffusion width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minigpt5.config import MapperConfig


class FeatureMapper(nn.Module):
    """Two-layer MLP, then an encoder-decoder transformer whose decoder queries are learned.

    Args:
        config: depth, heads and number of queries.
        language_width: H.
        diffusion_width: E, the width of the UNet's cross-attention.
    """

    def __init__(self, config: MapperConfig, language_width: int, diffusion_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(language_width, diffusion_width),
            nn.GELU(),
            nn.Linear(diffusion_width, diffusion_width),
        )
        arguments: dict[str, Any] = {
            "d_model": diffusion_width,
            "nhead": config.num_heads,
            "dim_feedforward": config.feedforward_ratio * diffusion_width,
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": True,
        }
        # Built here only to switch nested tensors off, which nn.Transformer's own encoder warns about.
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**arguments),
            config.encoder_layers,
            nn.LayerNorm(diffusion_width),
            enable_nested_tensor=False,
        )
        self.transformer = nn.Transformer(
            num_decoder_layers=config.decoder_layers, custom_encoder=encoder, **arguments
        )
        self.queries = nn.Parameter(torch.randn(1, config.num_queries, diffusion_width))

    def forward(self, vokens_RNH: Tensor) -> Tensor:
        """Return the conditioning ``[R, Q, E]``."""
        source_RNE = self.mlp(vokens_RNH)
        return self.transformer(source_RNE, self.queries.expand(len(vokens_RNH), -1, -1))
