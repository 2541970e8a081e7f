"""Scoring: CLIP similarities of pictures, one at a time as published, against batches."""

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import worlds
from benchmarks.harness import Phases, Report, Settings, alternate, timed
from minigpt5.metrics.clip import Clip, load_clip, wrap_clip
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.renderer import render
from minigpt5.tinyworld.scenes import random_scene, seeded

PICTURES = {"tiny": 64, "mid": 32, "7b": 512}
MODELS = {"mid": "ViT-B-32-quickgelu", "7b": "ViT-L-14-quickgelu"}
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


def measure(settings: Settings) -> Report:
    """Measure features of generated pictures, wanted pictures and texts: three rows a prediction."""
    report = Report(settings)
    clip = _open_clip(settings)
    made, wanted, texts = _items(PICTURES[settings.preset], settings.seed)

    def one_by_one() -> Tensor:
        rows = []
        for picture, other, text in zip(made, wanted, texts, strict=True):
            first, second = clip.pictures.encode([picture]), clip.pictures.encode([other])
            sentence = next(iter(clip.texts.table([text]).values()))[None]
            rows.append(torch.cat([F.cosine_similarity(first, second), F.cosine_similarity(first, sentence)]))
        return torch.stack(rows)

    def batched() -> Tensor:
        first, second = clip.pictures.encode(made), clip.pictures.encode(wanted)
        table = clip.texts.table(texts)
        sentences = torch.stack([table[text] for text in texts])
        return torch.stack([F.cosine_similarity(first, second), F.cosine_similarity(first, sentences)], dim=1)

    difference = float((one_by_one() - batched()).abs().max())
    if not difference <= TOLERANCE[settings.device.type]:
        raise AssertionError(f"similarities differ by {difference}")
    report.equal.append(f"similarities of {len(made)} predictions (largest difference {difference:.1e})")
    paths: dict[str, Phases] = alternate(
        {
            "reference": lambda: timed(one_by_one, settings.device),
            "ours": lambda: timed(batched, settings.device),
        },
        settings.repeats,
    )
    rates = {name: len(made) / phases["total"] for name, phases in paths.items()}
    report.add("CLIP similarities", "predictions/s", rates["reference"], rates["ours"], higher_is_better=True)
    return report


def _open_clip(settings: Settings) -> Clip:
    """Return the tiny world's CLIP, or a full-sized one with random weights."""
    if settings.preset == "tiny":
        return load_clip(str(worlds.TINY_WEIGHTS / "clip"), "", settings.device)
    return _random_clip(MODELS[settings.preset], settings)


def _random_clip(name: str, settings: Settings) -> Clip:
    """Return an open_clip model with random weights behind this project's wrapper."""
    torch.manual_seed(settings.seed)
    model, _, transform = open_clip.create_model_and_transforms(name)
    return wrap_clip(model, transform, open_clip.get_tokenizer(name), settings.device, f"random {name}")


def _items(count: int, seed: int) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
    made, wanted, texts = [], [], []
    for index in range(count):
        rng = seeded(seed, "test", "scores", index)
        scene = random_scene(rng, "test")
        made.append(render(scene, rng))
        wanted.append(render(random_scene(rng, "test"), rng))
        texts.append(f"{caption(scene, rng)} {index}")
    return made, wanted, texts
