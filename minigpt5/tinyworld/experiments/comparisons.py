"""What is compared with what: the paper's comparisons as configuration values on ``config/tiny.yaml``.

Nothing heavy is imported here: the command line lists the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CAPTIONS, STORIES = "cc3m", "vist"
"""Which held-out data a comparison is measured on: stage 1 on captions, both stages on stories."""
SEEDS = 3
"""Training runs of each variant of the main comparisons; the others have one."""


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Dotted overrides: ``both`` of every run, ``stage2`` of the second stage alone (training and prediction),
    ``predicting`` of the prediction alone.
    """

    label: str
    both: Mapping[str, Any] = field(default_factory=dict)
    stage2: Mapping[str, Any] = field(default_factory=dict)
    predicting: Mapping[str, Any] = field(default_factory=dict)
    has_stage1: bool = True
    """Whether the second stage starts from a trained first one."""
    keeps_total_steps: bool = False
    """Without a first stage: train the second as long as both together."""
    line: str = ""
    """Of a comparison over numbers: which line of the plot this is a point of."""
    x: float | None = None
    """Of a comparison over numbers: the number."""


@dataclass(frozen=True)
class Comparison:
    """Variants that are measured alike."""

    name: str
    title: str
    data: str
    measures: tuple[str, ...]
    """Names of :data:`minigpt5.tinyworld.quality.MEANINGS`; the first is plotted."""
    variants: tuple[Variant, ...]
    seeds: int = 1
    axis: str = ""
    """Of a comparison over numbers: what the number is; empty draws bars."""


_PICTURE = ("shape_and_colour", "all_attributes")
_STORY = ("all_attributes", "shape_and_colour", "whole_picture", "text_consistent", "text_news", "modality")
_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5)


def _guidance() -> tuple[Variant, ...]:
    return tuple(
        Variant(
            f"{line}, scale {scale:g}",
            both={"loss.condition_dropout": dropout},
            predicting={"generation.guidance_scale": scale},
            line=line,
            x=scale,
        )
        for line, dropout in (("trained with it", 0.1), ("trained without", 0.0))
        for scale in _SCALES
    )


def _vokens() -> tuple[Variant, ...]:
    counts = (1, 2, 4, 8, 16)
    return tuple(Variant(f"{count}", both={"model.vokens.count": count}, x=float(count)) for count in counts)


def _context() -> tuple[Variant, ...]:
    labels = {"none": "no context", "last_text": "last text", "text": "all texts", "full": "texts and pictures"}
    return tuple(Variant(label, stage2={"data.context": value}) for value, label in labels.items())


def _mapper() -> tuple[Variant, ...]:
    depths = [
        Variant(f"{depth}+{depth} layers", both=dict.fromkeys((_ENCODER, _DECODER), depth)) for depth in (1, 2, 4)
    ]
    return (Variant("MLP only", both={"model.mapper.kind": "mlp"}), *depths)


_ENCODER, _DECODER = "model.mapper.encoder_layers", "model.mapper.decoder_layers"
_ALONE = {"model.mapper.stage2_trains": "whole", "training.learning_rate": 1e-3}
"""Of stage 2 without stage 1: a mapper that knows nothing wants a higher rate."""

COMPARISONS: dict[str, Comparison] = {
    comparison.name: comparison
    for comparison in (
        Comparison(
            "guidance", "Classifier-free guidance", CAPTIONS, _PICTURE, _guidance(), SEEDS, axis="guidance scale"
        ),
        Comparison(
            "caption_loss",
            "Caption loss",
            CAPTIONS,
            _PICTURE,
            (
                Variant("with (1)", both={"loss.caption_weight": 1.0}),
                Variant("with (0.1, as published)", both={"loss.caption_weight": 0.1}),
                Variant("without", both={"loss.caption_weight": 0.0}),
            ),
            SEEDS,
        ),
        Comparison(
            "diffusion_loss",
            "Diffusion loss",
            CAPTIONS,
            _PICTURE,
            (
                Variant("with (1.0)", both={"loss.image_weight": 1.0}),
                Variant("without", both={"loss.image_weight": 0.0}),
            ),
            SEEDS,
        ),
        Comparison("vokens", "Number of vokens", CAPTIONS, _PICTURE, _vokens(), SEEDS, axis="vokens a picture"),
        Comparison(
            "stages",
            "Two stages against stage 2 alone",
            STORIES,
            _STORY,
            (
                Variant("two stages"),
                Variant("stage 2 alone, rate 0.001", stage2=_ALONE, has_stage1=False),
                Variant(
                    "stage 2 alone, rate 0.001, as many steps in all",
                    stage2=_ALONE,
                    has_stage1=False,
                    keeps_total_steps=True,
                ),
            ),
            SEEDS,
        ),
        Comparison("context", "Story context", STORIES, _STORY, _context(), SEEDS),
        Comparison("mapper", "Mapper", CAPTIONS, _PICTURE, _mapper()),
        Comparison(
            "adapter",
            "What adapts the language model",
            STORIES,
            _STORY,
            tuple(
                Variant(label, stage2={"model.adapter.kind": value})
                for value, label in {"lora": "LoRA", "prefix": "prefix", "none": "nothing"}.items()
            ),
        ),
        Comparison(
            "min_snr",
            "Min-SNR weighting",
            CAPTIONS,
            _PICTURE,
            (
                Variant("with (gamma 5)", both={"loss.min_snr_gamma": 5.0}),
                Variant("without", both={"loss.min_snr_gamma": None}),
            ),
        ),
        Comparison(
            "label_loss",
            "Vokens that carry language loss",
            STORIES,
            ("modality", "all_attributes", "shape_and_colour", "text_consistent"),
            (
                Variant("first and last", both={"model.vokens.label_loss": "first_and_last"}),
                Variant("all", both={"model.vokens.label_loss": "all"}),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained on, how long, and measured: the defaults of the command line, in one place."""

    captions: int = 3000
    """Captioned pictures to train stage 1 on."""
    stories: int = 400
    """Stories of five pictures to train stage 2 on."""
    held_out: int = 150
    """Pictures wanted of every trained model."""
    steps: tuple[int, int] = (600, 400)
    """Optimizer steps of stage 1 and stage 2."""
    batch_size: int = 16
    stage2_rate: float = 3e-4
    """Learning rate of stage 2, where LoRA wants less than the rate of stage 1."""
    stage2_text_weight: float = 0.1
    """Weight of stage 2's language loss: at so low a rate it would learn little otherwise."""
