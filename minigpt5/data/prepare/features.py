"""VAE moments of a CC3M table's pictures, computed once and kept in a feature folder."""

import json
import logging
from pathlib import Path

import torch

from minigpt4.errors import InputError
from minigpt5.config import RunConfig
from minigpt5.data.cc3m import read_cc3m
from minigpt5.data.feature_cache import MANIFEST, feature_path, read_manifest, split_of
from minigpt5.data.index import ReadOptions
from minigpt5.data.pictures import PictureChecker
from minigpt5.data.readers import report_problems
from minigpt5.data.types import Problem, Split
from minigpt5.devices import open_device
from minigpt5.diffusion import load_vae
from minigpt5.images import PictureTransform, open_picture, output_transform

logger = logging.getLogger(__name__)

_CHECKED_AT_ONCE = 4096


def write_features(config: RunConfig, table: Path, out: Path, *, batch_size: int, device: str) -> int:
    """Write ``<out>/<train|val>/<name>_output.pt`` for every picture of a table, and the manifest.

    Pictures that have a file already are skipped, so an interrupted run can be repeated.

    Args:
        config: Stable Diffusion folder, picture size and data folder.
        table: CC3M file, relative to the data folder.
        out: feature folder.
        batch_size: pictures encoded at once.
        device: torch device, or ``auto``.

    Returns:
        Number of pictures encoded now.

    Raises:
        InputError: no batch, no such device, no Stable Diffusion weights, the folder holds features of another
            transform, or two pictures would have the same file.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size}: give at least 1")
    place = open_device(device, "--device")
    diffusion = config.model.diffusion
    if diffusion.weights is None:
        raise InputError("model.diffusion.weights: name a Stable Diffusion folder to encode pictures with")
    transform = output_transform(diffusion.image_size)
    vae = load_vae(diffusion.weights).to(place).eval()
    _claim(out, transform, diffusion.weights)
    todo = _pictures(config, table, out)
    for start in range(0, len(todo), batch_size):
        group = todo[start : start + batch_size]
        pixels_O3HW = torch.stack([transform(open_picture(picture)) for picture, _ in group])
        with torch.inference_mode():
            moments_OCHW = vae.encode(pixels_O3HW.to(place)).latent_dist.parameters
        for (_, path), moments in zip(group, moments_OCHW.bfloat16().cpu(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            # A kill while writing must not leave half a file. Cloned, as torch.save would write the whole batch's
            # storage for each of its rows.
            partial = path.with_suffix(".partial")
            torch.save(moments.clone(), partial)
            partial.replace(path)
        logger.info("%d of %d pictures encoded", start + len(group), len(todo))
    return len(todo)


def _claim(out: Path, transform: PictureTransform, vae: str) -> None:
    """Write the manifest, or make sure that the one there is of the same transform and VAE."""
    manifest = {"transform": transform.key, "size": transform.size, "vae": vae}
    known = read_manifest(out)
    if known is not None and known != manifest:
        raise InputError(f"{out / MANIFEST}: the folder holds other features ({known}); give another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _pictures(config: RunConfig, table: Path, out: Path) -> list[tuple[Path, Path]]:
    """Return each readable picture that has no feature yet, with its feature's path."""
    options = ReadOptions(
        split=Split.TRAIN,
        folder=config.data.folder,
        voken_text="",
        choose=lambda _id, group: group[0],
        count_tokens=len,
        tasks=("caption",),
    )
    index = read_cc3m(config.data.folder / table, options)
    pictures = dict.fromkeys(index[number].output_images[0] for number in range(len(index)))
    problems = list(index.problems)
    found: dict[Path, Path] = {}
    for picture in pictures:
        split = split_of(picture)
        if split is None:
            problems.append(Problem(str(picture), "no folder of its path begins with train or val"))
            continue
        path = feature_path(out, split, "output", picture)
        if path in found:
            raise InputError(
                f"{picture}: would have the same feature file as {found[path]}, which the published layout "
                "names by the picture's file name; rename one, or train without features"
            )
        found[path] = picture
    todo = [(picture, path) for path, picture in found.items() if not path.is_file()]
    checker = PictureChecker(config.data.check_images)
    faults: dict[Path, str] = {}
    for start in range(0, len(todo), _CHECKED_AT_ONCE):
        faults |= checker.check(picture for picture, _ in todo[start : start + _CHECKED_AT_ONCE])
    problems += [Problem(str(picture), reason) for picture, reason in faults.items()]
    report_problems(config.data.folder / table, len(found) - len(faults), problems)
    return [(picture, path) for picture, path in todo if picture not in faults]
