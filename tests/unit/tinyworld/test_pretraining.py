import json
import os
import shutil
from dataclasses import asdict, replace
from functools import partial
from random import Random

import pytest
import torch

from minigpt4.errors import InputError
from minigpt4.language_model import load_tokenizer
from minigpt5.images import CLIP_MEAN, CLIP_STD
from minigpt5.tinyworld.__main__ import MEASURED, SHIPPED, main
from minigpt5.tinyworld.captions import caption, plain_words, read_attributes
from minigpt5.tinyworld.events import fits
from minigpt5.tinyworld.export import save_language_model
from minigpt5.tinyworld.foundations import (
    CLIP,
    CLIP_TOKEN_ROWS,
    build_foundations,
    load_folder_backbone,
    load_folder_diffusion,
)
from minigpt5.tinyworld.pretraining.blanks import (
    ACCORD_CONTEXT_WEIGHT,
    ACCORD_READING_NOISE,
    CONTEXT_WEIGHT,
    COUNT,
    LOUDNESS,
    READING_NOISE,
    WORDS,
    AccordReader,
    BlankObjective,
    BlankReader,
    blank_starts,
    context_share,
    set_loudness,
)
from minigpt5.tinyworld.pretraining.clip import ScorerPair, contrastive_loss, encode_short_text
from minigpt5.tinyworld.pretraining.evaluate import (
    MEASURES,
    HeldOut,
    Measure,
    measure_scorer,
    names_all,
    names_everything,
    share_of_both,
)
from minigpt5.tinyworld.pretraining.examples import (
    BLANK,
    Example,
    PictureWriter,
    caption_example,
    describe_example,
    dialogue_example,
    event_example,
    instruction_example,
    story_example,
)
from minigpt5.tinyworld.pretraining.loop import Place, Recipe, Scheduled, is_done, train, write_record
from minigpt5.tinyworld.pretraining.parts import (
    PARTS,
    check_needs,
    prepare_folder,
    run_part,
    scaled_recipe,
)
from minigpt5.tinyworld.pretraining.pool import GROUP, make_pool
from minigpt5.tinyworld.pretraining.reader import JointReader, targets
from minigpt5.tinyworld.pretraining.run import pretrain
from minigpt5.tinyworld.pretraining.text import CaptionReader, ReadingObjective, caption_states, wording_share
from minigpt5.tinyworld.pretraining.vae import VaeObjective
from minigpt5.tinyworld.pretraining.vision import EyesObjective, VisionObjective
from minigpt5.tinyworld.renderer import render
from minigpt5.tinyworld.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing, belongs, seeded

CPU = torch.device("cpu")
QUICK = Recipe(steps=6, batch_size=2, learning_rate=1e-3, warmup_steps=1)
TEXTS = ["a red star .", "a big blue box on the sand ."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of which every part is trained for two steps."""
    place = Place(tmp_path_factory.mktemp("weights"), 0, CPU)
    prepare_folder(place)
    return place.folder


def test_a_preparation_that_was_killed_is_done_again_but_others_models_stay(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    place = Place(tmp_path, 0, CPU)
    with monkeypatch.context() as patch:
        patch.setattr("minigpt5.tinyworld.foundations.save_diffusion", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(place)
    assert (tmp_path / "eva_vit.pth").is_file()
    prepare_folder(place)
    assert (tmp_path / "sd" / "unet").is_dir()
    assert not list((tmp_path / "pretraining").iterdir())
    (tmp_path / "sd" / "model_index.json").unlink()
    with pytest.raises(InputError, match="holds .* already"):
        prepare_folder(place)


@pytest.fixture(scope="module")
def pool():
    return make_pool(32, seed=3)


@pytest.mark.parametrize("name", list(PARTS))
def test_each_part_lowers_its_loss_and_writes_its_files(folder, name, monkeypatch):
    if name == "vision":  # one batch again and again: pictures say little to a hardly trained language model
        again = VisionObjective.__call__
        monkeypatch.setattr(
            VisionObjective, "__call__", lambda self, _: again(self, torch.Generator().manual_seed(0))
        )
    # nothing is read through noise after 16 steps
    monkeypatch.setattr("minigpt5.tinyworld.pretraining.loop._PLAIN", 1.0)
    part, place = PARTS[name], Place(folder, 0, CPU)
    quick = replace(part.recipe, steps=2, batch_size=8, warmup_steps=1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first = part.run(place, quick, 32)["loss"]
    after = part.run(place, replace(quick, steps=16), 32)
    assert after["loss"] < first
    assert after["seconds"] > 0
    changed = {
        path.relative_to(folder).parts[0]
        for path, content in before.items()
        if path.suffix in (".safetensors", ".pth") and path.read_bytes() != content
    }
    expected = {"vae": {"sd"}, "text": {"sd"}, "unet": {"sd"}, "language": {"llama"}}
    expected |= {"blanks": {"llama"}, "accord": {"llama"}}
    qformer = {"blip2_qformer.pth", "minigpt4.pth"}
    expected |= {"scorer": {"clip"}, "clip": {"sd"}, "eyes": {"eva_vit.pth", *qformer}, "vision": qformer}
    # The Q-Former's file holds the layer norm behind the ViT.
    expected["sight"] = {"eva_vit.pth", "blip2_qformer.pth"}
    assert changed - {"pretraining"} == expected[name]


@pytest.mark.parametrize("name", list(PARTS))
def test_a_part_depends_on_its_seed_and_on_nothing_that_ran_before(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("minigpt5.tinyworld.pretraining.loop._PLAIN", 0)
    quick = replace(PARTS[name].recipe, steps=2, batch_size=8, warmup_steps=1)
    losses = []
    for run, (seed, disturbed) in enumerate(((0, 1), (0, 2), (1, 2))):
        place = Place(tmp_path / str(run), seed, CPU)
        shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("*.pt"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(disturbed)
            losses.append(PARTS[name].run(place, quick, 32)["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_models_that_were_not_made_here_are_not_trained_over(tmp_path):
    shutil.copytree(SHIPPED / "sd", tmp_path / "sd")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds .* already; give another or remove it"):
        main(["pretrain", "--out", str(tmp_path), "--parts", "vae"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def vae_run(folder, pool, stop_after=None, recipe=QUICK, save_seconds=0.0):
    """Train a small step count; with ``stop_after`` the run dies in that step."""
    vae = build_foundations(300, 520, seed=1).vae
    objective = VaeObjective(vae, pool, recipe)
    calls = 0

    def loss_of(generator):
        nonlocal calls
        if calls == stop_after:
            raise KeyboardInterrupt
        calls += 1
        return objective(generator)

    measured = train("vae", vae, loss_of, recipe, Place(folder, 0, CPU, save_seconds))
    return vae.state_dict(), measured, calls


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, pool):
    whole, expected, _ = vae_run(tmp_path / "whole", pool)
    with pytest.raises(KeyboardInterrupt):
        vae_run(tmp_path / "killed", pool, stop_after=3)
    resumed, measured, calls = vae_run(tmp_path / "killed", pool)
    assert calls == QUICK.steps - 3
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert {**measured, "seconds": 0} == {**expected, "seconds": 0}
    again, _, calls = vae_run(tmp_path / "killed", pool)
    assert calls == 0
    assert all(torch.equal(again[key], value) for key, value in whole.items())


def test_ctrl_c_keeps_the_steps_done(tmp_path, pool):
    whole, _, _ = vae_run(tmp_path / "whole", pool)
    with pytest.raises(KeyboardInterrupt):
        vae_run(tmp_path / "stopped", pool, stop_after=3, save_seconds=600)
    resumed, _, calls = vae_run(tmp_path / "stopped", pool)
    assert calls == QUICK.steps - 3
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(tmp_path, pool):
    vae_run(tmp_path, pool, recipe=replace(QUICK, steps=1))
    with pytest.raises(
        InputError, match=r"vae\.pt: made with other settings: batch_size 2 \(now 1\); give another"
    ):
        vae_run(tmp_path, pool, recipe=replace(QUICK, batch_size=1))
    (tmp_path / "pretraining" / "vae.pt").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(InputError, match=r"vae\.pt: not a readable weight file"):
        vae_run(tmp_path, pool)


def test_the_learning_rate_warms_up_and_falls():
    recipe = Recipe(steps=100, batch_size=1, learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[100] == pytest.approx(0.1)


@pytest.fixture
def runs(monkeypatch):
    """Names of the parts that would have been trained, in order; none is, and there are no weights."""
    names = []

    def note(name, place, recipe, pool_size):
        names.append(name)
        return {"loss": 0.0}

    for name, part in PARTS.items():
        monkeypatch.setitem(PARTS, name, replace(part, run=partial(note, name), continues=()))
    return names


def test_a_part_runs_once_and_only_after_those_it_needs(runs, tmp_path, monkeypatch):
    place = Place(tmp_path, 0, CPU)
    wanted = ["vision", "vae", "accord", "blanks", "eyes", "language", "sight"]
    with pytest.raises(InputError, match="--parts unet: needs vae, text, not yet pretrained in"):
        run_part("unet", place)
    monkeypatch.setattr("minigpt5.tinyworld.pretraining.run.prepare_folder", lambda place: None)
    for _ in range(2):
        pretrain(wanted, place, scale=0.5, pool_size=8, jobs=1)
    assert runs == ["vae", "language", "blanks", "accord", "sight", "eyes", "vision"]
    record = json.loads((tmp_path / "pretraining" / "vae.json").read_text())
    assert record["recipe"]["steps"] == PARTS["vae"].recipe.steps / 2
    assert is_done(place, "vae")
    assert not is_done(place, "unet")


def test_a_finished_part_of_another_seed_or_pool_is_refused(tmp_path):
    place, other = Place(tmp_path, 0, CPU), Place(tmp_path, 7, CPU)
    for name in ("vae", "language"):
        write_record(place, name, {"recipe": asdict(PARTS[name].recipe), "seed": 0, "pool": 12000})
    message = r"vae\.json: made with other settings: seed 0 \(now 7\), pool 12000 \(now 64\); give another --out"
    with pytest.raises(InputError, match=message):
        pretrain(["clip", "vae"], other, scale=1, pool_size=64, jobs=1)
    with pytest.raises(InputError, match=message):
        run_part("vae", other, pool_size=64)
    run_part("language", place, pool_size=64)  # it draws its own examples
    with pytest.raises(InputError, match=r"language\.json: made with other settings: seed 0 \(now 7\);"):
        run_part("language", other)


def test_a_checkpoint_of_another_pool_is_refused_and_an_older_one_read(folder, tmp_path):
    place = Place(tmp_path / "weights", 0, CPU)
    shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("pretraining"))
    part = PARTS["vae"]
    quick = replace(part.recipe, steps=1, batch_size=2)
    part.run(place, quick, 8)
    with pytest.raises(InputError, match=r"vae\.pt: made with other settings: pool 8 \(now 16\); give another"):
        part.run(place, quick, 16)
    content = torch.load(place.state_path("vae"))
    del content["settings"]["pool"]
    torch.save(content, place.state_path("vae"))
    assert part.run(place, quick, 16)["steps"] == 1


def test_missing_needs_are_told_before_anything_is_done(tmp_path):
    place = Place(tmp_path, 0, CPU)
    with pytest.raises(
        InputError, match="--parts unet: needs text; vision: needs eyes, accord, not yet pretrained"
    ):
        pretrain(["vae", "unet", "vision"], place, scale=1, pool_size=8, jobs=1)
    assert not list(tmp_path.iterdir())


def test_a_need_that_this_training_makes_outdated_is_missing(tmp_path):
    place = Place(tmp_path, 0, CPU)
    for name in ("vae", "clip", "text"):
        write_record(place, name, {"recipe": asdict(PARTS[name].recipe), "seed": 0, "pool": 8})
    check_needs(["clip", "unet"], place, scale=1)
    with pytest.raises(InputError, match="--parts unet: needs text, not yet"):
        check_needs(["clip", "unet"], place, scale=2)


@pytest.mark.slow
def test_a_part_that_fails_ends_those_beside_it(folder, tmp_path):
    place = Place(tmp_path / "weights", 0, CPU)
    shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("pretraining"))
    place.state_path("vae").parent.mkdir()
    place.state_path("vae").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(InputError, match="vae.pt: not a readable weight file"):
        pretrain(["vae", "clip"], place, scale=0.1, pool_size=32, jobs=2)
    assert not is_done(place, "clip")


def test_a_part_trained_anew_is_followed_by_all_that_were_built_on_it(runs, tmp_path, monkeypatch):
    place = Place(tmp_path, 0, CPU)
    monkeypatch.setattr("minigpt5.tinyworld.pretraining.run.prepare_folder", lambda place: None)
    pretrain(list(PARTS), place, scale=1, pool_size=8, jobs=1)
    place.state_path("eyes").touch()
    place.state_path("unet").touch()
    place.record_path("language").unlink()
    runs.clear()
    pretrain(list(PARTS), place, scale=1, pool_size=8, jobs=1)
    assert runs == ["language", "blanks", "accord", "eyes", "vision"]
    assert not place.state_path("eyes").exists()
    assert place.state_path("unet").exists()


def test_a_part_that_is_removed_starts_again_from_those_it_needs(tmp_path):
    def llama():
        return (tmp_path / "llama" / "model.safetensors").read_bytes()

    def remove(name):
        for path in (place.record_path(name), place.state_path(name)):
            path.unlink()

    place, shortest = Place(tmp_path, 0, CPU), 1e-4
    prepare_folder(place)
    made = {}
    for name in ("language", "blanks", "accord"):
        run_part(name, place, shortest)
        made[name] = llama()
    assert len(set(made.values())) == 3
    remove("accord")
    run_part("accord", place, shortest)
    assert llama() == made["accord"]
    remove("blanks")
    run_part("blanks", place, shortest)
    assert llama() == made["blanks"]
    run_part("accord", place, shortest)
    assert llama() == made["accord"]


def test_eyes_that_are_trained_for_another_language_start_from_sight(tmp_path):
    place, shortest = Place(tmp_path, 0, CPU), 1e-4
    prepare_folder(place)
    files = [tmp_path / name for name in ("eva_vit.pth", "blip2_qformer.pth", "minigpt4.pth")]
    made = []
    for _ in range(2):
        for name in ("language", "sight", "eyes"):
            run_part(name, place, shortest, pool_size=16)
        made.append([path.read_bytes() for path in files])
        for path in (place.record_path("language"), place.state_path("language")):
            path.unlink()
    assert made[0] == made[1]


def test_a_checkpoint_of_another_version_is_not_continued(folder, tmp_path, monkeypatch):
    place = Place(tmp_path / "weights", 0, CPU)
    shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("pretraining"))
    few = replace(PARTS["vae"].recipe, steps=2, batch_size=2)
    monkeypatch.setitem(PARTS, "vae", replace(PARTS["vae"], recipe=few))
    run_part("vae", place, pool_size=8)
    first = torch.load(place.state_path("vae"), weights_only=True)
    monkeypatch.setitem(PARTS, "vae", replace(PARTS["vae"], recipe=replace(few, version=2, steps=3)))
    run_part("vae", place, pool_size=8)
    second = torch.load(place.state_path("vae"), weights_only=True)
    assert (first["settings"]["version"], first["step"]) == (1, 2)
    assert (second["settings"]["version"], second["step"]) == (2, 3)
    assert json.loads(place.record_path("vae").read_text())["recipe"]["version"] == 2


def test_fewer_steps_than_were_trained_change_nothing(runs, tmp_path):
    place = Place(tmp_path, 0, CPU)
    for name in ("vae", "clip", "text", "unet"):
        run_part(name, place, pool_size=8)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    runs.clear()
    run_part("vae", place, scale=0.5, pool_size=8)
    assert not runs
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    run_part("vae", place, scale=2, pool_size=8)
    assert runs == ["vae"] and not is_done(place, "unet")


def test_the_record_tells_the_steps_of_a_checkpoint_that_is_further(folder, tmp_path, monkeypatch):
    place = Place(tmp_path / "weights", 0, CPU)
    shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("pretraining"))
    few = replace(PARTS["vae"].recipe, steps=4, batch_size=2)
    monkeypatch.setitem(PARTS, "vae", replace(PARTS["vae"], recipe=few))
    run_part("vae", place, pool_size=8)
    place.record_path("vae").unlink()
    run_part("vae", place, scale=0.5, pool_size=8)
    assert json.loads(place.record_path("vae").read_text())["recipe"]["steps"] == 4


def test_other_words_for_the_same_scene_share_their_states():
    states = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    again = states + 0.01 * torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
    assert wording_share(states, states) == 0
    assert wording_share(states, again) < 1e-3
    assert 0.7 < wording_share(states, states.flip(1)) < 1.3


def test_states_that_do_not_depend_on_their_context_share_all_variance():
    draw = torch.Generator().manual_seed(0)
    states, others = (torch.randn(400, 3, 8, generator=draw) for _ in range(2))
    assert context_share(states, states) == 0
    assert context_share(states, states + 0.01 * others) < 1e-3
    assert 0.95 < context_share(states, others) < 1.05


def test_what_all_contexts_say_alike_hides_little_of_what_they_say_differently_when_louder():
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(400, 3, 8, generator=draw) for _ in range(2))
    first[..., :4] = second[..., :4]
    shares = {}
    for loudness in (1.0, 1.5):
        pair = [torch.cat([loudness * states[..., :4], states[..., 4:]], dim=-1) for states in (first, second)]
        shares[loudness] = [float(share(*pair)) for share in (context_share, wording_share)]
    quiet, loud = shares[1.0], shares[1.5]
    assert quiet == pytest.approx([0.5, 0.5], abs=0.03)
    assert loud[0] > 0.85 * quiet[0]
    assert loud[1] < 0.7 * quiet[1]


def test_words_are_found_before_noise_and_contexts_make_it_hard(folder):
    objective, _ = blank_objective(folder, AccordReader, 3.0)
    told, rest = [], []
    for step in (0, QUICK.steps - 1):
        objective.step = step
        losses = objective(torch.Generator().manual_seed(0))
        told.append(losses["told"])
        rest.append(losses["loss"] - losses["told"])
    assert told[0] != told[1]
    torch.testing.assert_close(rest[1] - rest[0], 3 * losses["context"])


def test_eyes_that_tell_every_word_have_no_error(folder, pool):
    models = load_folder_backbone(folder).model
    writer = PictureWriter(load_tokenizer(folder / "llama"))
    rows = models.embedding_VH
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))

    class Oracle(torch.nn.Module):
        def forward(self, pixels):
            numbers = [
                int((pool.pixels(range(len(pool))) - picture).abs().flatten(1).sum(dim=1).argmin())
                for picture in pixels * std + mean
            ]
            return rows[torch.tensor([writer.seen_ids(pool.scenes[number]) for number in numbers])]

    found = EyesObjective(Oracle(), rows, writer, pool, QUICK)(torch.Generator().manual_seed(0))
    assert found["told"] == 1
    assert found["error"] == 0
    wrong = EyesObjective(lambda pixels: Oracle()(pixels).roll(1, dims=1), rows, writer, pool, QUICK)
    assert wrong(torch.Generator().manual_seed(0))["told"] == 0


def test_the_scorers_vectors_are_read_into_cells_and_background():
    reader = JointReader(7)
    found = reader(torch.randn(3, 7))
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {
        "is_there": (3, 9), "size": (3, 9, 2), "colour": (3, 9, 8), "shape": (3, 9, 8), "background": (3, 5)
    }  # fmt: skip


def test_pool_holds_training_look_alikes(pool):
    assert len(pool) == 32
    assert all(belongs(scene, "train") for scene in pool.scenes)
    same = torch.equal(pool.pixels_N3SS, make_pool(32, seed=3).pixels_N3SS)
    assert same and not torch.equal(pool.pixels_N3SS, make_pool(32, seed=4).pixels_N3SS)
    numbers = pool.draw_groups(torch.Generator().manual_seed(0), 16)
    assert sorted(numbers)[:GROUP] == [min(numbers) + place for place in range(GROUP)]
    captions = pool.captions(numbers, torch.Generator().manual_seed(0))
    assert [read_attributes(text)["colour"] for text in captions] == [
        pool.scenes[number].main.colour for number in numbers
    ]


def test_examples_write_each_picture_out_in_words(folder):
    writer = PictureWriter(load_tokenizer(folder / "llama"))
    rng = seeded(0, "train", "examples")
    makers = (caption_example, instruction_example, story_example, dialogue_example)
    for make in (lambda rng, _: describe_example(rng), *makers):
        for _ in range(30):
            example = make(rng, writer.voken_text)
            assert example.prompt.count("<ImageHere>") == len(example.inputs)
            assert example.response.count("[IMG0]") == len(example.outputs)
            ids = writer.prompt_ids(example) + writer.response_ids(example)
            assert max(ids) < writer.tokenizer.base_size
            text = writer.tokenizer.decode(ids)
            assert text.endswith("###")
            shown = len(example.inputs) + len(example.outputs)
            assert text.replace("<Img>ImageContent", "").count("<Img>") == shown


def test_a_description_begins_with_what_stands_first_in_the_picture():
    for index in range(60):
        example = describe_example(seeded(0, "train", "describe", index))
        (scene,) = example.inputs
        first = min(scene.things, key=lambda thing: POSITIONS.index(thing.position))
        assert read_attributes(example.response)["position"] == first.position


def blank_objective(folder, reader=BlankReader, context_weight=CONTEXT_WEIGHT, **options):
    """Of the last step, when all terms have their full weight."""
    writer = PictureWriter(load_tokenizer(folder / "llama"))
    model = build_foundations(len(writer.tokenizer), 520, seed=1).language_model
    objective = BlankObjective(reader(model), writer, replace(QUICK, batch_size=8), context_weight, **options)
    objective.step = QUICK.steps - 1
    return objective, writer


def test_blanks_stand_where_a_replys_pictures_do(folder):
    objective, writer = blank_objective(folder)
    scene = Scene((Thing("star", "red", "big", "top"),), "snow")
    example = Example("show it .", f"here it is . {writer.voken_text} ###", (), (scene,))
    ids = writer.blank_response_ids(example, COUNT)
    assert ids.count(BLANK) == COUNT
    assert writer.tokenizer.decode([index for index in ids if index != BLANK]) == "here it is . ###"
    rows = objective.tokens([example, replace(example, prompt="show it to me , please .")])
    where, starts = blank_starts(rows)
    assert where.tolist() == [0, 1]
    for row, start in zip(where.tolist(), starts.tolist(), strict=True):
        assert (rows[row, start : start + COUNT] == BLANK).all()
        assert (rows[row] == BLANK).sum() == COUNT


def test_blanks_often_stand_for_a_picture_of_two_things(folder):
    objective, _ = blank_objective(folder)
    rng = Random(0)
    drawn = [example for _ in range(300) for example in objective.draw(rng)]
    with_two = sum(any(len(scene.things) == 2 for scene in example.outputs) for example in drawn)
    assert 0.4 < with_two / len(drawn) < 0.6


def test_blanks_are_near_the_mean_row_and_known_tokens_keep_theirs(folder):
    objective, writer = blank_objective(folder)
    rows = objective.model.get_input_embeddings().weight
    ids = torch.tensor([[5, BLANK, BLANK, 7]])
    first, second = (objective.embed(ids, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(first[0, [0, 3]], rows[[5, 7]])
    assert not torch.equal(first[0, 1], first[0, 2])
    assert not torch.equal(first[0, 1], second[0, 1])
    many = objective.embed(torch.full((1, 4000), BLANK), torch.Generator().manual_seed(0))
    torch.testing.assert_close(many[0].mean(dim=0), rows.mean(dim=0), atol=2e-3, rtol=0)


def test_every_blanks_state_tells_every_word_by_a_matrix_of_the_words_own(folder):
    objective, _ = blank_objective(folder)
    width = objective.model.config.hidden_size
    states = torch.randn(2, COUNT, width, generator=torch.Generator().manual_seed(0))
    told = objective.reader(states)
    assert told.shape[:3] == (2, COUNT, WORDS)
    places = objective.reader.places
    for word in (0, WORDS - 1):
        rows = slice(word * width, (word + 1) * width)
        seen = states @ places.weight[rows].T + places.bias[rows]
        torch.testing.assert_close(told[:, :, word], objective.model.lm_head(seen))


def test_in_accord_each_blank_but_the_first_tells_a_word_and_a_second_one_where_there_are_more(folder):
    objective, writer = blank_objective(folder, AccordReader)
    both = Scene(
        (Thing("star", "red", "big", "upper left"), Thing("ring", "blue", "small", "lower right")), "snow"
    )
    one = Scene((Thing("star", "red", "big", "top"),), "snow")
    words = objective.words([both, one])
    assert words.shape == (2, WORDS)
    decode = writer.tokenizer.decode
    assert decode(words[0].tolist()).split() == plain_words(both).split()
    assert decode(words[1].tolist()).split() == [*plain_words(one).split(), *"....."]
    states = torch.randn(2, COUNT, objective.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    told = objective.reader(states)
    head = objective.model.lm_head
    assert told.shape[:3] == (2, 1, WORDS)
    torch.testing.assert_close(told[:, 0, : COUNT - 1], head(states[:, 1:]))
    torch.testing.assert_close(told[:, 0, COUNT - 1], head(objective.reader.second(states[:, 1])))


def test_a_blanks_states_are_those_that_predict_its_tokens(folder):
    objective, writer = blank_objective(folder)
    example = caption_example(Random(0), writer.voken_text)
    states, _ = objective.states([example], torch.Generator().manual_seed(0))
    ids = objective.tokens([example])
    start = ids[0].tolist().index(BLANK)
    # Before the first blank only the prompt was read: no noise is in that state.
    hidden = objective.model.model(input_ids=ids[:, :start], use_cache=False)[0]
    torch.testing.assert_close(states[0, 0], hidden[0, -1])
    assert states.shape[:2] == (1, COUNT)


@pytest.mark.parametrize("name", ["blanks", "accord"])
def test_blanks_leave_words_the_embeddings_that_eyes_learn_to_give(folder, tmp_path, name):
    place = Place(tmp_path / "weights", 5, CPU)
    shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("pretraining"))
    before = load_folder_backbone(place.folder).model
    PARTS[name].run(place, replace(PARTS[name].recipe, steps=1, batch_size=4, warmup_steps=0), 8)
    after = load_folder_backbone(place.folder).model
    assert torch.equal(after.embedding_VH, before.embedding_VH)
    assert not torch.equal(after.head_VH, before.head_VH)


def test_accord_ends_with_loud_states(folder, tmp_path):
    place = Place(tmp_path / "weights", 5, CPU)
    shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("pretraining"))
    model = load_folder_backbone(place.folder).model.language_model
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
    save_language_model(model, place.folder / "llama")
    PARTS["accord"].run(place, replace(PARTS["accord"].recipe, steps=1, batch_size=4, warmup_steps=0), 8)
    weights = load_folder_backbone(place.folder).model.language_model.model.norm.weight
    assert abs(weights.square().mean().sqrt() - LOUDNESS) < 0.01


def test_louder_states_say_the_same(folder):
    model = load_folder_backbone(folder).model.language_model
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    quiet, before = model.model(input_ids=ids)[0], model(input_ids=ids).logits
    set_loudness(model)
    loud, after = model.model(input_ids=ids)[0], model(input_ids=ids).logits
    torch.testing.assert_close(after, before)
    factor = loud / quiet
    torch.testing.assert_close(factor, torch.full_like(factor, float(factor.mean())))
    assert factor.mean() > 1.5


def test_the_context_weight_weighs_the_context(folder):
    light, heavy = (blank_objective(folder, AccordReader, weight)[0] for weight in (1.0, 5.0))
    heavy.reader.load_state_dict(light.reader.state_dict())
    first, second = (objective(torch.Generator().manual_seed(0)) for objective in (light, heavy))
    torch.testing.assert_close(second["loss"] - first["loss"], 4 * first["context"])


@pytest.mark.parametrize(
    ("name", "reader", "weight", "noise"),
    [
        ("blanks", BlankReader, CONTEXT_WEIGHT, READING_NOISE),
        ("accord", AccordReader, ACCORD_CONTEXT_WEIGHT, ACCORD_READING_NOISE),
    ],
)
def test_each_part_of_unseen_tokens_has_its_reader_weight_and_noise(
    folder, tmp_path, monkeypatch, name, reader, weight, noise
):
    place = Place(tmp_path / "weights", 5, CPU)
    shutil.copytree(folder, place.folder, ignore=shutil.ignore_patterns("pretraining"))
    trained = []
    monkeypatch.setattr(
        "minigpt5.tinyworld.pretraining.parts.train",
        lambda part, module, loss_of, *rest: (
            trained.append((part, type(module), loss_of.context_weight, loss_of.reading_noise)) or {}
        ),
    )
    PARTS[name].run(place, PARTS[name].recipe, 8)
    assert trained == [(name, reader, weight, noise)]


def test_what_another_version_of_a_part_trained_is_not_done(tmp_path):
    place = Place(tmp_path, 0, CPU)
    recipe = PARTS["blanks"].recipe
    older = {**asdict(recipe), "steps": 7500}
    del older["version"]
    write_record(place, "blanks", {"recipe": older, "seed": 0})
    assert not is_done(place, "blanks", recipe)
    assert is_done(place, "blanks", replace(recipe, version=1))


def test_what_happens_is_asked_of_two_pictures_that_differ():
    for seed in range(20):
        example = event_example(Random(seed), "[IMG0]")
        before, after = example.inputs
        assert before != after
        assert not example.outputs
        assert fits(example.response.removesuffix(" ###"), after, before)


@pytest.mark.parametrize("reader, weight", [(BlankReader, CONTEXT_WEIGHT), (AccordReader, ACCORD_CONTEXT_WEIGHT)])
def test_every_drawn_reply_holds_a_picture_and_the_loss_has_four_terms(folder, reader, weight):
    objective, _ = blank_objective(folder, reader, weight)
    for seed in range(4):
        found = objective(torch.Generator().manual_seed(seed))
        losses = {name: float(value.detach()) for name, value in found.items()}
        examples = objective.draw(Random(seed))
        assert len(examples) == 4
        assert all(example.outputs for example in examples)
        total = losses["loss"] - losses["text"] - losses["told"] - weight * losses["context"]
        assert 0 < total < 2 * losses["text"]


def test_cells_of_a_caption_are_what_its_scene_holds():
    star = Thing("star", "red", "big", "top")
    ring = Thing("ring", "blue", "small", "lower left")
    wanted = targets([Scene((star, ring), "snow"), Scene((ring,), "night")])
    assert wanted["is_there"].nonzero().tolist() == [[0, 1], [0, 6], [1, 6]]
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        assert wanted[name][0, 1] == values.index(getattr(star, name))
        assert wanted[name][0, 6] == wanted[name][1, 6] == values.index(getattr(ring, name))
    assert wanted["background"].tolist() == [BACKGROUNDS.index("snow"), BACKGROUNDS.index("night")]


def test_captions_are_read_from_the_very_states_that_condition_pictures(folder):
    diffusion = load_folder_diffusion(folder)
    encoder, tokenizer = diffusion.text_encoder, diffusion.tokenizer
    masked = caption_states(encoder, tokenizer, TEXTS, masked=True)
    torch.testing.assert_close(masked, diffusion.encode_captions(TEXTS))
    assert not torch.allclose(masked, caption_states(encoder, tokenizer, TEXTS, masked=False))


@torch.no_grad()
def test_scorer_trains_on_short_texts_and_stored_rows_alone(folder):
    import open_clip

    models = build_foundations(300, 520, seed=1)
    ids = open_clip.SimpleTokenizer(context_length=CLIP["model_cfg"]["text_cfg"]["context_length"])(TEXTS)
    expected = models.clip.encode_text(ids)
    pairs = ScorerPair(models.clip, CLIP_TOKEN_ROWS)
    torch.testing.assert_close(encode_short_text(pairs.scorer, ids[:, :12]), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pairs.finished().encode_text(ids), expected)


def test_contrastive_loss_is_that_of_open_clip():
    from open_clip.loss import ClipLoss

    pictures, texts = (torch.nn.functional.normalize(torch.randn(5, 7), dim=1) for _ in range(2))
    scale = torch.tensor(1.5)
    expected = ClipLoss()(pictures, texts, scale.exp())
    torch.testing.assert_close(contrastive_loss(3 * pictures, texts, scale), expected)


def test_descriptions_are_compared_with_either_thing():
    data = HeldOut.draw(40, seed=0)
    for scene, text in zip(data.scenes, data.captions, strict=True):
        assert names_all(text, scene)
        assert names_everything(text, scene)
        elsewhere = replace(scene, background="sky" if scene.background != "sky" else "sand")
        assert not names_all(text, elsewhere)
        assert not names_everything(text, elsewhere)
    assert not names_all("", data.scenes[0])


def test_a_description_that_leaves_out_or_invents_a_thing_does_not_name_everything():
    one, other = Thing("star", "red", "big", "top"), Thing("ring", "blue", "small", "bottom")
    both = "a big red star at the top and a small blue ring at the bottom in the snow ."
    first = "a big red star at the top in the snow ."
    assert names_everything(both, Scene((other, one), "snow"))
    assert names_all(first, Scene((other, one), "snow"))
    assert not names_everything(first, Scene((one, other), "snow"))
    assert not names_everything(both, Scene((one,), "snow"))
    assert not names_everything(both.replace("blue", "pink"), Scene((one, other), "snow"))


def test_of_pictures_that_should_show_two_things_those_with_both_are_counted():
    one, other = Thing("star", "red", "big", "top"), Thing("ring", "blue", "small", "bottom")
    both, alone = Scene((one, other), "snow"), Scene((one,), "snow")
    pictures = [render(scene, Random(0)) for scene in (both, Scene((other, one), "sky"), alone, alone)]
    assert share_of_both([both, both, both, alone], pictures) == pytest.approx(2 / 3)


def test_retrieved_records_of_the_same_scene_are_right():
    """Nothing tells their captions apart: counted by their places, at most every other one would be right."""
    once = HeldOut.draw(50, seed=0)
    again = HeldOut(once.scenes * 2, (*once.captions, *(caption(scene, Random(0)) for scene in once.scenes)))
    (measure,) = measure_scorer(SHIPPED, again)
    assert measure.value > 0.9
    others = HeldOut(again.scenes, again.captions[1:] + again.captions[:1])
    (measure,) = measure_scorer(SHIPPED, others)
    assert measure.value < 0.1


def test_evaluate_prints_floors_and_names_what_is_not_met(folder, capsys):
    code = main(["evaluate", "--weights", str(folder), "--parts", "scorer", "--count", "100"])
    printed = capsys.readouterr()
    assert code == 1
    assert "retrieval: top-1 of 100" in printed.out
    assert "floor  95%   NOT MET" in printed.out
    assert printed.err == "floors not met: retrieval: top-1 of 100\n"
    assert Measure("vae", "x", 0.99, 0.99).met
    assert Measure("vae", "x", 0.0).met
    assert str(Measure("vae", "x", 0.5)).endswith(" 50.0%")


def test_evaluate_takes_the_parts_that_are_measured(capsys):
    assert tuple(MEASURES) == MEASURED
    with pytest.raises(SystemExit):
        main(["evaluate", "--parts", "blanks", "text"])
    assert "invalid choice: 'blanks'" in capsys.readouterr().err


def test_evaluate_names_what_a_folder_lacks_before_it_measures(folder, tmp_path, capsys):
    (tmp_path / "clip").symlink_to(folder / "clip")
    (tmp_path / "llama").symlink_to(folder / "llama")
    with pytest.raises(InputError, match=f"--weights {tmp_path}: holds no eva_vit.pth, .*, sd; give a folder"):
        main(["evaluate", "--weights", str(tmp_path), "--parts", "scorer", "vision", "unet", "vae"])
    assert capsys.readouterr().out == ""


def test_pretrain_tells_which_parts_have_no_floor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minigpt5.tinyworld.pretraining.run.pretrain", lambda *_: None)
    assert main(["pretrain", "--out", str(tmp_path), "--parts", "text", "clip"]) == 0
    assert capsys.readouterr().out == "no floor of their own: clip, text\n"


def test_pretrain_names_a_floor_that_is_not_met(folder, capsys, monkeypatch):
    monkeypatch.setattr("minigpt5.tinyworld.pretraining.run.pretrain", lambda *_: None)
    assert main(["pretrain", "--out", str(folder), "--parts", "scorer"]) == 1
    assert capsys.readouterr().err == "floors not met: retrieval: top-1 of 100\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--count", "150"], "--count 150: give a multiple of 100"),
        (["evaluate", "--weights", "nowhere"], "--weights nowhere: no such folder"),
        (["pretrain", "--out", "x", "--scale", "0"], "--scale 0.0 --pictures 12000: give finite numbers above 0"),
        (
            ["pretrain", "--out", "x", "--scale", "inf"],
            "--scale inf --pictures 12000: give finite numbers above 0",
        ),
        (["pretrain", "--out", "x", "--jobs", "0"], "--jobs 0: give at least 1"),
        (["pretrain", "--out", os.devnull], "cannot be made a folder"),
    ],
)
def test_bad_flags_are_one_clear_error(arguments, message):
    with pytest.raises(InputError, match=message):
        main(arguments)


@pytest.mark.parametrize(("scale", "plain", "rising"), [(1.0, 900, 600), (0.1, 90, 60)])
def test_noise_and_sameness_come_once_captions_are_read(folder, monkeypatch, scale, plain, rising):
    """From the first step, they make states the same by losing what tells scenes apart."""
    diffusion = load_folder_diffusion(folder)
    reader = CaptionReader(diffusion.text_encoder)
    objective = ReadingObjective(reader, diffusion.tokenizer, replace(scaled_recipe("text", scale), batch_size=4))
    seen = []
    forward = reader.reader.forward
    monkeypatch.setattr(reader.reader, "forward", lambda states: seen.append(states) or forward(states))
    shares = []
    for step in (0, plain, plain + rising // 2, plain + rising, plain + 2 * rising):
        objective.step = step
        losses = objective(torch.Generator().manual_seed(0))
        # the same captions in every round, so what changes is the noise
        difference = (seen[-1] - seen[0]).detach()
        shares.append(float(difference.std()))
        assert losses["wording"] > 0
    assert shares[0] == shares[1] == 0
    assert shares[2] == pytest.approx(shares[3] / 2, rel=1e-3) and shares[3] == shares[4] > 0


def test_a_killed_run_does_not_go_on_by_another_schedule(tmp_path, pool):
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        vae_run(folder, pool, stop_after=4)
    for steps in (2, 5, 12):
        message = f"ended at step 4 of 6; with {steps} steps .* give the same --scale, or remove it"
        with pytest.raises(InputError, match=message):
            vae_run(folder, pool, recipe=replace(QUICK, steps=steps))
    vae_run(folder, pool)
    vae_run(folder, pool, recipe=replace(QUICK, steps=2))  # of a run that came to its end, more is no harm


def test_a_resumed_run_goes_on_where_its_objectives_schedule_was(tmp_path):
    class Objective(Scheduled):
        def __init__(self, module):
            self.module, self.seen = module, []

        def __call__(self, generator):
            self.seen.append(self.step)
            return {"loss": self.module.weight.square().sum()}

    seen = []
    for steps in (2, 4):
        module = torch.nn.Linear(2, 2)
        objective = Objective(module)
        train("any", module, objective, replace(QUICK, steps=steps), Place(tmp_path, 0, CPU))
        seen.append(objective.seen)
    assert seen == [[0, 1], [2, 3]]


def test_words_are_read_through_noise_as_loud_as_asked_for(folder):
    def read(noise):
        objective, _ = blank_objective(folder, AccordReader, reading_noise=noise)
        seen = []
        objective.reader.register_forward_hook(lambda _, inputs, __: seen.extend(inputs))
        objective(torch.Generator().manual_seed(0))
        return seen[0].detach()

    clear, some, more = map(read, (0.0, 0.5, 1.5))
    torch.testing.assert_close(more - clear, 3 * (some - clear), atol=1e-4, rtol=1e-4)
    share = (some - clear).square().mean().sqrt() / clear.square().mean().sqrt()
    assert share == pytest.approx(0.5, rel=0.05)
