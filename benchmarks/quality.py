"""What a faster scheduler does to pictures: the tiny world's recogniser on Stable Diffusion's own pictures.

Only the sampler differs between the rows, so captions go straight to the text encoder.
"""

from dataclasses import replace
from statistics import fmean
from typing import Literal

from benchmarks import worlds
from benchmarks.harness import Report
from minigpt5.config import Stage
from minigpt5.model import MiniGPT5
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.pretraining.evaluate import default_sampling
from minigpt5.tinyworld.recogniser import compare, recognise
from minigpt5.tinyworld.scenes import Scene, random_scene, seeded

PICTURES = 96
BATCH_SIZE = 32
DEFAULT_STEPS = (50, 20)
Scheduler = Literal["default", "dpm++"]


def measure_schedulers(report: Report, faster_steps: tuple[int, ...]) -> None:
    """Append the share of wanted attributes that pictures show, by scheduler and steps."""
    settings = report.settings
    model = worlds.open_world("tiny", Stage.ALIGNMENT, settings.device, settings.seed).model
    wanted = _wanted(settings.seed)
    published, usual = (_accuracy(model, wanted, "default", steps, settings.seed) for steps in DEFAULT_STEPS)
    name = "attribute accuracy, default {} steps"
    report.add(name.format(DEFAULT_STEPS[1]), "share", published, usual, higher_is_better=True)
    for steps in faster_steps:
        found = _accuracy(model, wanted, "dpm++", steps, settings.seed)
        name = f"attribute accuracy, DPM-Solver++ {steps} steps"
        note = f"reference: default {DEFAULT_STEPS[0]} steps"
        report.add(name, "share", published, found, higher_is_better=True, note=note)


def _wanted(seed: int) -> list[tuple[str, Scene, str]]:
    """Return ids, scenes and captions."""
    found = []
    for index in range(PICTURES):
        rng = seeded(seed, "test", "schedulers", index)
        scene = random_scene(rng, "test")
        found.append((f"scene_{index}", scene, caption(scene, rng)))
    return found


def _accuracy(
    model: MiniGPT5, wanted: list[tuple[str, Scene, str]], scheduler: Scheduler, steps: int, seed: int
) -> float:
    config = replace(default_sampling(), scheduler=scheduler, num_inference_steps=steps, seed=seed)
    shares = []
    for start in range(0, len(wanted), BATCH_SIZE):
        chunk = wanted[start : start + BATCH_SIZE]
        pictures = model.render_captions([text for _, _, text in chunk], [name for name, _, _ in chunk], config)
        for (_, scene, _), picture in zip(chunk, pictures, strict=True):
            shares.append(fmean(compare(scene, recognise(picture)).as_dict().values()))
    return fmean(shares)
