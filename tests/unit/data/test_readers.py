"""Detection of layouts, selection of samples, picture checks."""

import json
import os
import pickle
import tracemalloc

import pytest
import torch
from data_helpers import FIXTURES, VOKENS, draw, make_cc3m, make_options, samples_of

from minigpt4.errors import InputError
from minigpt5.config import DataConfig, DatasetName
from minigpt5.data import pictures
from minigpt5.data.cc3m import read_cc3m
from minigpt5.data.encode import Encoder
from minigpt5.data.loading import SampleDataset
from minigpt5.data.mmdialog import read_mmdialog, window_start
from minigpt5.data.pictures import PictureChecker
from minigpt5.data.readers import detect_dataset, open_index, write_problems
from minigpt5.data.types import Problem, Split, Task
from minigpt5.data.vist import read_vist
from minigpt5.images import input_transform, output_transform

ARGUMENTS = {"voken_text": VOKENS, "seed": 0, "count_tokens": len}
VIST = FIXTURES / "data/vist/VIST"
MMDIALOG = FIXTURES / "data/mmdialog/MMDialog/test"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (FIXTURES / "data/cc3m/CC3M/cc3m_val.tsv", DatasetName.CC3M),
        (VIST / "val_cleaned.json", DatasetName.VIST),
        (MMDIALOG / "test_conversations.txt", DatasetName.MMDIALOG),
    ],
)
def test_a_layout_is_known_by_its_content(path, name, tmp_path):
    assert detect_dataset(path) is name
    copy = tmp_path / "data.anything"
    copy.write_bytes(path.read_bytes())
    assert detect_dataset(copy) is name


def test_a_caption_about_a_conversation_makes_no_dialogue(tmp_path):
    path = tmp_path / "train_cleaned.json"
    steps = [{"caption": "conversation was flowing .", "image_id": "1", "sequence_index": 0}]
    path.write_text(json.dumps({"1": steps}, separators=(",", ":")), encoding="utf-8")
    assert detect_dataset(path) is DatasetName.VIST


@pytest.mark.parametrize("folder", [FIXTURES / "data/cc3m/CC3M", VIST, MMDIALOG])
def test_an_index_goes_to_workers_that_do_not_share_memory(folder, tokenizer, vokens):
    name = {"CC3M": "cc3m_val.tsv", "VIST": "val_cleaned.json", "test": "test_conversations.txt"}[folder.name]
    encoder = Encoder(tokenizer, vokens, input_transform(8), output_transform(8))
    arguments = {"voken_text": VOKENS, "seed": 0, "count_tokens": encoder.count_tokens}
    index = open_index(DataConfig(folder=folder), name, Split.TRAIN, **arguments)
    dataset = pickle.loads(pickle.dumps(SampleDataset(index, encoder)))
    for number in (0, len(index) - 1):
        assert dataset.index[number] == index[number]
        assert torch.equal(dataset[0, number].input_ids_T, encoder(index[number]).input_ids_T)


def test_another_layout_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("caption,image_path\n", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"data\.csv: not a known layout; known are\n  cc3m .*\n  vist .*\n  mmdialog"
    ):
        detect_dataset(path)


def test_a_missing_file_is_named_with_its_whole_path(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/none.tsv: no such data file .*DATAFOLDER"):
        open_index(DataConfig(folder=tmp_path), "none.tsv", Split.TRAIN, **ARGUMENTS)


def test_an_unreadable_vist_file_names_the_line(tmp_path):
    (tmp_path / "val_cleaned.json").write_text('{\n"1": [,]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"val_cleaned\.json:2: not JSON"):
        read_vist(tmp_path / "val_cleaned.json", make_options(tmp_path))


def test_tasks_select_variants_and_unknown_ones_are_refused(tmp_path):
    options = make_options(VIST, Split.TEST, tasks=("multimodal", "understanding"))
    samples = samples_of(read_vist(VIST / "val_cleaned.json", options))
    assert {sample.task for sample in samples} == {Task.MULTIMODAL, Task.UNDERSTANDING}
    path = tmp_path / make_cc3m(tmp_path, 2)
    options = make_options(tmp_path, Split.TEST, tasks=("instruction",))
    assert [s.id for s in samples_of(read_cc3m(path, options))] == ["cc3m_0_instruction"]
    for read, file in ((read_cc3m, path), (read_mmdialog, MMDIALOG / "test_conversations.txt")):
        with pytest.raises(InputError, match=r"data\.tasks: no task story here; this data set has"):
            read(file, make_options(tmp_path, tasks=("story",)))


def test_the_history_of_a_dialogue_keeps_two_or_three_turns():
    assert [position - window_start(position) for position in range(1, 9)] == [1, 2, 3, 2, 3, 2, 3, 2]


def test_max_samples_takes_the_first(tmp_path):
    config = DataConfig(folder=tmp_path, max_samples=3)
    index = open_index(config, make_cc3m(tmp_path, 5), Split.TEST, **ARGUMENTS)
    assert [s.id for s in samples_of(index)] == ["cc3m_0", "cc3m_1", "cc3m_2"]


def test_a_repeated_id_is_numbered(caplog):
    config = DataConfig(folder=MMDIALOG, check_images="none")
    index = open_index(config, "test_conversations.txt", Split.TEST, **ARGUMENTS)
    ids = [sample.id for sample in samples_of(index)]
    assert len(ids) == len(set(ids)) and {"3_1-mm", "3_1-mm.2"} <= set(ids)


def test_samples_too_long_for_the_tokenizer_are_left_out(tmp_path):
    config = DataConfig(folder=tmp_path)

    def find_cut(sample):
        return "too long" if sample.id == "cc3m_1" else None

    index = open_index(config, make_cc3m(tmp_path, 3), Split.TEST, find_cut=find_cut, **ARGUMENTS)
    assert [s.id for s in samples_of(index)] == ["cc3m_0", "cc3m_2"]
    assert [p.reason for p in index.problems] == ["too long"]


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("decode", {"none.jpg", "text.jpg", "cut.jpg"}),
        ("header", {"none.jpg", "text.jpg"}),
        ("exists", {"none.jpg"}),
        ("none", set()),
    ],
)
def test_how_pictures_are_checked(tmp_path, how, found):
    good, cut = draw(tmp_path / "good.jpg", size=(64, 64)), draw(tmp_path / "cut.jpg", size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("text", encoding="utf-8")
    paths = [good, cut, tmp_path / "text.jpg", tmp_path / "none.jpg"]
    faults = PictureChecker(how).check(paths)
    assert {path.name for path in faults} == found
    assert all(str(path) in reason for path, reason in faults.items())


def test_decoded_pictures_are_remembered_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "CACHE_WORTH", 2)
    paths, cache = [draw(tmp_path / f"{i}.png") for i in range(3)], tmp_path / "cache.json"
    first = PictureChecker("decode", cache)
    assert first.check(paths) == {}
    first.save()
    assert set(json.loads(cache.read_text("utf-8"))) == {str(path) for path in paths}
    # Same size and time, so the remembered outcome holds although the content is broken.
    stamp = paths[0].stat()
    paths[0].write_bytes(b"x" * stamp.st_size)
    os.utime(paths[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert PictureChecker("decode", cache).check(paths) == {}
    paths[0].write_bytes(b"changed")
    assert set(PictureChecker("decode", cache).check(paths)) == {paths[0]}
    cache.write_text("[broken", encoding="utf-8")
    assert set(PictureChecker("decode", cache).check(paths)) == {paths[0]}


def test_few_pictures_leave_no_cache_file(tmp_path):
    path = make_cc3m(tmp_path, 3)
    open_index(DataConfig(folder=tmp_path), path, Split.TRAIN, **ARGUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cc3m.tsv", "train"]


def test_problems_are_written_as_lines(tmp_path):
    write_problems([Problem("a.tsv:3", "no image_path")], tmp_path / "left_out.jsonl")
    assert json.loads((tmp_path / "left_out.jsonl").read_text("utf-8")) == {
        "source": "a.tsv:3",
        "reason": "no image_path",
    }


def test_a_large_tables_index_is_small(tmp_path):
    rows = 50_000
    lines = (f"a caption of the usual length for picture number {i}\ttrain/{i:09d}.jpg\n" for i in range(rows))
    (tmp_path / "large.tsv").write_text("caption\timage_path\n" + "".join(lines), encoding="utf-8")
    index = open_index(DataConfig(folder=tmp_path, check_images="none"), "large.tsv", Split.TRAIN, **ARGUMENTS)
    assert len(index) == rows + rows // 100
    tracemalloc.start()
    read_cc3m(tmp_path / "large.tsv", make_options(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
