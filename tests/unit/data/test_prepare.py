"""Prepared files are read back by the readers."""

import json

import pytest
from data_helpers import draw, make_options, samples_of

from minigpt4.errors import InputError
from minigpt5.data.cc3m import read_cc3m
from minigpt5.data.prepare.__main__ import main
from minigpt5.data.prepare.cc3m import write_cc3m
from minigpt5.data.prepare.vist import write_vist
from minigpt5.data.types import Split
from minigpt5.data.vist import read_vist


def test_an_img2dataset_folder_becomes_a_table(tmp_path, capsys):
    for name, suffix, content in (
        ("000000001", ".txt", "A dog\twith\na bone ."),
        ("000000000", ".json", json.dumps({"caption": 'Say "hi"', "status": "success"})),
        ("000000002", ".json", json.dumps({"caption": None})),
        ("000000003", None, ""),
    ):
        picture = draw(tmp_path / "train" / "00000" / f"{name}.jpg")
        if suffix:
            picture.with_suffix(suffix).write_text(content, encoding="utf-8")
    (tmp_path / "train" / "00000_stats.json").write_text("{}", encoding="utf-8")
    main(["cc3m", "--images", str(tmp_path / "train"), "--out", str(tmp_path / "cc3m_train.tsv")])
    assert "2 rows written" in capsys.readouterr().out
    samples = samples_of(read_cc3m(tmp_path / "cc3m_train.tsv", make_options(tmp_path, Split.TEST)))
    assert [sample.caption for sample in samples] == ["say hi", "a dog with a bone"]
    assert all(sample.output_images[0].is_file() for sample in samples)


def test_unusable_cc3m_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="--images .*none: no such folder"):
        write_cc3m(tmp_path / "none", tmp_path / "x.tsv")
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="no pictures with a"):
        write_cc3m(tmp_path / "a", tmp_path / "x.tsv")
    with pytest.raises(InputError, match="must lie below"):
        write_cc3m(tmp_path / "a", tmp_path / "b" / "x.tsv")


def annotation(story, photo, order, text):
    return {
        "story_id": story,
        "photo_flickr_id": photo,
        "worker_arranged_photo_order": order,
        "text": text,
        "original_text": text.upper(),
    }


def write_annotations(path, groups):
    path.write_text(json.dumps({"images": [], "annotations": groups}), encoding="utf-8")
    return path


def test_official_stories_become_the_readers_two_files(tmp_path, capsys):
    for photo in ("11", "12"):
        draw(tmp_path / "VIST" / "val_images" / f"{photo}.jpg")
    groups = [
        [annotation("40", "12", 1, "then this .")],
        [annotation("40", "11", 0, "first that .")],
        [annotation("41", "11", 0, "a story")],
        [annotation("41", "99", 1, "with a gap")],
    ]
    source, out = write_annotations(tmp_path / "val.json", groups), tmp_path / "VIST"
    main(["vist", "--annotations", str(source), "--images", str(out / "val_images"), "--out", str(out)])
    assert "1 stories written" in capsys.readouterr().out
    mapping = json.loads((out / "val_image_mapping.json").read_text("utf-8"))
    assert mapping == {"11": "val_images/11.jpg", "12": "val_images/12.jpg"}
    samples = samples_of(read_vist(out / "val_cleaned.json", make_options(out, Split.TEST)))
    assert [sample.id for sample in samples] == ["40_0-gen", "40_1-gen"]
    assert "first that .<Img><ImageHere></Img>" in samples[1].prompt and "then this ." in samples[1].prompt
    assert all(sample.output_images[0].is_file() for sample in samples)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("{}", "not a VIST story-in-sequence file"),
        ('{"annotations": [[{}]]}', "not a VIST story"),
    ],
)
def test_unusable_annotations_are_named(tmp_path, content, words):
    path = tmp_path / "val.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"val\.json: {words}"):
        write_vist(path, tmp_path, tmp_path / "out", "val")


def test_no_whole_story_is_an_error(tmp_path):
    path = write_annotations(tmp_path / "val.json", [[annotation("1", "5", 0, "x")]])
    with pytest.raises(InputError, match="none of 1 stories has all its pictures"):
        write_vist(path, tmp_path, tmp_path / "out", "val")
