"""Small prediction stores to score."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from minigpt5.predictions import Prediction, PredictionStore, read_predictions

MODELS = Path(__file__).parents[2] / "parity" / "fixtures" / "data" / "metrics" / "models"


def picture(seed: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    image = Image.new("RGB", size, ((37 * seed) % 256, (91 * seed) % 256, (53 * seed) % 256))
    left = 3 * (seed % 9)
    ImageDraw.Draw(image).rectangle((left, left, left + 14, left + 10), fill=(255, (29 * seed) % 256, 0))
    return image


class StoreBuilder:
    """Write predictions with pictures made from numbers."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder = folder
        self.dataset = dataset
        self.store = PredictionStore(folder, {"dataset": dataset})

    def add(
        self,
        sample_id: str,
        made: Sequence[Image.Image] = (),
        wanted: Sequence[Image.Image] = (),
        baseline: Image.Image | None = None,
        text: str = "",
        target: str = "",
        caption: str | None = None,
    ) -> None:
        prediction = Prediction(sample_id, self.dataset, "generation", "a prompt", text, target, caption)
        self.store.append(prediction, images=made, target_images=wanted, baseline_image=baseline)

    def read(self) -> list[Prediction]:
        return read_predictions(self.folder)
