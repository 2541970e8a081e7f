"""How good the tiny foundations are on held-out pictures, and the floors they must reach.

Shapes: P pictures, S side in pixels, H language width, T tokens, J joint.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from minigpt4.backbone import LoadedBackbone
from minigpt4.errors import InputError
from minigpt5 import prompts
from minigpt5.config import PROJECT_ROOT, GenerationConfig, load_config
from minigpt5.data.cc3m import clean_caption
from minigpt5.data.types import INPUT_PICTURE
from minigpt5.diffusion import StableDiffusion
from minigpt5.generation import sample_seed
from minigpt5.images import input_transform, output_transform
from minigpt5.metrics.local import load_compact_clip
from minigpt5.tinyworld.captions import read_attributes, read_things
from minigpt5.tinyworld.datasets import picture_scene
from minigpt5.tinyworld.foundations import EYES_FILES, load_folder_backbone, load_folder_diffusion
from minigpt5.tinyworld.pretraining.examples import DESCRIBE
from minigpt5.tinyworld.recogniser import Agreement, compare, recognise, shows_things
from minigpt5.tinyworld.renderer import PICTURE_SIZE, render
from minigpt5.tinyworld.scenes import MOST_THINGS, Scene, seeded

RETRIEVAL = 100
"""Pictures and captions to choose from."""
_SPLIT = "validation"
_BATCH = 50
_DESCRIPTION_TOKENS = 40


@dataclass(frozen=True)
class Measure:
    """One quality, as a share, and the least it must be, if there is one."""

    part: str
    name: str
    value: float
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the floor is reached, or there is none."""
        return self.floor is None or self.value >= self.floor

    def __str__(self) -> str:
        verdict = "" if self.floor is None else f"   floor {self.floor:4.0%}   {'met' if self.met else 'NOT MET'}"
        return f"{self.part:9} {self.name:52} {self.value:7.1%}{verdict}"


@dataclass(frozen=True)
class HeldOut:
    """Held-out scenes with captions, as in the CC3M-like data, rendered with jitter."""

    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]

    @classmethod
    def draw(cls, count: int, seed: int) -> "HeldOut":
        """Draw ``count`` records of the validation split."""
        scenes, captions = zip(*(picture_scene(seed, _SPLIT, index) for index in range(count)), strict=True)
        return cls(scenes, captions)

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The pictures, in order."""
        return [render(scene, seeded(0, _SPLIT, "evaluation", index)) for index, scene in enumerate(self.scenes)]


def measure_vae(folder: Path, data: HeldOut) -> list[Measure]:
    """Share of attributes that survive encoding and decoding."""
    pictures = reconstruct(load_folder_diffusion(folder), data.pictures)
    kept = compare_all(data.scenes, pictures)
    value = fmean(agrees for agreement in kept for agrees in agreement.as_dict().values())
    return [
        Measure("vae", "reconstruction: main thing's attributes kept", value, 0.99),
        Measure("vae", "reconstruction: both of two things kept", share_of_both(data.scenes, pictures)),
    ]


def measure_unet(folder: Path, data: HeldOut) -> list[Measure]:
    """Attributes of pictures drawn from captions."""
    pictures = draw_captions(load_folder_diffusion(folder), data.captions, default_sampling())
    drawn = compare_all(data.scenes, pictures)
    return [
        Measure(
            "unet",
            "text to image: main thing's shape and colour",
            fmean(one.shape and one.colour for one in drawn),
            0.95,
        ),
        Measure("unet", "text to image: main thing's five attributes", fmean(one.all for one in drawn), 0.85),
        Measure("unet", "text to image: both of two things", share_of_both(data.scenes, pictures)),
    ]


def measure_vision(folder: Path, data: HeldOut) -> list[Measure]:
    """Attributes named by the backbone's descriptions; either thing of two may come first."""
    texts = describe(load_folder_backbone(folder), data.pictures)
    pairs = list(zip(texts, data.scenes, strict=True))
    return [
        Measure(
            "vision",
            "description of a picture: all of its first thing",
            fmean(names_all(*pair) for pair in pairs),
            0.90,
        ),
        Measure(
            "vision",
            "description of a picture: all of all things",
            fmean(names_everything(*pair) for pair in pairs),
        ),
    ]


@torch.no_grad()
def measure_scorer(folder: Path, data: HeldOut) -> list[Measure]:
    """Top-1 retrieval among :data:`RETRIEVAL`, mean of picture → caption and caption → picture.

    Of so many held-out records a few show the very same scene: either is right for the other.
    """
    model: Any
    model, transform, tokenizer = load_compact_clip(folder / "clip")
    pictures_PJ = model.encode_image(torch.stack([transform(picture) for picture in data.pictures]))
    texts_PJ = model.encode_text(tokenizer(list(data.captions)))
    scores = []
    for start in range(0, len(data.scenes), RETRIEVAL):
        part = slice(start, start + RETRIEVAL)
        similarity = F.normalize(pictures_PJ[part], dim=1) @ F.normalize(texts_PJ[part], dim=1).T
        shown = [(frozenset(scene.things), scene.background) for scene in data.scenes[part]]
        for dim in (0, 1):
            found = similarity.argmax(dim=dim).tolist()
            scores.append(fmean(shown[index] == wanted for index, wanted in zip(found, shown, strict=True)))
    return [Measure("scorer", f"retrieval: top-1 of {RETRIEVAL}", fmean(scores), 0.95)]


MEASURES: dict[str, Callable[[Path, HeldOut], list[Measure]]] = {
    "vae": measure_vae,
    "unet": measure_unet,
    "vision": measure_vision,
    "scorer": measure_scorer,
}
"""Part → its measures; the language model is measured through the backbone's descriptions."""
_LOADED = {
    "vae": ("sd",),
    "unet": ("sd",),
    "vision": ("llama", *EYES_FILES),
    "scorer": ("clip",),
}
"""Part → what its measures load from the folder."""


def evaluate(folder: Path, parts: Sequence[str], count: int, seed: int) -> Iterator[Measure]:
    """Measure the parts of a weights folder, one after another.

    Args:
        folder: in the layout of the shipped weights.
        parts: keys of :data:`MEASURES`.
        count: held-out pictures; the retrieval is the mean over groups of :data:`RETRIEVAL`.
        seed: decides the pictures.

    Raises:
        InputError: a file is missing, of any of the parts before the first is measured, or does not fit.
    """
    missing = [name for part in parts for name in _LOADED[part] if not (folder / name).exists()]
    if missing:
        lacking = ", ".join(dict.fromkeys(missing))
        raise InputError(
            f"--weights {folder}: holds no {lacking}; give a folder that pretrain wrote, or other --parts"
        )
    data = HeldOut.draw(count, seed)
    return (measure for part in parts for measure in MEASURES[part](folder, data))


def default_sampling() -> GenerationConfig:
    """Return the tiny preset's decoding settings."""
    return load_config(PROJECT_ROOT / "config" / "tiny.yaml", {}, {}).generation


def compare_all(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> list[Agreement]:
    """Compare each scene with its picture."""
    return [compare(scene, recognise(picture)) for scene, picture in zip(scenes, pictures, strict=True)]


def share_of_both(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> float:
    """Return how many pictures that should show two things are right in both, background aside: a share."""
    return fmean(
        shows_things(scene, recognise(picture, MOST_THINGS + 1))
        for scene, picture in zip(scenes, pictures, strict=True)
        if len(scene.things) == MOST_THINGS
    )


@torch.no_grad()
def reconstruct(diffusion: StableDiffusion, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode pictures to the means of their latents and decode those."""
    transform = output_transform(PICTURE_SIZE)
    pixels_P3SS = torch.stack([transform(picture) for picture in pictures])
    decoded: list[Image.Image] = []
    for part in pixels_P3SS.split(_BATCH):
        mean = diffusion.encode_pixels(part).chunk(2, dim=1)[0]
        decoded += diffusion.to_images(diffusion.decode(mean * diffusion.vae.config.scaling_factor))
    return decoded


def draw_captions(
    diffusion: StableDiffusion, captions: Sequence[str], settings: GenerationConfig
) -> list[Image.Image]:
    """Render captions, in the form that CC3M's reader gives them."""
    drawn: list[Image.Image] = []
    for start in range(0, len(captions), _BATCH):
        part = [clean_caption(text) for text in captions[start : start + _BATCH]]
        seeds = [sample_seed(settings.seed, start + place, "evaluation") for place in range(len(part))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn += diffusion.render_captions(part, settings, generators, PICTURE_SIZE)
    return drawn


@torch.no_grad()
def describe(backbone: LoadedBackbone, pictures: Sequence[Image.Image], prompt: str = DESCRIBE[0]) -> list[str]:
    """Return greedy descriptions of pictures, one prompt for all."""
    model, tokenizer = backbone.model, backbone.tokenizer
    transform = input_transform(PICTURE_SIZE)
    before, after = (tokenizer.encode(text) for text in prompt.split(INPUT_PICTURE))
    words = model.embedding_VH[[tokenizer.bos_id, *before, *after]]
    start_1TH, end_1TH = words[None].split([1 + len(before), len(after)], dim=1)
    texts: list[str] = []
    for start in range(0, len(pictures), _BATCH):
        pixels_P3SS = torch.stack([transform(picture) for picture in pictures[start : start + _BATCH]])
        features_PLH = model.encode_images(pixels_P3SS)
        around = (part.expand(len(features_PLH), -1, -1) for part in (start_1TH, end_1TH))
        embeds_PTH = torch.cat([next(around), features_PLH, next(around)], dim=1)
        ids_PT = model.language_model.generate(
            inputs_embeds=embeds_PTH,
            attention_mask=torch.ones(embeds_PTH.shape[:2], dtype=torch.long),
            max_new_tokens=_DESCRIPTION_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_id,
        )
        texts += [tokenizer.decode(ids).split(prompts.STOP)[0].strip() for ids in ids_PT.tolist()]
    return texts


def names_all(text: str, scene: Scene) -> bool:
    """Whether a text's first thing is one of the scene, in every attribute, on the right background."""
    return read_attributes(text) in _attributes(scene)


def names_everything(text: str, scene: Scene) -> bool:
    """Whether a text names the scene's things, in either order, and no other, in every attribute."""
    read = read_things(text)
    return len(read) == len(scene.things) and all(thing in read for thing in _attributes(scene))


def _attributes(scene: Scene) -> list[dict[str, str]]:
    return [{**vars(thing), "background": scene.background} for thing in scene.things]
