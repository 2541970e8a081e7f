"""Picture constants, padding and transforms.

Shapes: H height, W width in pixels; 3 is RGB.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from minigpt4.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHITE = (255, 255, 255)

UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
"""What Pillow raises for a file it cannot decode: a SyntaxError for PNG chunks, a RuntimeError for AVIF."""


def open_picture(path: Path) -> Image.Image:
    """Return a decoded RGB picture. As published, an EXIF rotation is not applied.

    Raises:
        InputError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


def expand2square(picture: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Pad the shorter side on both ends to a square; an odd pixel goes to the right or bottom."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new(picture.mode, (side, side), background)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


@dataclass(frozen=True)
class PictureTransform:
    """An RGB picture → ``[3, size, size]`` float32."""

    size: int
    """Side in pixels."""
    square: bool
    """Pad to a white square first, so that the centre crop loses nothing."""
    mean: tuple[float, ...] | None
    """Per channel, or one value for all; None leaves values in [0, 1]."""
    std: tuple[float, ...] | None

    def __call__(self, picture: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """Transform one picture; with a generator it is mirrored half of the time."""
        if self.square:
            picture = expand2square(picture)
        picture = F.resize(picture, [self.size], interpolation=InterpolationMode.BILINEAR)
        picture = F.center_crop(picture, [self.size])
        if generator is not None and torch.rand((), generator=generator) < 0.5:
            picture = F.hflip(picture)
        pixels_3HW = F.to_tensor(picture)
        if self.mean is None or self.std is None:
            return pixels_3HW
        return F.normalize(pixels_3HW, list(self.mean), list(self.std))

    @property
    def key(self) -> str:
        """A line that names everything the transform does, for caches of what was computed from it."""
        padding = "white square, " if self.square else ""
        scale = "unit range" if self.mean is None else f"mean {list(self.mean)} std {list(self.std or ())}"
        return f"{padding}bilinear {self.size}, centre crop, {scale}"


def input_transform(size: int) -> PictureTransform:
    """Return the vision encoder's transform. As published, input pictures are cropped, not padded."""
    return PictureTransform(size, square=False, mean=CLIP_MEAN, std=CLIP_STD)


def output_transform(size: int, *, normalize: bool = True) -> PictureTransform:
    """Return the transform of wanted pictures.

    Args:
        size: side in pixels.
        normalize: scale to [-1, 1] as the VAE expects (training, validation); the published test reader
            keeps [0, 1].
    """
    return PictureTransform(
        size, square=True, mean=(0.5,) if normalize else None, std=(0.5,) if normalize else None
    )
