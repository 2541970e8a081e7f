from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigpt4.errors import InputError
from minigpt5.metrics.clip import load_clip
from minigpt5.metrics.image import read_picture
from minigpt5.metrics.suites import score
from tests.unit.metrics.small_store import MODELS, StoreBuilder, picture

NO_FOLDER = Path("no/such/folder")


def _similarity(store: StoreBuilder, first: str, second: str) -> float:
    clip = load_clip(str(MODELS / "clip_tiny"), "", torch.device("cpu"))
    rows = clip.pictures.encode([read_picture(store.folder / name) for name in (first, second)])
    return float(rows[0] @ rows[1])


def test_every_picture_of_a_reply_counts(tmp_path, networks):
    store = StoreBuilder(tmp_path, "vist")
    store.add(
        "a_0-mm", [picture(1), picture(2)], [picture(3), picture(4)], None, "[IMG0] [IMG0] ###", "two [IMG0]"
    )
    store.add("a_1-mm", [picture(5)], [picture(6)], None, "[IMG0] ###", "one [IMG0]")
    predictions = store.read()
    scores = score("vist", predictions, tmp_path, networks, NO_FOLDER)
    first = predictions[0]
    pairs = [
        _similarity(store, made, wanted) for made, wanted in zip(first.images, first.target_images, strict=True)
    ]
    assert scores.samples[0]["clip_similarity"] == pytest.approx(sum(pairs) / 2, abs=1e-6)
    assert scores.samples[0]["published_clip_similarity"] == pytest.approx(pairs[0], abs=1e-6)
    assert scores.scores["inception_score"].count == 3
    assert scores.scores["published_inception_score"].count == 2


def test_text_similarity_takes_the_caption(tmp_path, networks):
    store = StoreBuilder(tmp_path, "cc3m")
    store.add("cc3m_0", [picture(1)], [picture(1)], None, "[IMG0] ###", "[IMG0][IMG1] ###", caption="a red dog")
    scores = score("cc3m", store.read(), tmp_path, networks, NO_FOLDER)
    clip = load_clip(str(MODELS / "clip_tiny"), "", torch.device("cpu"))
    row = clip.pictures.encode([picture(1)])[0]
    expected = [float(row @ text) for text in clip.texts.encode(["a red dog", "[IMG0][IMG1] ###"])]
    assert scores.samples[0]["clip_text_similarity"] == pytest.approx(expected[0], abs=1e-6)
    assert scores.published["overall_clip_t_similarity"] == pytest.approx(expected[1], abs=1e-6)
    assert scores.samples[0]["clip_similarity"] == pytest.approx(1.0, abs=1e-6)


def test_a_perfect_dialogue_is_fully_relevant(tmp_path, networks):
    store = StoreBuilder(tmp_path, "mmdialog")
    store.add("0_1", [picture(1)], [picture(1)], None, "a dog [IMG0] ###", "a dog [IMG0][IMG1] ###")
    store.add("0_2", [], [picture(2)], None, "a cat ###", "a cat [IMG0][IMG1] ###")
    scores = score("mmdialog", store.read(), tmp_path, networks, NO_FOLDER)
    assert scores.samples[0]["mm_relevance"] == pytest.approx(1.0, abs=1e-5)
    # One of two wanted elements is there: precision 1, recall 1/2.
    assert scores.samples[1]["mm_relevance"] == pytest.approx(2 / 3, abs=1e-5)
    # One soft F1 over both turns: three of four elements.
    assert scores.published["overall_clip_f1"] == pytest.approx(2 * 1 * 0.75 / 1.75, abs=1e-5)
    assert scores.coverage.image_missing_rate == 0.5
    assert scores.scores["bleu_1"].value == pytest.approx(1.0)


def test_baseline_pictures_of_a_dialogue_are_scored(tmp_path, networks):
    store = StoreBuilder(tmp_path, "mmdialog")
    store.add("0_1", [picture(1)], [picture(1)], picture(2), "a dog", "a dog", caption="a dog")
    scores = score("mmdialog", store.read(), tmp_path, networks, NO_FOLDER)
    assert scores.samples[0]["baseline_clip_similarity"] is not None


def test_networks_are_declared(tmp_path, networks):
    store = StoreBuilder(tmp_path, "vist")
    for step in range(2):
        store.add(f"a_{step}", [picture(step)], [picture(step + 5)], None, "a dog", "a dog")
    scores = score("vist", store.read(), tmp_path, networks, NO_FOLDER)
    assert set(scores.networks) == {"clip", "fid", "inception", "sentence_encoder", "meteor"}
    assert scores.networks["sentence_encoder"].startswith("text tower of local CLIP")
    assert "not with published" in scores.notes[-1]


def test_networks_are_loaded_only_where_needed(tmp_path, networks):
    store = StoreBuilder(tmp_path, "mmdialog")
    store.add("0_1", text="a dog", target="a dog")
    absent = replace(networks, fid_network="absent.safetensors", inception_network="absent.safetensors")
    assert score("mmdialog", store.read(), tmp_path, absent, NO_FOLDER).scores["inception_score"].value is None


def test_unknown_data_set_lists_the_known_ones(tmp_path, networks):
    with pytest.raises(InputError, match="cc3m, vist, mmdialog"):
        score("coco", [], tmp_path, networks, NO_FOLDER)


def test_device_that_is_not_there_is_named(tmp_path, networks):
    store = StoreBuilder(tmp_path, "mmdialog")
    store.add("0_1", text="a dog", target="a dog")
    with pytest.raises(InputError, match=r"metrics\.device: 'nowhere'"):
        score("mmdialog", store.read(), tmp_path, replace(networks, device="nowhere"), NO_FOLDER)
