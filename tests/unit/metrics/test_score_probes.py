"""What the published evaluation does with odd input is recorded; each case has a decided outcome here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt4.errors import InputError
from minigpt5.config import MetricsConfig
from minigpt5.metrics.scores import Scores
from minigpt5.metrics.suites import score
from tests.unit.metrics.small_store import MODELS, StoreBuilder, picture

PROBES = MODELS.parents[1] / "probes" / "metrics.json"
VOKENS = "[IMG0][IMG1] ###"
ROOM = Path("no/such/folder")
Check = Callable[[Path, MetricsConfig], None]
CHECKS: dict[tuple[str, str], Check] = {}


def outcome(function: str, *probes: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS.update({(function, probe): check for probe in probes})
        return check

    return register


def scored(store: StoreBuilder, networks: MetricsConfig, real: Path = ROOM) -> Scores:
    return score(store.dataset, store.read(), store.folder, networks, real)


def cc3m(folder: Path, count: int = 4, baseline: bool = True) -> StoreBuilder:
    store = StoreBuilder(folder / "cc3m", "cc3m")
    for index in range(count):
        nl = picture(index + 20) if baseline else None
        store.add(f"cc3m_{index}", [picture(index)], [picture(index + 10)], nl, VOKENS, f"a dog {index}")
    return store


def real_pictures(folder: Path, pattern: str = "val/00000/{}.jpg", first: int = 40) -> Path:
    for index in range(5):
        path = folder / pattern.format(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(first + index).save(path, format="JPEG")
    return folder


def story(store: StoreBuilder, name: str, steps: str, suffix: str = "-gen") -> None:
    """Add one story; per step ``.`` has all pictures, ``n`` no baseline, ``x`` no generated picture."""
    for index, kind in enumerate(steps):
        seed = len(store.store.done)
        made = [] if kind == "x" else [picture(seed)]
        baseline = picture(seed + 60) if kind == "." else None
        store.add(f"{name}_{index}{suffix}", made, [picture(seed + 30)], baseline, VOKENS, VOKENS)


def vist(folder: Path, **stories: str) -> StoreBuilder:
    store = StoreBuilder(folder / "vist", "vist")
    for name, steps in stories.items():
        story(store, name, steps)
    return store


def dialogue(folder: Path, *turns: tuple[str, str, str], pictures: str = "") -> StoreBuilder:
    """Add turns ``(id, text, target)``; ``pictures`` has per turn ``.`` for both, ``w`` wanted, ``-`` none."""
    store = StoreBuilder(folder / "mmdialog", "mmdialog")
    kinds = pictures or "." * len(turns)
    for index, ((sample_id, text, target), kind) in enumerate(zip(turns, kinds, strict=True)):
        made = [picture(index)] if kind == "." else []
        wanted = [picture(index + 5)] if kind in ".w" else []
        store.add(sample_id, made, wanted, text=text, target=target)
    return store


@outcome("cc3m_calculate_metrics", "image but no baseline image")
def baseline_scores_are_null(folder, networks):
    scores = scored(cc3m(folder, baseline=False), networks, real_pictures(folder))
    assert scores.published["overall_fid_score"] is not None
    assert scores.published["overall_basline_fid_score"] is None
    assert scores.scores["baseline_clip_similarity"].count == 0


@outcome("cc3m_calculate_metrics", "no image predicted at all")
def every_score_is_null_and_the_missing_rate_one(folder, networks):
    store = StoreBuilder(folder / "cc3m", "cc3m")
    for index in range(3):
        store.add(f"cc3m_{index}", wanted=[picture(index)], text="no picture", target="a dog")
    scores = scored(store, networks, real_pictures(folder))
    assert all(one.value is None for one in scores.scores.values())
    assert scores.coverage.image_missing_rate == 1.0
    assert set(scores.published.values()) == {None}


@outcome("cc3m_calculate_metrics", "one prediction")
def one_picture_has_similarities_but_no_fid(folder, networks):
    scores = scored(cc3m(folder, count=1), networks, real_pictures(folder))
    assert scores.scores["fid"].value is None
    assert scores.published["overall_fid_score"] is None
    assert scores.scores["clip_similarity"].count == 1


@outcome("cc3m_calculate_metrics", "no real images under val/*/*.jpg (the sample data is val/*.jpg)")
def flat_val_folder_is_used_and_a_missing_one_noted(folder, networks):
    store = cc3m(folder)
    flat = scored(store, networks, real_pictures(folder / "flat", "val/{}.jpg"))
    nested = scored(store, networks, real_pictures(folder / "nested"))
    assert flat.scores["fid"].value == nested.scores["fid"].value is not None
    missing = scored(store, networks, folder / "absent")
    assert missing.scores["fid"].value is None
    assert "CC3M_FOLDER" in missing.notes[0]


@outcome("cc3m_calculate_metrics", "empty prediction list")
@outcome("mmdialog_calculate_metrics", "empty prediction list")
def nothing_to_score_is_an_input_error(folder, networks):
    for dataset in ("cc3m", "vist", "mmdialog"):
        with pytest.raises(InputError, match="no predictions"):
            score(dataset, [], folder, networks, ROOM)


@outcome("cc3m_calculate_metrics", "CC3M_FOLDER relative (its default)")
def relative_real_folder_works(folder, networks):
    real_pictures(folder / "datasets" / "CC3M")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        scores = scored(cc3m(folder), networks, Path("datasets/CC3M"))
    assert scores.scores["fid"].value is not None


@outcome("cc3m_calculate_metrics", "fid_real_feaures.pt left in the working folder by another data set")
def each_real_set_is_read_anew(folder, networks):
    store = cc3m(folder)
    first = scored(store, networks, real_pictures(folder / "first"))
    second = scored(store, networks, real_pictures(folder / "second", first=90))
    assert first.scores["fid"].value != second.scores["fid"].value


@outcome("cc3m_calculate_metrics", "bfloat16 ground truth with torchvision 0.29.2 unpatched")
@outcome("vist_calculate_metrics", "bfloat16 ground truth with torchvision 0.29.2 unpatched")
@outcome("mmdialog_calculate_metrics", "bfloat16 ground truth with torchvision 0.29.2 unpatched")
def wanted_pictures_are_png_files(folder, networks):
    assert scored(cc3m(folder), networks).scores["clip_similarity"].count == 4
    assert scored(vist(folder, a=".."), networks).scores["clip_similarity"].count == 2
    turns = dialogue(folder, ("0_1", "a dog", "a cat"))
    assert scored(turns, networks).scores["clip_similarity"].count == 1


@outcome("vist_calculate_metrics", "one step of a story has no image")
def story_is_scored_over_its_other_steps(folder, networks):
    scores = scored(vist(folder, a="..x.", b=".x"), networks)
    assert (scores.scores["published_story_fid"].count, scores.scores["published_story_fid"].total) == (1, 2)
    assert scores.coverage.missing_images == 2


@outcome("vist_calculate_metrics", "first step has a baseline image, a later one not")
@outcome("vist_calculate_metrics", "first step lacks the baseline image, later ones have it")
def baseline_story_is_scored_over_the_steps_that_have_one(folder, networks):
    scores = scored(vist(folder, a="..n", b="n..", c=".nn"), networks)
    baseline = scores.scores["published_baseline_story_fid"]
    assert (baseline.count, baseline.total) == (2, 3)


@outcome("vist_calculate_metrics", "only stories of one step")
def no_story_fid_without_stories(folder, networks):
    scores = scored(vist(folder, a=".", b=".", c="."), networks)
    assert scores.scores["published_story_fid"].value is None
    assert scores.scores["published_story_fid"].total == 0
    assert scores.scores["fid"].value is not None


@outcome("vist_calculate_metrics", "story id with underscore", "negative sequence index")
def story_ids_may_hold_underscores_and_negative_steps(folder, networks):
    store = vist(folder, a_b_c="..")
    store.add("d_-1-gen", [picture(1)], [picture(2)], None, VOKENS, VOKENS)
    store.add("d_0-gen", [picture(3)], [picture(4)], None, VOKENS, VOKENS)
    assert scored(store, networks).scores["published_story_fid"].count == 2
    store.add("nostep", [picture(3)], [picture(4)])
    with pytest.raises(InputError, match="nostep"):
        scored(store, networks)


@outcome("vist_calculate_metrics", "images of different aspect in one story")
def pictures_of_a_story_may_differ_in_aspect(folder, networks):
    store = vist(folder)
    store.add("a_0-gen", [picture(1, (64, 40))], [picture(2)], None, VOKENS, VOKENS)
    store.add("a_1-gen", [picture(3, (40, 64))], [picture(4)], None, VOKENS, VOKENS)
    assert scored(store, networks).scores["published_story_fid"].count == 1


@outcome("vist_calculate_metrics", "one prediction")
def one_step_has_similarities_but_no_fid(folder, networks):
    scores = scored(vist(folder, a="."), networks)
    assert scores.scores["fid"].value is None
    assert scores.scores["clip_similarity"].value is not None


@outcome("vist_calculate_metrics", "one baseline image in all")
def one_baseline_has_no_fid(folder, networks):
    scores = scored(vist(folder, a=".nn"), networks)
    assert scores.published["overall_instance_basline_fid_score"] is None
    assert scores.published["overall_instance_fid_score"] is not None
    assert scores.scores["baseline_clip_similarity"].count == 1


@outcome("vist_calculate_metrics", "gen, multimodal and understanding samples of the same step")
def variants_of_a_step_do_not_overwrite_each_other(folder, networks):
    store = vist(folder)
    story(store, "a", "..")
    story(store, "a", "..", suffix="-mm")
    store.add("a_0-und", text="a dog ###", target="a dog ###")
    store.add("a_1-und", text="a cat ###", target="a dog ###")
    scores = scored(store, networks)
    # The understanding variant has no pictures, so its group has no distance.
    assert (scores.scores["published_story_fid"].count, scores.scores["published_story_fid"].total) == (2, 3)
    assert scores.scores["bleu_1"].count == 2


@outcome(
    "mmdialog_calculate_metrics",
    "no image predicted at all",
    "no image predicted, calculate_instace_level=False",
    "image predicted, calculate_instace_level=False",
)
def inception_score_is_there_if_pictures_are(folder, networks):
    turns = [("0_1", "a dog", "a dog"), ("0_2", "a cat", "a dog")]
    without = scored(dialogue(folder / "none", *turns, pictures="w-"), networks)
    assert without.published["overall_instance_inception_score"] is None
    assert without.published["overall_bleu_score_1"] is not None
    assert without.coverage.image_missing_rate == 1.0
    with_pictures = scored(dialogue(folder / "some", *turns), networks)
    assert with_pictures.published["overall_instance_inception_score"] >= 1.0 - 1e-6


@outcome(
    "mmdialog_calculate_metrics",
    "conversation id with underscore",
    "conversation id with hyphen",
    "negative conversation id",
)
def conversation_ids_may_hold_anything_before_the_turn(folder, networks):
    names = ["a_b_1-mm", "a_b_2-mm", "c-d_1-mm", "-7_1-mm"]
    scores = scored(dialogue(folder, *((name, "a dog", "a dog") for name in names)), networks)
    assert scores.scores["published_clip_f1"].total == 3


@outcome("mmdialog_calculate_metrics", "no text anywhere")
def text_scores_are_null_without_text(folder, networks):
    scores = scored(dialogue(folder, ("0_1", VOKENS, VOKENS), ("1_1", VOKENS, VOKENS)), networks)
    assert scores.published["overall_bleu_score_1"] is None
    assert scores.scores["bleu_1"].value is None
    assert scores.published["overall_clip_f1"] is not None


@outcome(
    "mmdialog_calculate_metrics",
    "600 against 600 words in one sentence",
    "400 against 400 words",
    "1100 equal words in one sentence",
)
def long_texts_are_scored(folder, networks):
    words = " ".join(f"w{index}" for index in range(1100))
    others = " ".join(f"v{index}" for index in range(600))
    scores = scored(dialogue(folder, ("0_1", words, words), ("1_1", words, others), pictures="--"), networks)
    assert [round(sample["rouge_l"], 6) for sample in scores.samples] == [1.0, 0.0]


@outcome("mmdialog_calculate_metrics", "prediction text '. .'")
def punctuation_with_spaces_is_no_text(folder, networks):
    scores = scored(dialogue(folder, ("0_1", ". . ###", "a dog. ###")), networks)
    assert scores.scores["bleu_1"].value == 0.0
    assert scores.coverage.missing_texts == 1
    # The published figure counts it as text, and finds the space and the full stop again.
    assert scores.published["overall_bleu_score_1"] > 0


@pytest.mark.parametrize("case", sorted({check.__name__ for check in CHECKS.values()}))
def test_decided_outcome(case, tmp_path, networks):
    next(check for check in CHECKS.values() if check.__name__ == case)(tmp_path, networks)


def test_every_recorded_case_has_a_decided_outcome():
    recorded = json.loads(PROBES.read_text(encoding="utf-8"))["probes"]
    assert {(probe["function"], probe["probe"]) for probe in recorded} == set(CHECKS)
