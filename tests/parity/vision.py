"""Compares ViT, ``ln_vision`` and Q-Former with LAVIS's own values, from files in LAVIS's layouts."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from minigpt4.config import QFormerConfig, VisionConfig
from minigpt4.qformer import QFormer, load_qformer
from minigpt4.vision import VisionEncoder, load_vision
from minigpt4.weights import read_state
from tests.parity.rows import Row, compare_tensor

TOLERANCE = 1e-4


@torch.no_grad()
def compare_lavis(folder: Path) -> list[Row]:
    """Compare a ``lavis/`` folder's recorded picture embeddings and query outputs."""
    sizes = json.loads((folder / "README.json").read_text(encoding="utf-8"))
    golden = load_file(folder / "golden.safetensors")
    eva = read_state(folder / "eva_vit.pth")
    vision_config = VisionConfig(
        weights=str(folder / "eva_vit.pth"),
        image_size=sizes["img"],
        patch_size=eva["patch_embed.proj.weight"].shape[-1],
        hidden_size=sizes["vd"],
        intermediate_size=eva["blocks.0.mlp.fc1.weight"].shape[0],
        num_layers=sizes["vl"],
        num_heads=sizes["vh"],
    )
    state = read_state(folder / "blip2_qformer.pth")
    qformer_config = QFormerConfig(
        weights=str(folder / "blip2_qformer.pth"),
        hidden_size=sizes["qd"],
        intermediate_size=state["Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"].shape[0],
        num_layers=sizes["ql"],
        num_heads=sizes["qh"],
        num_queries=sizes["q"],
    )
    vision = VisionEncoder(vision_config).eval()
    qformer = QFormer(qformer_config, vision_config.hidden_size).eval()
    load_vision(vision, vision_config, torch.float32)
    load_qformer(qformer, vision.model.post_layernorm, qformer_config, torch.float32)
    patches = vision(golden["images"])
    return [
        compare_tensor("lavis", "image_embeds", patches, golden["image_embeds"], TOLERANCE),
        compare_tensor("lavis", "query_output", qformer(patches), golden["query_output"], TOLERANCE),
    ]
