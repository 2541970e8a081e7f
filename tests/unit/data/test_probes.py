"""A decided outcome for every malformed input on record; docs/data.md lists them."""

import json
import re
import shutil

import pytest
from data_helpers import FIXTURES, VOKENS, make_options, samples_of

from minigpt4.errors import InputError
from minigpt5.config import DataConfig
from minigpt5.data.cc3m import read_cc3m
from minigpt5.data.mmdialog import read_mmdialog
from minigpt5.data.pictures import PictureChecker
from minigpt5.data.readers import detect_dataset, open_index
from minigpt5.data.types import Split
from minigpt5.data.vist import read_vist

FIRST = ["cc3m_0", "cc3m_0_instruction"]

# Probe → (ids of the samples, words of each problem in order) of the training split.
CC3M = {
    "caption 'NA' parsed as missing": ([*FIRST, "cc3m_1"], []),
    "caption 'null'": ([*FIRST, "cc3m_1"], []),
    "caption 'None'": ([*FIRST, "cc3m_1"], []),
    "caption 'nan'": (FIRST, []),
    "empty caption field": ([*FIRST, "cc3m_1"], []),
    "all captions numeric": ([*FIRST, "cc3m_1"], []),
    "numeric caption among text": ([*FIRST, "cc3m_1"], []),
    "all captions boolean words": ([*FIRST, "cc3m_1"], []),
    "field opens with an unclosed quote": ([*FIRST, "cc3m_1", "cc3m_2", "cc3m_3"], []),
    "quote opens in one row, closes in a later one": ([*FIRST, "cc3m_1", "cc3m_2", "cc3m_3", "cc3m_4"], []),
    "field fully quoted": ([*FIRST, "cc3m_1"], []),
    "extra tab in a row": (FIRST, [r":3 2 tab-separated fields wanted, found 3"]),
    "row lacks image_path": (FIRST, [r":3 2 tab-separated fields wanted, found 1"]),
    "blank line in file": ([*FIRST, "cc3m_1"], []),
    "no rows": ([], []),
    "CRLF line ends": ([*FIRST, "cc3m_1"], []),
    "hash in caption": (FIRST, []),
    "caption that cleans to empty, train item 2": ([*FIRST, "cc3m_1"], []),
    "image file absent, item": (FIRST, []),
}
CC3M_CAPTIONS = {
    "caption 'NA' parsed as missing": "na",
    "caption 'null'": "null",
    "caption 'None'": "none",
    "caption 'nan'": "nan",
    "empty caption field": "",
    "all captions numeric": "34",
    "all captions boolean words": "false",
    "field fully quoted": "say hi now",
    "CRLF line ends": "a cat",
    "hash in caption": "1 dog",
}
VIST = {
    "image id absent from mapping": (["1_0-gen"], [r"step 1 picture 'nope' is not in the picture mapping"]),
    "step lacks caption": ([], ["step 0 no caption"]),
    "step lacks sequence_index": ([], ["step 0 no sequence_index"]),
    "caption is null": ([], ["step 0 the caption is no text"]),
    "image_id is an int": (["1_0-gen"], []),
    "empty file {}": ([], []),
    "mapping path is absolute": (["1_0-gen"], []),
}
MMDIALOG = {
    "image-only turn (first part is media)": (["9_1-mm"], [r":2 turn 1: a turn holds a text part"]),
    "turn with no parts": ([], ["turn 1: a turn holds a text part"]),
    "two text parts in one turn": ([], ["turn 1: a turn holds a text part"]),
    "text is null": ([], ["turn 0: no text"]),
    "conversation_id absent": ([], [":1 no conversation_id"]),
    "conversation absent": ([], [":1 no conversation"]),
    "conversation of one turn": ([], []),
    "all images undecodable: 10 retries then?": (["1_1-mm"], []),
    "one good sample and one undecodable": (["9_1-mm", "1_1-mm"], []),
    "media key with sub-folder traversal": (["1_1-mm"], []),
    "media key already ends in .jpg": ([], [r"turn 0: no picture .*-8833701000000000000\.jpg\.jpg"]),
}
# Probes of caches and file names, which have tests of their own below.
OTHERS = {
    "wrong header names",
    "caption that cleans to empty, test item 1",
    "cache: train first, then test",
    "cache: test first, then train",
    "cache: tsv edited after first use",
    "cache: data edited after first train use",
    "data path without '.tsv'",
    "stories given as a list",
    "file name lacks 'cleaned'",
    "folder name holds 'cleaned'",
    "blank line in file",
    "no final newline",
    "data path without '.txt' [test]",
    "data path without '.txt' [train]",
}


def probes(name: str) -> dict:
    return {p["probe"]: p for p in json.loads((FIXTURES / "probes" / f"data_{name}.json").read_text("utf-8"))}


def check(index, ids, problems):
    assert [sample.id for sample in samples_of(index)] == ids
    found = [f"{problem.source} {problem.reason}" for problem in index.problems]
    assert len(found) == len(problems), found
    for line, words in zip(found, problems, strict=True):
        assert re.search(words, line), line


@pytest.mark.parametrize("name", ["cc3m", "vist", "mmdialog"])
def test_every_probe_is_decided(name):
    decided = {"cc3m": CC3M, "vist": VIST, "mmdialog": MMDIALOG}[name]
    plain = {re.sub(r" \[(train|test)\]$", "", probe) if probe not in OTHERS else probe for probe in probes(name)}
    assert plain - decided.keys() - OTHERS == set()


@pytest.mark.parametrize("probe", CC3M)
def test_cc3m(probe, tmp_path):
    path = tmp_path / "probe.tsv"
    path.write_bytes(probes("cc3m")[probe]["input"].encode())
    index = read_cc3m(path, make_options(tmp_path))
    check(index, *CC3M[probe])
    if probe in CC3M_CAPTIONS:
        assert index[len(index) - 1].caption == CC3M_CAPTIONS[probe]


def test_cc3m_wrong_header(tmp_path):
    path = tmp_path / "probe.tsv"
    path.write_text(probes("cc3m")["wrong header names"]["input"], encoding="utf-8")
    with pytest.raises(InputError, match=r"probe\.tsv:1: no column caption and image_path"):
        read_cc3m(path, make_options(tmp_path))


def test_cc3m_empty_caption_in_the_test_split_is_an_empty_text(tmp_path):
    path = tmp_path / "probe.tsv"
    path.write_text(probes("cc3m")["caption that cleans to empty, test item 1"]["input"], encoding="utf-8")
    samples = samples_of(read_cc3m(path, make_options(tmp_path, Split.TEST)))
    assert [(s.id, s.prompt, s.response) for s in samples] == [("cc3m_0", "a dog", "a dog"), ("cc3m_1", "", "")]


def test_cc3m_is_read_anew_for_each_split_and_after_an_edit(tmp_path):
    path = tmp_path / "probe.csv"  # the suffix decides nothing
    path.write_text("caption\timage_path\na dog\tx.jpg\na cat\tx.jpg\n", encoding="utf-8")
    assert detect_dataset(path) == "cc3m"
    train = read_cc3m(path, make_options(tmp_path))
    test = read_cc3m(path, make_options(tmp_path, Split.TEST))
    assert [s.response for s in samples_of(train)] == [f"{VOKENS} ###"] * 3
    assert [s.id for s in samples_of(test)] == ["cc3m_0", "cc3m_1"]
    path.write_text("caption\timage_path\na bird\tx.jpg\n", encoding="utf-8")
    assert read_cc3m(path, make_options(tmp_path))[0].caption == "a bird"
    assert [p.name for p in tmp_path.iterdir()] == ["probe.csv"]


def write_vist(folder, values, name="val_cleaned.json"):
    folder.mkdir(parents=True, exist_ok=True)
    mapping = json.loads((FIXTURES / "data/vist/VIST/val_image_mapping.json").read_text("utf-8"))
    if values.get("mapping"):
        mapping = {"q": str(FIXTURES / "data/vist/VIST/val_images/000000000.jpg")}
    (folder / name.replace("cleaned", "image_mapping")).write_text(json.dumps(mapping), encoding="utf-8")
    (folder / name).write_text(json.dumps(values["stories"]), encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("probe", VIST)
def test_vist(probe, tmp_path):
    path = write_vist(tmp_path, probes("vist")[probe]["input"])
    index = read_vist(path, make_options(FIXTURES / "data/vist/VIST"))
    check(index, *VIST[probe])
    for sample in samples_of(index):
        assert sample.output_images[0].is_file()


def test_vist_stories_given_as_a_list(tmp_path):
    path = write_vist(tmp_path, probes("vist")["stories given as a list"]["input"])
    with pytest.raises(InputError, match=r"val_cleaned\.json: a JSON object wanted .* found list"):
        read_vist(path, make_options(tmp_path))


def test_vist_mapping_is_found_by_the_file_name_alone(tmp_path):
    stories = {"stories": {"1": [{"caption": "a", "image_id": "500000", "sequence_index": 0}]}}
    path = write_vist(tmp_path / "cleaned", stories)
    assert len(read_vist(path, make_options(tmp_path))) == 1
    misnamed = path.rename(path.with_name("stories.json"))
    with pytest.raises(InputError, match=r"stories\.json: a VIST story file is named \*cleaned\*"):
        read_vist(misnamed, make_options(tmp_path))


def write_mmdialog(folder, records, name="conversations.txt"):
    shutil.copytree(FIXTURES / "data/mmdialog/MMDialog/test", folder, ignore=shutil.ignore_patterns("*.txt"))
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
@pytest.mark.parametrize("probe", MMDIALOG)
def test_mmdialog(probe, split, tmp_path):
    path = write_mmdialog(tmp_path / "test", probes("mmdialog")[f"{probe} [{split}]"]["input"])
    check(read_mmdialog(path, make_options(tmp_path, split)), *MMDIALOG[probe])


def turns(*texts):
    return [{"turn": [{"__TEXT__": text}]} for text in texts]


def test_mmdialog_lines_may_be_blank_broken_or_without_final_newline(tmp_path):
    good = json.dumps({"conversation_id": 9, "conversation": turns("hello there", "hi you")})
    path = write_mmdialog(tmp_path / "test", [], name="conv.jsonl")
    path.write_text(f"{good}\n\n{good[:30]}\n{good}", encoding="utf-8")
    assert detect_dataset(path) == "mmdialog"
    index = read_mmdialog(path, make_options(tmp_path))
    check(index, ["9_1-mm", "9_1-mm"], [r"conv\.jsonl:3 not JSON"])
    assert path.read_text("utf-8").endswith(good)


def test_half_a_letter_leaves_its_record_out(tmp_path):
    """JSON can escape half of an emoji, which no tokenizer takes."""
    half = "hi \\ud83d"
    good = json.dumps({"conversation_id": 9, "conversation": turns("hello there", "hi you")})
    path = write_mmdialog(tmp_path / "test", [])
    path.write_text(f"{good.replace('hi you', half)}\n{good}\n", encoding="utf-8")
    problem = r"conversations\.txt:1 turn 1: the text is not valid Unicode \('\\ud83d'\)"
    check(read_mmdialog(path, make_options(tmp_path)), ["9_1-mm"], [problem])


def test_mmdialog_is_cut_at_long_turns_in_training_only_and_read_anew_after_an_edit(tmp_path):
    records = [{"conversation_id": 1, "conversation": turns("hello", "word " * 60, "bye")}]
    path = write_mmdialog(tmp_path / "test", records)
    for split, ids in ((Split.TEST, ["1_1-mm", "1_2-mm"]), (Split.TRAIN, []), (Split.TEST, ["1_1-mm", "1_2-mm"])):
        check(read_mmdialog(path, make_options(tmp_path, split)), ids, [])
    path.write_text(json.dumps({"conversation_id": 2, "conversation": turns("hello", "bye")}), encoding="utf-8")
    check(read_mmdialog(path, make_options(tmp_path)), ["2_1-mm"], [])


def test_pictures_that_cannot_be_read_leave_their_samples_out(tmp_path, caplog):
    good, bad = probes("mmdialog")["one good sample and one undecodable [train]"]["input"]
    path = write_mmdialog(tmp_path / "test", [good, bad])
    config = DataConfig(folder=tmp_path / "test")
    arguments = {"voken_text": VOKENS, "seed": 0, "count_tokens": len}
    index = open_index(config, path, Split.TRAIN, **arguments)
    check(index, ["9_1-mm"], [r"1_1-mm .*111\.jpg: not a readable picture"])
    assert "1 samples; 1 records left out" in caplog.text and "111.jpg" in caplog.text
    path.write_text(json.dumps(bad), encoding="utf-8")
    with pytest.raises(InputError, match=r"no usable sample\n.*111\.jpg: not a readable picture"):
        open_index(config, path, Split.TRAIN, **arguments)


def test_cc3m_absent_picture(tmp_path):
    path = tmp_path / "none.jpg"
    assert PictureChecker("exists").check([path]) == {path: f"{path}: no such picture"}
