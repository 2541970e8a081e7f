"""Replies: decoding, pictures, whole replies, and what a faster scheduler costs in quality."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from PIL import Image

from benchmarks import limits, quality, reference, worlds
from benchmarks.harness import MEBIBYTE, Phases, Report, Settings, alternate, in_child, peak_bytes, timed
from minigpt5.compilation import cpp_compiler
from minigpt5.config import GenerationConfig, Stage
from minigpt5.generation import sample_seed

BATCH_SIZE = 8
NEW_TOKENS = 32
STEPS = 20
STATE_TOLERANCE = {"cpu": 1e-3, "cuda": 0.1}
"""Largest difference of a state that a token is chosen from, relative to its norm. In bfloat16, on a CPU, 0.02 was
seen of 32 layers."""
PIXEL_TOLERANCE = {"cpu": 2, "cuda": 64}
"""Largest difference of a picture's 8-bit values."""
FEWER_STEPS = (20, 10, 8)
"""Steps of DPM-Solver++ that are timed."""
FASTER = (20, 15, 10, 8, 6)
"""Steps of DPM-Solver++ whose quality is compared with the default scheduler's."""


def measure(settings: Settings) -> Report:
    """Measure the reference at batch 1 against ours at batch 8, then faster schedulers."""
    report = Report(settings)
    paths = _Paths(settings)
    report.equal.append(paths.check_equal())
    compiles = cpp_compiler() is not None
    if compiles:
        try:
            report.equal.append(paths.check_compiled())
        except RuntimeError as error:  # on a GPU, a C compiler and Python's headers are needed besides
            print(f"not compiled, so not measured: {str(error).splitlines()[0]}", file=sys.stderr)
            compiles = False
    functions: dict[str, Callable[[], Phases]] = {
        "decode_reference": paths.decode_reference,
        "decode": paths.decode,
        "decode_1": paths.decode_one,
        **({"decode_1_compiled": partial(paths.decode_one, compiled=True)} if compiles else {}),
        "pictures_reference": paths.pictures_reference,
        "pictures": paths.pictures,
        **{f"dpm_{steps}": partial(paths.pictures, "dpm++", steps) for steps in FEWER_STEPS},
    }
    seconds = {name: found["total"] for name, found in alternate(functions, settings.repeats).items()}
    _add_rows(report, seconds)
    limit = limits.bandwidth(settings.device) / paths.bytes_per_token()
    note = f"of {limit:.4g} tokens/s, at which the weights are read"
    for label, name in {
        "decoding, batch 1": "decode_1",
        "decoding, batch 1, compiled": "decode_1_compiled",
    }.items():
        if name in seconds:
            share = NEW_TOKENS / seconds[name] / limit
            report.add(f"{label}, of the bandwidth limit", "share", None, share, higher_is_better=True, note=note)
    del paths, functions  # the children's models take their place
    memory = {path: in_child(settings, path)["peak"] / MEBIBYTE for path in ("reference", "ours")}
    report.add(
        "peak memory", "MiB", memory["reference"], memory["ours"], note=f"batch 1 against batch {BATCH_SIZE}"
    )
    if settings.preset == "tiny":
        quality.measure_schedulers(report, FASTER)
    return report


def _add_rows(report: Report, seconds: dict[str, float]) -> None:
    more = {"higher_is_better": True}
    tokens = {"reference": NEW_TOKENS / seconds["decode_reference"], "1": NEW_TOKENS / seconds["decode_1"]}
    tokens["8"] = BATCH_SIZE * NEW_TOKENS / seconds["decode"]
    report.add("decoding, batch 1", "tokens/s", tokens["reference"], tokens["1"], **more)
    if "decode_1_compiled" in seconds:
        compiled = NEW_TOKENS / seconds["decode_1_compiled"]
        report.add("decoding, batch 1, compiled", "tokens/s", tokens["reference"], compiled, **more)
    report.add(f"decoding, batch {BATCH_SIZE}", "tokens/s", tokens["reference"], tokens["8"], **more)
    published = 1 / seconds["pictures_reference"]
    samplers = {f"{STEPS} steps": "pictures", **{f"DPM-Solver++ {n} steps": f"dpm_{n}" for n in FEWER_STEPS}}
    for label, name in samplers.items():
        report.add(f"pictures, {label}", "1/s", published, BATCH_SIZE / seconds[name], **more)
    published = 1 / (seconds["decode_reference"] + seconds["pictures_reference"])
    for label, name in samplers.items():
        rate = BATCH_SIZE / (seconds["decode"] + seconds[name])
        report.add(f"whole replies, {label}", "1/s", published, rate, **more)


def measure_alone(settings: Settings, path: str) -> dict[str, float]:
    """Reply once with one path and return the peak memory of the process."""
    paths = _Paths(settings, only=path)
    if path == "reference":
        paths.published.generate(paths.requests[0], paths.config)
    else:
        paths.model.generate(paths.requests, paths.config)
    return {"peak": peak_bytes(settings.device)}


class _Paths:
    """The reference's and our replies to the same prompts."""

    def __init__(self, settings: Settings, only: str | None = None) -> None:
        self.settings = settings
        world = worlds.open_world(settings.preset, Stage.ALIGNMENT, settings.device, settings.seed)
        self.model = world.model
        self.requests = worlds.prompts(BATCH_SIZE, settings.seed)
        self.config = GenerationConfig(
            images="force", max_new_tokens=NEW_TOKENS, num_inference_steps=STEPS, seed=settings.seed
        )
        # Every reply runs to its full length, so that both paths make the same number of tokens.
        self.model.stops = []
        if only in (None, "reference"):
            self.published = reference.ReferenceModel(self.model, take=only is not None)

    def bytes_per_token(self) -> int:
        """Return what one step of decoding reads at least: the layers and the output head."""
        llama = self.model.backbone.language_model
        read = [*llama.model.layers.parameters(), *llama.model.norm.parameters(), self.model.backbone.head_VH]
        return sum(parameter.nbytes for parameter in read)

    def check_equal(self) -> str:
        """Compare every reply: its tokens on a CPU, the states along our tokens, the pictures from our states.

        In bfloat16 on a GPU a batch rounds otherwise than a prompt alone, and one draw that falls otherwise
        changes all that follow.
        """
        kind = self.settings.device.type
        ours = self.model.decode_prompts(self.requests, self.config, trace=True)
        if (shortest := min(len(one.token_ids) for one in ours)) < NEW_TOKENS:
            raise AssertionError(
                f"a reply ended by itself after {shortest} tokens; rates count {NEW_TOKENS} of each"
            )
        self.states = torch.stack([one.voken_states[0] for one in ours])
        pictures = self.model.render(self.states, self._seeds(), self.config)
        same, off, worst = 0, 0.0, 0
        for request, one, states, picture in zip(self.requests, ours, self.states, pictures, strict=True):
            tokens, _, _ = self.published.decode(request, self.config)
            same += tokens == one.token_ids
            if kind == "cpu" and tokens != one.token_ids:
                raise AssertionError(f"{request.id}: tokens differ: {tokens} and {one.token_ids}")
            _, _, steps = self.published.decode(request, self.config, one.token_ids)
            theirs, mine = torch.stack(steps).float(), torch.stack(one.step_states).float()
            off = max(off, float(((mine - theirs).norm(dim=1) / theirs.norm(dim=1)).max()))
            worst = max(worst, _difference(self.published.render(states, request, 0, self.config), picture))
        if not off <= STATE_TOLERANCE[kind]:
            raise AssertionError(f"states along the same tokens differ by {off:.1%}")
        if worst > PIXEL_TOLERANCE[kind]:
            raise AssertionError(f"pictures from the same states differ by up to {worst} of 255")
        return (
            f"tokens of {same} of {BATCH_SIZE} replies; states along the same tokens (largest relative difference "
            f"{off:.1e}); pictures from the same states within {worst} of 255"
        )

    def check_compiled(self) -> str:
        """Compare the first reply's tokens with those of compiled steps, which are compiled by that."""
        config = dataclasses.replace(self.config, compile=True)
        (plain,), (compiled,) = (
            self.model.decode_prompts(self.requests[:1], each) for each in (self.config, config)
        )
        if plain.token_ids != compiled.token_ids:
            if self.settings.device.type == "cpu":
                raise AssertionError(f"compiled steps give other tokens: {plain.token_ids}, {compiled.token_ids}")
            return "compiled steps give other tokens for the first reply"
        return f"{len(plain.token_ids)} tokens of compiled steps"

    def _seeds(self) -> list[int]:
        return [sample_seed(self.config.seed, request.id, "picture", 0) for request in self.requests]

    def decode_reference(self) -> Phases:
        """Decode the first prompt alone."""
        return timed(lambda: self.published.decode(self.requests[0], self.config), self.settings.device)

    def decode(self) -> Phases:
        """Decode all prompts in one batch."""
        return timed(lambda: self.model.decode_prompts(self.requests, self.config), self.settings.device)

    def decode_one(self, *, compiled: bool = False) -> Phases:
        """Decode the first prompt alone, our way."""
        config = dataclasses.replace(self.config, compile=compiled)
        return timed(lambda: self.model.decode_prompts(self.requests[:1], config), self.settings.device)

    def pictures_reference(self) -> Phases:
        """Render one picture alone."""
        return timed(
            lambda: self.published.render(self.states[0], self.requests[0], 0, self.config), self.settings.device
        )

    def pictures(self, scheduler: Literal["default", "dpm++"] = "default", steps: int = STEPS) -> Phases:
        """Render every reply's picture in one diffusion batch."""
        config = dataclasses.replace(self.config, scheduler=scheduler, num_inference_steps=steps)
        return timed(lambda: self.model.render(self.states, self._seeds(), config), self.settings.device)


def _difference(one: Image.Image, other: Image.Image) -> int:
    """Return by how much the 8-bit values of two pictures differ at most."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())
