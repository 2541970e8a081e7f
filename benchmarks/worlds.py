"""The models that are measured: tiny (shipped weights), mid (CPU-sized, random) and 7b (the paper's, random).

Shapes: B samples, T text tokens, P input pictures, O wanted pictures.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentencepiece import sentencepiece_model_pb2

from minigpt4.backbone import MiniGPT4
from minigpt4.config import BackboneConfig, LanguageModelConfig, QFormerConfig, VisionConfig
from minigpt4.tokenizer import MODEL_FILE, LlamaTokenizer
from minigpt5.config import PROJECT_ROOT, DiffusionConfig, ModelConfig, RunConfig, Stage, load_config
from minigpt5.data.types import Batch, Prompt, Sample, Task
from minigpt5.diffusion import build_diffusion, load_clip_tokenizer
from minigpt5.model import MiniGPT5, build_model
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.renderer import render
from minigpt5.tinyworld.scenes import random_scene, seeded
from minigpt5.vokens import IGNORE_INDEX, mask_inner_vokens

TINY_WEIGHTS = PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights"
SENTENCE_TOKENS = 24
"""Text of a response in the multimodal stage."""

_MID_LANGUAGE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_MID_UNET = {
    "sample_size": 16,
    "block_out_channels": [64, 128, 192, 192],
    "attention_head_dim": [2, 4, 6, 6],
    "cross_attention_dim": 256,
}
_MID_VAE = {"sample_size": 128, "block_out_channels": [32, 64, 128, 128]}
_MID_TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class World:
    """A model and what it is measured on."""

    preset: str
    model: MiniGPT5
    config: RunConfig
    device: torch.device


def open_world(preset: str, stage: Stage, device: torch.device, seed: int) -> World:
    """Build a preset's model; random weights come from the seed."""
    torch.manual_seed(seed)
    name = "tiny.yaml" if preset == "tiny" else "minigpt5_7b.yaml"
    config = load_config(PROJECT_ROOT / "config" / name, {}, {})
    config = dataclasses.replace(config, stage=stage)
    if stage is Stage.MULTIMODAL:
        # Stories and dialogues have no captions, so there is no caption loss.
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, caption_weight=0.0))
    if preset == "tiny":
        model = build_model(config.model, config.loss, stage)
    else:
        sizes = _mid_sizes(config.model) if preset == "mid" else config.model
        config = dataclasses.replace(config, model=sizes)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = _build_random(config, dtype, device)
    return World(preset, model.to(device).eval(), config, device)


def _mid_sizes(paper: ModelConfig) -> ModelConfig:
    """Return the CPU-sized model: the paper's parts, each a fraction as wide and deep."""
    backbone = BackboneConfig(
        vision=VisionConfig(image_size=126, hidden_size=384, intermediate_size=1536, num_layers=8, num_heads=6),
        qformer=QFormerConfig(hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=4),
        language_model=LanguageModelConfig(architecture=_MID_LANGUAGE),
    )
    assert paper.diffusion.architecture is not None
    parts = paper.diffusion.architecture
    architecture: dict[str, dict[str, Any]] = {
        "unet": parts["unet"] | _MID_UNET,
        "vae": parts["vae"] | _MID_VAE,
        "text_encoder": parts["text_encoder"] | _MID_TEXT,
        "scheduler": parts["scheduler"],
    }
    diffusion = DiffusionConfig(architecture=architecture, image_size=128)
    return dataclasses.replace(paper, backbone=backbone, diffusion=diffusion)


def _build_random(config: RunConfig, dtype: torch.dtype, device: torch.device) -> MiniGPT5:
    """Build the frozen parts in ``dtype`` right on the device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            backbone, diffusion = MiniGPT4(config.model.backbone), build_diffusion(config.model.diffusion)
    finally:
        torch.set_default_dtype(default)
    # Fresh queries are zeros, which would give every picture the same features.
    backbone.qformer.query_tokens.data.normal_(std=0.02)
    diffusion.tokenizer = load_clip_tokenizer(TINY_WEIGHTS / "sd" / "tokenizer")
    architecture = config.model.backbone.language_model.architecture
    assert architecture is not None
    tokenizer = _tokenizer(int(architecture["vocab_size"]))
    with torch.device(device):
        return MiniGPT5(backbone, diffusion, tokenizer, config.model, config.loss, config.stage)


def _tokenizer(vocabulary: int) -> LlamaTokenizer:
    """Return the tiny world's tokenizer, filled up to ``vocabulary`` pieces that no text holds."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString((TINY_WEIGHTS / "llama" / MODEL_FILE).read_bytes())
    for index in range(len(model.pieces), vocabulary):
        model.pieces.add(piece=f"▁filler{index}", score=-1e6)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        path.write_bytes(model.SerializeToString())
        return LlamaTokenizer(path)


def training_batch(world: World, size: int, seed: int, *, tokens: int, pictures: int) -> Batch:
    """Return samples with one wanted picture each.

    The response is vokens and stop string, behind a sentence in the multimodal stage.

    Args:
        world: decides ids and picture sizes.
        size: B.
        seed: of texts and pictures.
        tokens: T, with one for each picture of the prompt.
        pictures: of each prompt, 0 or 1.
    """
    model = world.model
    ids = model.voken_ids
    generator = torch.Generator().manual_seed(seed)
    sentence = SENTENCE_TOKENS if model.stage is Stage.MULTIMODAL else 0
    words = torch.randint(3, model.tokenizer.base_size, (sentence,), generator=generator)
    response = torch.cat([words, torch.tensor([*ids.vokens, *model.tokenizer.encode("###")])])
    start = tokens - len(response)
    input_ids = torch.randint(3, model.tokenizer.base_size, (size, tokens), generator=generator)
    input_ids[:, 4 : 4 + pictures] = ids.picture
    input_ids[:, start:] = response
    labels = torch.full((size, tokens), IGNORE_INDEX)
    labels[:, start:] = mask_inner_vokens(response, ids)
    vision, picture = world.config.model.backbone.vision.image_size, world.config.model.diffusion.image_size
    shown = torch.randn(size * pictures, 3, vision, vision, generator=generator)
    return Batch(
        samples=[_sample(index, seed) for index in range(size)],
        input_ids_BT=input_ids,
        attention_mask_BT=torch.ones(size, tokens, dtype=torch.long),
        labels_BT=labels,
        input_counts=[pictures] * size,
        output_counts=[1] * size,
        input_pixels_P3HW=shown if pictures else None,
        output_pixels_O3HW=torch.rand(size, 3, picture, picture, generator=generator) * 2 - 1,
    ).to(world.device)


def with_features(world: World, batch: Batch) -> Batch:
    """Return the batch as the feature cache would give it: no pixels, but what the encoders made of them."""
    assert batch.output_pixels_O3HW is not None
    pixels_P3HW, features_PLH = batch.input_pixels_P3HW, None
    if pixels_P3HW is not None:
        backbone = world.model.backbone
        features_PLH = backbone.encode_images(pixels_P3HW.to(backbone.projection.weight.dtype))
    return dataclasses.replace(
        batch,
        input_features_PLH=features_PLH,
        output_moments_OCHW=world.model.diffusion.encode_pixels(batch.output_pixels_O3HW),
        input_pixels_P3HW=None,
        output_pixels_O3HW=None,
    )


def _sample(index: int, seed: int) -> Sample:
    rng = seeded(seed, "train", "benchmark", index)
    text = caption(random_scene(rng, "train"), rng)
    return Sample(f"sample_{index}", Task.CAPTION, text, "", caption=text)


def prompts(count: int, seed: int) -> list[Prompt]:
    """Return questions about one rendered picture each, of different lengths."""
    made = []
    for index in range(count):
        rng = seeded(seed, "test", "benchmark", index)
        scene = random_scene(rng, "test")
        text = " ".join(caption(random_scene(rng, "test"), rng) for _ in range(1 + index % 3))
        question = f"###Human: <Img><ImageHere></Img> {text} ###Assistant:"
        picture: Image.Image = render(scene, rng)
        made.append(Prompt(f"prompt_{index}", question, (picture,)))
    return made
