"""Groups of predictions (VIST stories, MMDialog conversations) and the published per-story FID."""

import re
from collections.abc import Iterable, Sequence

from minigpt4.errors import InputError
from minigpt5.metrics.features import PictureFeatures
from minigpt5.metrics.image import frechet_distance
from minigpt5.predictions import Prediction

_ID = re.compile(r"(?P<group>.+)_(?P<step>-?\d+)(?:-(?P<task>[^_]*))?")


def split_id(sample_id: str) -> tuple[str, int, str]:
    """Split ``<story>_<step>-<task>`` into its parts; the task may be missing, the story may hold ``_`` and ``-``.

    Raises:
        InputError: the id has no step.
    """
    match = _ID.fullmatch(sample_id)
    if match is None:
        raise InputError(
            f"prediction {sample_id!r}: expected an id like 40470_0-gen (story_step-task); "
            "write predictions with train_eval.py, or give --dataset cc3m if there are no stories"
        )
    return match["group"], int(match["step"]), match["task"] or ""


def group_steps(predictions: Iterable[Prediction]) -> list[list[Prediction]]:
    """Return each story's predictions by step, one group per story and task, in order of appearance.

    Of several predictions of one step the last is kept, as published.
    """
    groups: dict[tuple[str, str], dict[int, Prediction]] = {}
    for prediction in predictions:
        story, step, task = split_id(prediction.id)
        groups.setdefault((story, task), {})[step] = prediction
    return [[steps[step] for step in sorted(steps)] for steps in groups.values()]


def story_distances(
    predictions: Sequence[Prediction], features: PictureFeatures
) -> tuple[list[float | None], list[float | None]]:
    """Return the published FID of every story of more than one step, and the same for the baseline.

    A story's wanted pictures are those of its steps with a generated picture. None where fewer than two steps
    have pictures.
    """
    distances, baselines = [], []
    for steps in group_steps(predictions):
        if len(steps) == 1:
            continue
        paired = [step for step in steps if step.images and step.target_images]
        real_ND = features.rows("fid", [step.target_images[0] for step in paired])
        made_ND = features.rows("fid", [step.images[0] for step in paired])
        distances.append(frechet_distance(real_ND, made_ND))
        names = [step.baseline_image for step in paired if step.baseline_image]
        if names:
            baselines.append(frechet_distance(real_ND, features.rows("fid", names)))
    return distances, baselines
