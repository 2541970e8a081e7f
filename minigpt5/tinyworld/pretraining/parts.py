"""The parts of pretraining: what each needs, how it is trained, and what it writes into the weights folder."""

import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minigpt4.errors import InputError
from minigpt4.language_model import load_tokenizer
from minigpt5.diffusion import load_clip_tokenizer
from minigpt5.metrics.local import save_compact_clip
from minigpt5.tinyworld.export import (
    save_half,
    save_language_model,
    save_projection,
    save_qformer,
    save_vision,
)
from minigpt5.tinyworld.foundations import (
    CLIP,
    CLIP_TOKEN_ROWS,
    EYES_FILES,
    VISION,
    Foundations,
    build_foundations,
    load_folder_backbone,
    load_folder_diffusion,
    refuse_models,
    write_foundations,
)
from minigpt5.tinyworld.pretraining.blanks import (
    ACCORD_CONTEXT_WEIGHT,
    ACCORD_READING_NOISE,
    ACCORD_RECIPE,
    CONTEXT_WEIGHT,
    READING_NOISE,
    AccordReader,
    BlankObjective,
    BlankReader,
    set_loudness,
)
from minigpt5.tinyworld.pretraining.blanks import RECIPE as BLANK_RECIPE
from minigpt5.tinyworld.pretraining.clip import RECIPE as CLIP_RECIPE
from minigpt5.tinyworld.pretraining.clip import (
    SCORER_RECIPE,
    ContrastiveObjective,
    ScorerPair,
    VisionTextPair,
    caption_ids,
    scorer_ids,
)
from minigpt5.tinyworld.pretraining.examples import PictureWriter
from minigpt5.tinyworld.pretraining.language import RECIPE as LANGUAGE_RECIPE
from minigpt5.tinyworld.pretraining.language import LanguageObjective
from minigpt5.tinyworld.pretraining.loop import (
    STATES,
    Place,
    Recipe,
    forget_other_version,
    is_done,
    read_record,
    refuse_other_settings,
    train,
    write_record,
)
from minigpt5.tinyworld.pretraining.pool import make_pool
from minigpt5.tinyworld.pretraining.text import RECIPE as TEXT_RECIPE
from minigpt5.tinyworld.pretraining.text import CaptionReader, ReadingObjective
from minigpt5.tinyworld.pretraining.unet import RECIPE as UNET_RECIPE
from minigpt5.tinyworld.pretraining.unet import UnetObjective
from minigpt5.tinyworld.pretraining.vae import RECIPE as VAE_RECIPE
from minigpt5.tinyworld.pretraining.vae import VaeObjective, latent_scale
from minigpt5.tinyworld.pretraining.vision import (
    EYES_RECIPE,
    SIGHT_RECIPE,
    Eyes,
    EyesObjective,
    PictureReader,
    SightObjective,
    VisionObjective,
)
from minigpt5.tinyworld.pretraining.vision import RECIPE as VISION_RECIPE

POOL_SIZE = 12_000
_SEEN = 2
"""Times as many pictures to learn to see from: shapes are the hardest to tell apart."""
Measured = dict[str, float]


@dataclass(frozen=True)
class Part:
    """One part of pretraining.

    Attributes:
        needs: parts that must be done before.
        recipe: how it is trained.
        run: trains and exports; returns what is worth recording.
        has_pool: whether it learns from the rendered pool, whose size then decides what becomes of it.
        continues: files and folders that it starts from, as the first part of ``needs`` left them, and puts
            its own in the place of.
    """

    needs: tuple[str, ...]
    recipe: Recipe
    run: Callable[[Place, Recipe, int], Measured]
    has_pool: bool = True
    continues: tuple[str, ...] = ()


def run_part(name: str, place: Place, scale: float = 1.0, pool_size: int = POOL_SIZE) -> None:
    """Train one part to its end and export it; a part that is done by as many steps or more is left alone.

    Args:
        name: key of :data:`PARTS`.
        place: where.
        scale: the recipe's steps are multiplied by it.
        pool_size: pictures rendered for training.

    Raises:
        InputError: a part that it needs is not done, or this one was made with another seed or pool.
    """
    part, recipe = PARTS[name], scaled_recipe(name, scale)
    check_settings([name], place, pool_size)
    if is_done(place, name, recipe):
        return
    check_needs([name], place, scale)
    forget_other_version(place, name, recipe)
    _return_to_start(place, name)
    measured = part.run(place, recipe, pool_size)
    # A checkpoint may be further than was asked.
    recipe = replace(recipe, steps=round(measured.pop("steps", recipe.steps)))
    _forget_built_on(place, name)
    write_record(place, name, {"recipe": asdict(recipe), "seed": place.seed, "pool": pool_size, **measured})


def check_settings(names: Iterable[str], place: Place, pool_size: int) -> None:
    """Check that no part is done already with another seed or another number of pictures.

    Args:
        names: keys of :data:`PARTS`.
        place: where.
        pool_size: pictures rendered for training.

    Raises:
        InputError: naming the first that is.
    """
    for name in names:
        wanted = {"seed": place.seed} | ({"pool": pool_size} if PARTS[name].has_pool else {})
        refuse_other_settings(place.record_path(name), read_record(place, name), wanted)


def check_needs(names: Collection[str], place: Place, scale: float) -> None:
    """Check that each part finds those that it needs, done or trained before it.

    Args:
        names: keys of :data:`PARTS`, to be trained in one go.
        place: where.
        scale: every recipe's steps are multiplied by it.

    Raises:
        InputError: naming every part that would not, and what it needs.
    """
    outdated: set[str] = set()
    problems = []
    for name, part in PARTS.items():
        is_outdated = bool(outdated & set(part.needs))
        if name in names:
            missing = [
                need for need in part.needs if need not in names and (need in outdated or not is_done(place, need))
            ]
            if missing:
                problems.append(f"{name}: needs {', '.join(missing)}")
            is_outdated |= not is_done(place, name, scaled_recipe(name, scale))
        if is_outdated:
            outdated.add(name)
    if problems:
        raise InputError(f"--parts {'; '.join(problems)}, not yet pretrained in {place.folder}")


def scaled_recipe(name: str, scale: float) -> Recipe:
    """Return a part's recipe with its steps multiplied."""
    recipe = PARTS[name].recipe
    return replace(recipe, steps=max(1, round(recipe.steps * scale)))


def _return_to_start(place: Place, name: str) -> None:
    """Keep the weights that a part is about to replace, or put the kept ones back if it is trained anew.

    With a checkpoint it goes on from that.
    """
    kept = place.start_path(name)
    if not PARTS[name].continues or place.state_path(name).is_file():
        return
    if kept.is_dir():
        _copy_weights(PARTS[name].continues, kept, place.folder)
        return
    unfinished = kept.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    _copy_weights(PARTS[name].continues, place.folder, unfinished)
    unfinished.replace(kept)


def _copy_weights(paths: Iterable[str], source: Path, target: Path) -> None:
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if (source / path).is_dir():
            shutil.copytree(source / path, target / path, dirs_exist_ok=True)
        else:
            shutil.copy2(source / path, target / path)


def _forget_built_on(place: Place, name: str) -> None:
    """Remove what is known of the parts that were built on an earlier state of a part: it is out of date."""
    for other, part in PARTS.items():
        if name in part.needs:
            place.record_path(other).unlink(missing_ok=True)
            place.state_path(other).unlink(missing_ok=True)
            if name == part.needs[0]:
                shutil.rmtree(place.start_path(other), ignore_errors=True)
            _forget_built_on(place, other)


def prepare_folder(place: Place) -> None:
    """Write tokenizers and random models where there are none, so that every part finds the others' files.

    Raises:
        InputError: some of the models are there, but not all, or all of them and they come from elsewhere.
    """
    begun = place.folder / STATES / "preparing"
    if not begun.is_file():
        if (place.folder / "sd" / "model_index.json").is_file() and begun.parent.is_dir():
            return
        refuse_models(place.folder)
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.touch()
    write_foundations(place.folder, place.seed)
    begun.unlink()


def _fresh(place: Place) -> Foundations:
    language_tokens = len(load_tokenizer(place.folder / "llama"))
    clip_tokens = len(load_clip_tokenizer(place.folder / "sd" / "tokenizer"))
    return build_foundations(language_tokens, clip_tokens, place.seed)


def _train_vae(place: Place, recipe: Recipe, pool_size: int) -> Measured:
    vae = _fresh(place).vae.to(place.device, memory_format=torch.channels_last)
    pool = make_pool(pool_size, place.seed)
    measured = train("vae", vae, VaeObjective(vae, pool, recipe), recipe, place, pool_size)
    factor = latent_scale(vae, pool)
    vae.register_to_config(scaling_factor=round(factor, 5))
    save_half(vae.to("cpu", memory_format=torch.contiguous_format), place.folder / "sd" / "vae")
    return {**measured, "scaling_factor": factor}


def _train_clip(place: Place, recipe: Recipe, pool_size: int) -> Measured:
    models = _fresh(place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place.seed)
        pair = VisionTextPair(models.vision, models.text_encoder).to(place.device)
    encode = caption_ids(load_clip_tokenizer(place.folder / "sd" / "tokenizer"))
    objective = ContrastiveObjective(pair, encode, make_pool(pool_size, place.seed), recipe)
    measured = train("clip", pair, objective, recipe, place, pool_size)
    save_half(models.text_encoder.to("cpu"), place.folder / "sd" / "text_encoder")
    return measured


def _train_text(place: Place, recipe: Recipe, _: int) -> Measured:
    diffusion = load_folder_diffusion(place.folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place.seed)
        reader = CaptionReader(diffusion.text_encoder.requires_grad_(True)).to(place.device)
    objective = ReadingObjective(reader, diffusion.tokenizer, recipe)
    measured = train("text", reader, objective, recipe, place)
    save_half(reader.text_encoder.to("cpu"), place.folder / "sd" / "text_encoder")
    return measured


def _train_scorer(place: Place, recipe: Recipe, pool_size: int) -> Measured:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place.seed)
        pair = ScorerPair(_fresh(place).clip, CLIP_TOKEN_ROWS).to(place.device)
    encode = scorer_ids(pair.scorer.context_length)
    objective = ContrastiveObjective(pair, encode, make_pool(pool_size, place.seed), recipe)
    measured = train("scorer", pair, objective, recipe, place, pool_size)
    save_compact_clip(place.folder / "clip", pair.to("cpu").finished().half(), CLIP, CLIP_TOKEN_ROWS)
    return measured


def _train_language(place: Place, recipe: Recipe, _: int) -> Measured:
    model = _fresh(place).language_model.to(place.device)
    writer = PictureWriter(load_tokenizer(place.folder / "llama"))
    measured = train("language", model, LanguageObjective(model, writer, recipe), recipe, place)
    save_language_model(model.to("cpu"), place.folder / "llama")
    return measured


def _train_blanks(place: Place, recipe: Recipe, _: int) -> Measured:
    return _continue_language("blanks", BlankReader, CONTEXT_WEIGHT, READING_NOISE, place, recipe)


def _train_accord(place: Place, recipe: Recipe, _: int) -> Measured:
    return _continue_language("accord", AccordReader, ACCORD_CONTEXT_WEIGHT, ACCORD_READING_NOISE, place, recipe)


def _continue_language(
    part: str,
    make_reader: type[BlankReader] | type[AccordReader],
    context_weight: float,
    reading_noise: float,
    place: Place,
    recipe: Recipe,
) -> Measured:
    model = load_folder_backbone(place.folder).model.language_model.requires_grad_(True)
    # Words keep their embeddings: eyes learn to give them meanwhile.
    model.get_input_embeddings().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place.seed)
        reader = make_reader(model).to(place.device)
    writer = PictureWriter(load_tokenizer(place.folder / "llama"))
    objective = BlankObjective(reader, writer, recipe, context_weight, reading_noise)
    measured = train(part, reader, objective, recipe, place)
    if make_reader is AccordReader:
        set_loudness(model)
    save_language_model(model.to("cpu"), place.folder / "llama")
    return measured


def _train_unet(place: Place, recipe: Recipe, pool_size: int) -> Measured:
    diffusion = load_folder_diffusion(place.folder)
    diffusion.unet = _fresh(place).unet
    diffusion.to(place.device)
    objective = UnetObjective(diffusion, make_pool(pool_size, place.seed), recipe)
    measured = train("unet", diffusion.unet, objective, recipe, place, pool_size)
    save_half(diffusion.unet.to("cpu"), place.folder / "sd" / "unet")
    return measured


def _train_sight(place: Place, recipe: Recipe, pool_size: int) -> Measured:
    models = _fresh(place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place.seed)
        reader = PictureReader(models.vision, VISION.hidden_size).to(place.device)
    measured = train(
        "sight",
        reader,
        SightObjective(reader, make_pool(_SEEN * pool_size, place.seed), recipe),
        recipe,
        place,
        pool_size,
    )
    _save_eyes(place, Eyes(models.vision.to("cpu"), models.qformer, models.projection))
    return measured


def _train_eyes(place: Place, recipe: Recipe, pool_size: int) -> Measured:
    backbone = load_folder_backbone(place.folder).model.to(place.device)
    backbone.requires_grad_(True)
    eyes = Eyes(backbone.vision, backbone.qformer, backbone.projection)
    writer = PictureWriter(load_tokenizer(place.folder / "llama"))
    pool = make_pool(_SEEN * pool_size, place.seed)
    measured = train(
        "eyes", eyes, EyesObjective(eyes, backbone.embedding_VH, writer, pool, recipe), recipe, place, pool_size
    )
    _save_eyes(place, eyes.to("cpu"))
    return measured


def _train_vision(place: Place, recipe: Recipe, _: int) -> Measured:
    backbone = load_folder_backbone(place.folder).model.to(place.device)
    backbone.requires_grad_(True)
    eyes = Eyes(backbone.vision, backbone.qformer, backbone.projection)
    writer = PictureWriter(load_tokenizer(place.folder / "llama"))
    objective = VisionObjective(eyes, backbone.language_model, writer, recipe)
    measured = train("vision", eyes, objective, recipe, place)
    _save_eyes(place, eyes.to("cpu"))
    return measured


def _save_eyes(place: Place, eyes: Eyes) -> None:
    save_vision(eyes.vision, place.folder / "eva_vit.pth")
    save_qformer(eyes.qformer, eyes.vision.model.post_layernorm, place.folder / "blip2_qformer.pth")
    save_projection(eyes.projection, place.folder / "minigpt4.pth")


PARTS: dict[str, Part] = {
    "vae": Part((), VAE_RECIPE, _train_vae),
    "clip": Part((), CLIP_RECIPE, _train_clip),
    "language": Part((), LANGUAGE_RECIPE, _train_language, has_pool=False),
    "text": Part(("clip",), TEXT_RECIPE, _train_text, has_pool=False, continues=("sd/text_encoder",)),
    "unet": Part(("vae", "text"), UNET_RECIPE, _train_unet),
    "blanks": Part(("language",), BLANK_RECIPE, _train_blanks, has_pool=False, continues=("llama",)),
    "accord": Part(("blanks",), ACCORD_RECIPE, _train_accord, has_pool=False, continues=("llama",)),
    "sight": Part((), SIGHT_RECIPE, _train_sight),
    "eyes": Part(("sight", "language"), EYES_RECIPE, _train_eyes, continues=EYES_FILES),
    "vision": Part(("eyes", "accord"), VISION_RECIPE, _train_vision, has_pool=False, continues=EYES_FILES),
    "scorer": Part((), SCORER_RECIPE, _train_scorer),
}
"""In an order that gives every part what it needs."""
