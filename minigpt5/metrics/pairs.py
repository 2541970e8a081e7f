"""Scores of single predictions: picture against picture, picture against text, text against text.

Each function returns one row of values per prediction, None where a value is not defined.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from torch import Tensor

from minigpt5.metrics.features import Networks, PictureFeatures
from minigpt5.metrics.scores import SampleValues
from minigpt5.metrics.text import bleu, clean_text, meteor, rouge_l
from minigpt5.predictions import Prediction

PICTURE_NAMES = (
    "clip_similarity",
    "clip_text_similarity",
    "baseline_clip_similarity",
    "baseline_clip_text_similarity",
)
TEXT_NAMES = ("bleu_1", "bleu_2", "rouge_l", "meteor", "sentence_similarity")


def picture_values(
    predictions: Sequence[Prediction], features: PictureFeatures, networks: Networks
) -> list[SampleValues]:
    """Return CLIP similarities of each prediction's pictures.

    The i-th generated picture is compared with the i-th wanted one, every generated picture with the text. The
    ``published_`` values take the first picture and the raw wanted text, vokens and ``###`` included.
    """
    illustrated = [prediction for prediction in predictions if prediction.images or prediction.baseline_image]
    texts = {wanted_text(prediction) for prediction in illustrated} | {each.target for each in illustrated}
    text_rows = networks.clip.texts.table(texts) if texts else {}
    return [_picture_row(prediction, features, text_rows) for prediction in predictions]


def wanted_text(prediction: Prediction) -> str:
    """Return the words a generated picture should show: caption, else description, else text without vokens."""
    words = (prediction.caption, prediction.description, prediction.target)
    return next((text for text in map(clean_text, (word or "" for word in words)) if text), "")


def _picture_row(prediction: Prediction, features: PictureFeatures, texts: Mapping[str, Tensor]) -> SampleValues:
    made = [features.row("clip", name) for name in prediction.images]
    wanted = [features.row("clip", name) for name in prediction.target_images]
    baseline = [features.row("clip", prediction.baseline_image)] if prediction.baseline_image else []
    words = wanted_text(prediction)
    text = [texts[words]] if words and (made or baseline) else []
    raw = [texts[prediction.target]] if made else []
    # As published, the baseline counts only beside a generated picture.
    published_baseline = baseline if made else []
    return {
        "clip_similarity": _mean_similarity(zip(made, wanted, strict=False)),
        "clip_text_similarity": _mean_similarity((row, one) for row in made for one in text),
        "baseline_clip_similarity": _mean_similarity(zip(baseline, wanted, strict=False)),
        "baseline_clip_text_similarity": _mean_similarity(zip(baseline, text, strict=False)),
        "published_clip_similarity": _mean_similarity(zip(made[:1], wanted, strict=False)),
        "published_clip_text_similarity": _mean_similarity(zip(made, raw, strict=False)),
        "published_baseline_clip_similarity": _mean_similarity(zip(published_baseline, wanted, strict=False)),
        "published_baseline_clip_text_similarity": _mean_similarity(zip(published_baseline, raw, strict=False)),
    }


def _mean_similarity(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    similarities = [float(first @ second) for first, second in pairs]
    return fmean(similarities) if similarities else None


def text_values(predictions: Sequence[Prediction], sentences: Mapping[str, Tensor]) -> list[SampleValues]:
    """Return text scores of each prediction; 0 for a reply without text where text is wanted.

    Args:
        predictions: what to score; those that want no text get None throughout.
        sentences: unit vectors of every cleaned text (see :func:`clean_text`).
    """
    rows: list[SampleValues] = []
    for prediction in predictions:
        made, wanted = clean_text(prediction.text), clean_text(prediction.target)
        if not wanted:
            values: list[float | None] = [None] * len(TEXT_NAMES)
        elif not made:
            values = [0.0] * len(TEXT_NAMES)
        else:
            similarity = float(sentences[made] @ sentences[wanted])
            values = [*bleu(made, wanted), rouge_l(made, wanted), meteor(made, wanted), similarity]
        rows.append(dict(zip(TEXT_NAMES, values, strict=True)))
    return rows
