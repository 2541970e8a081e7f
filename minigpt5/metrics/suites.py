"""One suite of scores per data set: predictions → :class:`Scores`.

Each suite gives this project's figures, with the number of predictions behind each, and the published
evaluation's figures under their published names. docs/metrics.md explains them all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.errors import InputError
from minigpt5.config import MetricsConfig
from minigpt5.metrics import dialogue
from minigpt5.metrics.features import Kind, Networks, PictureFeatures
from minigpt5.metrics.image import (
    PictureEncoder,
    encode_files,
    frechet_distance,
    inception_score,
    published_inception_scores,
)
from minigpt5.metrics.local import LOCAL_PREFIX
from minigpt5.metrics.pairs import PICTURE_NAMES, TEXT_NAMES, picture_values, text_values
from minigpt5.metrics.scores import (
    Coverage,
    SampleValues,
    Score,
    Scores,
    column,
    mean_score,
    measure_coverage,
)
from minigpt5.metrics.stories import story_distances
from minigpt5.metrics.text import clean_text, meteor_variant
from minigpt5.predictions import Prediction

_PUBLISHED_CLIP = {
    "overall_clip_similarity": "published_clip_similarity",
    "overall_clip_t_similarity": "published_clip_text_similarity",
    "overall_basline_clip_similarity": "published_baseline_clip_similarity",
    "overall_basline_clip_t_similarity": "published_baseline_clip_text_similarity",
}


def score(
    dataset: str, predictions: Sequence[Prediction], folder: Path, config: MetricsConfig, real_images: Path
) -> Scores:
    """Score predictions with the suite of their data set.

    Args:
        dataset: ``cc3m``, ``vist`` or ``mmdialog``.
        predictions: what to score, in order (the published Inception Score depends on it).
        folder: the prediction store; picture names are relative to it.
        config: feature networks.
        real_images: CC3M's folder, whose ``val`` pictures are the real set of CC3M's FID.

    Raises:
        InputError: no such suite, nothing to score, an unreadable picture, an id without its story or turn, or
            a network that cannot be had.
    """
    if dataset not in SUITES:
        raise InputError(f"--dataset {dataset}: no scores for it; choose from {', '.join(SUITES)}")
    if not predictions:
        raise InputError(f"{folder}: no predictions to score; run train_eval.py with --test_data_path first")
    scores = SUITES[dataset](predictions, folder, config, real_images)
    local = sorted(use for use, label in scores.networks.items() if LOCAL_PREFIX in label)
    if local:
        scores.notes.append(
            f"Scored with small local networks ({', '.join(local)}): compare these figures with each other only, "
            "not with published ones."
        )
    return scores


def find_real_images(folder: Path) -> list[Path]:
    """Return CC3M's validation pictures, sorted: ``val/*/*.jpg`` as published, else ``val/*.jpg``."""
    return sorted(folder.glob("val/*/*.jpg")) or sorted(folder.glob("val/*.jpg"))


def _score_cc3m(
    predictions: Sequence[Prediction], folder: Path, config: MetricsConfig, real_images: Path
) -> Scores:
    networks = Networks(config, default_clip="ViT-L-14")
    features = PictureFeatures.extract(folder, _wanted(predictions, fid_targets=False), networks)
    samples = picture_values(predictions, features, networks)
    coverage = measure_coverage(predictions, wants_text=False)
    made, baselines = _made(predictions), _baselines(predictions)
    real = find_real_images(real_images)
    notes = [] if real else [f"No FID: {real_images} holds no val/*/*.jpg nor val/*.jpg; set CC3M_FOLDER."]
    real_ND = encode_files(real, networks.fid) if real and (made or baselines) else torch.empty(0, 0)
    if 0 < len(real_ND) < real_ND.shape[1]:
        notes.append(
            f"FID against {len(real)} pictures of {real_images} (CC3M_FOLDER), fewer than the {real_ND.shape[1]} "
            "features of its network: compare it with no published one."
        )
    first, first_baselines = _published_pictures(predictions)
    inception, baseline_inception = published_inception_scores(
        features.rows("inception", first),
        features.rows("inception", first_baselines),
        networks=_published_order(networks, first),
    )
    scores = {
        **_picture_scores(samples, features, made, baselines, coverage),
        **_fid_scores(real_ND, features, made, baselines),
        "published_inception_score": Score(inception, len(first), len(first), "pictures"),
    }
    published = {
        **_published_clip(samples),
        "overall_inception_score": inception,
        "overall_basline_inception_score": baseline_inception,
        "overall_fid_score": frechet_distance(real_ND, features.rows("fid", first)),
        "overall_basline_fid_score": frechet_distance(real_ND, features.rows("fid", first_baselines)),
    }
    return Scores("cc3m", scores, published, coverage, networks.labels, samples, notes)


def _score_vist(predictions: Sequence[Prediction], folder: Path, config: MetricsConfig, _: Path) -> Scores:
    networks = Networks(config, default_clip="ViT-L-14")
    has_text = any(clean_text(prediction.target) for prediction in predictions)
    if has_text:
        networks.require("sentences")
    features = PictureFeatures.extract(folder, _wanted(predictions, fid_targets=True), networks)
    samples = picture_values(predictions, features, networks)
    coverage = measure_coverage(predictions)
    made, baselines = _made(predictions), _baselines(predictions)
    targets_ND = features.rows("fid", [name for prediction in predictions for name in prediction.target_images])
    stories, baseline_stories = story_distances(predictions, features)
    first, first_baselines = _published_pictures(predictions)
    # The published evaluation computes the baseline's score first, and both draw from one generator.
    baseline_inception, inception = published_inception_scores(
        features.rows("inception", first_baselines),
        features.rows("inception", first),
        networks=_published_order(networks, first),
    )
    scores = {
        **_picture_scores(samples, features, made, baselines, coverage),
        **_fid_scores(targets_ND, features, made, baselines),
        "published_story_fid": mean_score(stories, "stories"),
        "published_baseline_story_fid": mean_score(baseline_stories, "stories"),
        "published_inception_score": Score(inception, len(first), len(first), "pictures"),
    }
    if has_text:
        sentences = networks.sentences.table(_clean_texts(predictions))
        for sample, words in zip(samples, text_values(predictions, sentences), strict=True):
            sample |= words
        scores |= _text_scores(samples, coverage)
        networks.labels["meteor"] = meteor_variant()
    paired = [each.target_images[0] for each in predictions if each.images and each.target_images]
    paired_ND = features.rows("fid", paired)
    published = {
        **_published_clip(samples),
        "overall_fid_score": scores["published_story_fid"].value,
        "overall_basline_fid_score": scores["published_baseline_story_fid"].value,
        "overall_instance_inception_score": inception,
        "overall_instance_basline_inception_score": baseline_inception,
        "overall_instance_fid_score": frechet_distance(paired_ND, features.rows("fid", first)),
        "overall_instance_basline_fid_score": frechet_distance(paired_ND, features.rows("fid", first_baselines)),
    }
    return Scores("vist", scores, published, coverage, networks.labels, samples)


def _score_mmdialog(predictions: Sequence[Prediction], folder: Path, config: MetricsConfig, _: Path) -> Scores:
    networks = Networks(config, default_clip="ViT-B-32")
    coverage = measure_coverage(predictions)
    made = _made(predictions)
    networks.require("clip", "sentences")
    wanted = _wanted(predictions, fid_targets=False)
    features = PictureFeatures.extract(folder, {"clip": wanted["clip"], "inception": made}, networks)
    samples = picture_values(predictions, features, networks)
    texts = dialogue.element_texts(predictions)
    clip_texts = networks.clip.texts.table(texts)
    sentences = networks.sentences.table(texts | _clean_texts(predictions))
    turns = dialogue.published_turns(predictions, features, clip_texts, sentences)
    relevance = dialogue.relevance_values(predictions, features, clip_texts)
    rows = zip(samples, text_values(predictions, sentences), turns, relevance, strict=True)
    for sample, words, turn, value in rows:
        sample |= words | dialogue.published_sample_values(turn) | {"mm_relevance": value}
    networks.labels["meteor"] = meteor_variant()
    logits_NC = features.rows("inception", made)
    first = [prediction.images[0] for prediction in predictions if prediction.images]
    built = [networks.inception] if first else []
    (inception,) = published_inception_scores(features.rows("inception", first), networks=built)
    dialogue_scores = dialogue.published_scores(predictions, turns)
    scores = {
        **_text_scores(samples, coverage),
        "mm_relevance": mean_score(column(samples, "mm_relevance")),
        "clip_similarity": mean_score(column(samples, "clip_similarity"), total=coverage.concerns_images),
        "inception_score": Score(inception_score(logits_NC), len(made), len(made), "pictures"),
        **dialogue_scores,
        "published_inception_score": Score(inception, len(first), len(first), "pictures"),
    }
    published = {
        **{name: dialogue_scores[own].value for name, own in dialogue.DIALOGUE_NAMES.items()},
        "overall_instance_inception_score": inception,
    }
    return Scores("mmdialog", scores, published, coverage, networks.labels, samples)


def _wanted(predictions: Sequence[Prediction], *, fid_targets: bool) -> dict[Kind, list[str]]:
    """Return which pictures need which features."""
    made = _made(predictions) + _baselines(predictions)
    targets = [name for prediction in predictions for name in prediction.target_images]
    return {"clip": made + targets, "fid": made + (targets if fid_targets else []), "inception": made}


def _made(predictions: Sequence[Prediction]) -> list[str]:
    return [name for prediction in predictions for name in prediction.images]


def _baselines(predictions: Sequence[Prediction]) -> list[str]:
    return [prediction.baseline_image for prediction in predictions if prediction.baseline_image]


def _published_pictures(predictions: Sequence[Prediction]) -> tuple[list[str], list[str]]:
    """Return each reply's first picture, and the baselines of the replies that have a picture."""
    illustrated = [prediction for prediction in predictions if prediction.images]
    return [prediction.images[0] for prediction in illustrated], _baselines(illustrated)


def _published_order(networks: Networks, made: Sequence[str]) -> list[PictureEncoder]:
    """Return the networks the published evaluation of CC3M and VIST builds; none is loaded without pictures."""
    return [networks.inception, networks.inception, networks.fid] if made else []


def _clean_texts(predictions: Sequence[Prediction]) -> set[str]:
    return {clean_text(text) for each in predictions for text in (each.text, each.target)} - {""}


def _picture_scores(
    samples: Sequence[SampleValues],
    features: PictureFeatures,
    made: list[str],
    baselines: list[str],
    coverage: Coverage,
) -> dict[str, Score]:
    """Return the scores that need no reference set, of the replies and of the baseline."""
    total = coverage.concerns_images
    scores = {name: mean_score(column(samples, name), total=total) for name in PICTURE_NAMES}
    for prefix, names in (("", made), ("baseline_", baselines)):
        value = inception_score(features.rows("inception", names))
        scores[f"{prefix}inception_score"] = Score(value, len(names), len(names), "pictures")
    return scores


def _fid_scores(
    real_ND: Tensor, features: PictureFeatures, made: list[str], baselines: list[str]
) -> dict[str, Score]:
    unit = f"pictures against {len(real_ND)} real ones"
    scores = {}
    for prefix, names in (("", made), ("baseline_", baselines)):
        value = frechet_distance(real_ND, features.rows("fid", names))
        scores[f"{prefix}fid"] = Score(value, len(names), len(names), unit)
    return scores


def _text_scores(samples: Sequence[SampleValues], coverage: Coverage) -> dict[str, Score]:
    return {name: mean_score(column(samples, name), total=coverage.wanted_texts) for name in TEXT_NAMES}


def _published_clip(samples: Sequence[SampleValues]) -> dict[str, float | None]:
    return {name: mean_score(column(samples, own)).value for name, own in _PUBLISHED_CLIP.items()}


SUITES: dict[str, Callable[[Sequence[Prediction], Path, MetricsConfig, Path], Scores]] = {
    "cc3m": _score_cc3m,
    "vist": _score_vist,
    "mmdialog": _score_mmdialog,
}
