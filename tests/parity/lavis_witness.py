"""Runs LAVIS's own ViT and Q-Former on fresh random weights and records what they make of random pictures.

Run by ``make parity-lavis`` in LAVIS's environment (requirements-lavis.txt); nothing of this project is imported.
Each size becomes a folder in the layout that ``python -m tests.parity`` compares::

    python tests/parity/lavis_witness.py OUT --seed 0
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from lavis.models.eva_vit import VisionTransformer
from safetensors.torch import save_file
from torch import nn

MLP_RATIO = 4.3637
PATCH = 14
PICTURES = 3


@dataclass(frozen=True)
class Size:
    """Picture side; ViT width, layers, heads; Q-Former width, layers, heads, queries."""

    img: int
    vd: int
    vl: int
    vh: int
    qd: int
    ql: int
    qh: int
    q: int


SIZES = {
    "small": Size(img=56, vd=48, vl=3, vh=4, qd=32, ql=4, qh=4, q=8),
    "deep": Size(img=98, vd=64, vl=12, vh=8, qd=48, ql=12, qh=6, q=32),
    # the published head width of 88, picture side and number of queries
    "wide": Size(img=224, vd=352, vl=4, vh=4, qd=192, ql=6, qh=3, q=32),
}


class Witness(nn.Module):
    """LAVIS's modules under the names its checkpoints use."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(
            img_size=size.img,
            patch_size=PATCH,
            use_mean_pooling=False,
            embed_dim=size.vd,
            depth=size.vl,
            num_heads=size.vh,
            mlp_ratio=MLP_RATIO,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.ln_vision = nn.LayerNorm(size.vd)
        config = BertConfig(
            vocab_size=100,
            hidden_size=size.qd,
            num_hidden_layers=size.ql,
            num_attention_heads=size.qh,
            intermediate_size=4 * size.qd,
        )
        config.encoder_width = size.vd
        config.add_cross_attention = True
        config.cross_attention_freq = 2
        config.query_length = size.q
        self.Qformer = BertLMHeadModel(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, size.q, size.qd))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return picture embeddings and query outputs, as LAVIS's BLIP-2 computes them."""
        embeds = self.ln_vision(self.visual_encoder(images))
        output = self.Qformer.bert(
            query_embeds=self.query_tokens.expand(len(images), -1, -1),
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:-1], dtype=torch.long),
            return_dict=True,
        )
        return embeds, output.last_hidden_state


@torch.no_grad()
def write_witness(folder: Path, size: Size, seed: int) -> None:
    """Write one size's weights, pictures and results."""
    torch.manual_seed(seed)
    model = Witness(size).eval()
    for parameter in model.parameters():
        # LAVIS's small initial values would leave most layers near the identity
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.05 if parameter.ndim == 1 else 0.15)
    images = torch.randn(PICTURES, 3, size.img, size.img)
    embeds, output = model(images)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    vision = {
        key.removeprefix("visual_encoder."): value for key, value in state.items() if "visual_encoder" in key
    }
    torch.save(vision, folder / "eva_vit.pth")
    rest = {key: value for key, value in state.items() if "visual_encoder" not in key}
    torch.save({"model": rest}, folder / "blip2_qformer.pth")
    golden = {"images": images, "image_embeds": embeds, "query_output": output}
    save_file({key: value.contiguous() for key, value in golden.items()}, str(folder / "golden.safetensors"))
    (folder / "README.json").write_text(json.dumps(asdict(size), indent=1) + "\n")


def main() -> None:
    """Write a folder a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, size in SIZES.items():
        write_witness(arguments.out / name / "lavis", size, arguments.seed)
        print(arguments.out / name)


if __name__ == "__main__":
    main()
