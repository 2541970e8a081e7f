"""Generating a reply for every sample of a test set, into a prediction store."""

from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from minigpt5.checkpoint import TENSOR_FILE
from minigpt5.config import GenerationConfig, ModelConfig, RunConfig
from minigpt5.data.types import Prompt, Reply, Sample
from minigpt5.images import open_picture, output_transform
from minigpt5.model import MiniGPT5
from minigpt5.predictions import Prediction, PredictionStore


def open_prompt(sample: Sample) -> Prompt:
    """Return the prompt of a sample with its pictures opened.

    Raises:
        InputError: a picture cannot be read (its file is named).
    """
    return Prompt(sample.id, sample.prompt, tuple(open_picture(path) for path in sample.input_images))


def describe_run(config: RunConfig, dataset: str, data_file: Path, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Return what the predictions depend on, as plain values for ``run.json``.

    Replies depend neither on the batch size nor on offloading or compiling, so a run may be continued with others.

    Args:
        config: the run.
        dataset: name of the data set the samples come from.
        data_file: the test data.
        checkpoints: flag → file, in loading order.
    """
    generation = TypeAdapter(GenerationConfig).dump_python(config.generation, mode="json")
    del generation["batch_size"], generation["compile"]
    model = TypeAdapter(ModelConfig).dump_python(config.model, mode="json")
    del model["diffusion"]["offload"]
    return {
        "dataset": dataset,
        "data_file": str(config.data.test),
        "data_sha256": _digest(data_file),
        "checkpoints": {flag: {"name": path.name, "sha256": _digest(path)} for flag, path in checkpoints.items()},
        "stage": config.stage.value,
        "tasks": config.data.tasks,
        "context": config.data.context,
        "generation": generation,
        "model": model,
    }


def predict_samples(
    model: MiniGPT5,
    samples: Mapping[int, Sample],
    store: PredictionStore,
    config: GenerationConfig,
    dataset: str,
) -> None:
    """Reply to every sample that the store does not hold yet, writing each as it comes.

    Args:
        model: on its device, with its checkpoint loaded.
        samples: the test samples of this process by their places in the test file.
        store: where predictions go; what it holds already is skipped.
        config: decoding settings; ``batch_size`` prompts are answered at once.
        dataset: recorded with every prediction.

    Raises:
        InputError: a picture cannot be read.
    """
    model.eval()
    waiting = [place for place, sample in samples.items() if sample.id not in store.done]
    progress = tqdm(total=len(samples), initial=len(samples) - len(waiting), desc="replies", unit="sample")
    with progress:
        for start in range(0, len(waiting), config.batch_size):
            places = waiting[start : start + config.batch_size]
            batch = [samples[place] for place in places]
            prompts = [open_prompt(sample) for sample in batch]
            replies = model.generate(prompts, config)
            baselines = _baselines(model, batch, config)
            side = model.config.diffusion.image_size
            for place, sample, prompt, reply in zip(places, batch, prompts, replies, strict=True):
                store.append(
                    _prediction(place, sample, reply, dataset),
                    images=reply.images,
                    target_images=wanted_pictures(sample, side),
                    baseline_image=baselines.get(sample.id),
                    input_images=[_shrink(picture, side) for picture in prompt.images],
                )
            progress.update(len(batch))


def wanted_pictures(sample: Sample, size: int) -> list[Image.Image]:
    """Return the sample's output pictures as the model was to make them: padded to a square and resized.

    Raises:
        InputError: a picture cannot be read.
    """
    transform = output_transform(size, normalize=False)
    return [to_pil_image(transform(open_picture(path))) for path in sample.output_images]


def _shrink(picture: Image.Image, side: int) -> Image.Image:
    """Return a prompt's picture as large as it is worth keeping: no score reads it, a page shows it."""
    small = picture.copy()
    small.thumbnail((side, side))
    return small


def _baselines(model: MiniGPT5, batch: list[Sample], config: GenerationConfig) -> dict[str, Image.Image]:
    """Return Stable Diffusion's own pictures of the captions, by sample id."""
    captions = {sample.id: sample.caption for sample in batch if sample.caption is not None}
    if not config.baseline_images or not captions:
        return {}
    pictures = model.render_captions(list(captions.values()), list(captions), config)
    return dict(zip(captions, pictures, strict=True))


def _prediction(place: int, sample: Sample, reply: Reply, dataset: str) -> Prediction:
    return Prediction(
        place=place,
        id=sample.id,
        dataset=dataset,
        task=sample.task.value,
        prompt=sample.prompt,
        text=reply.raw_text,
        target=sample.response,
        caption=sample.caption,
        description=sample.description,
    )


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a checkpoint folder's tensors."""
    with (path / TENSOR_FILE if path.is_dir() else path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
