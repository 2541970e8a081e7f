"""What is wrong with a data file is told before any weights are looked for, in the words of the reader."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt4.errors import InputError
from minigpt5.config import PROJECT_ROOT, DataConfig, RunConfig, load_config
from minigpt5.data.index import LineFile
from minigpt5.data.readers import check_records, open_index
from minigpt5.data.types import Split
from minigpt5.preflight import check_run

VOKENS = "[IMG0]"
DIALOGUE = json.dumps({"conversation_id": 0, "conversation": [{"turn": [{"__TEXT__": "a"}]}] * 2})
STORY = [{"caption": "a", "image_id": "1", "sequence_index": 0}]


def prepare(folder: Path, name: str, text: str, **others: str) -> DataConfig:
    for file, content in {name: text, **{key.replace("__", "."): value for key, value in others.items()}}.items():
        (folder / file).write_text(content, encoding="utf-8")
    return DataConfig(folder=folder, test=Path(name), validation=Path(name), train=Path(name))


def paper_run(data: DataConfig, *, is_training: bool) -> RunConfig:
    """Return a run of the paper's model, whose weights are not there."""
    config = load_config(
        PROJECT_ROOT / "config" / "minigpt5_7b.yaml", {"model.diffusion.weights": "/absent/sd"}, {}
    )
    return replace(config, data=data, is_training=is_training, test_weight=Path("absent.ckpt"))


BAD = {
    "no column": ("a.tsv", "caption\turl\nx\ty\n", {}),
    "no rows": ("a.tsv", "caption\timage_path\n", {}),
    "rows of another width": ("a.tsv", "caption\timage_path\nx\nx\ty\tz\n", {}),
    "not JSON": ("a_cleaned.json", '{"1": [}', {}),
    "a list": ("a_cleaned.json", "[]", {}),
    "no mapping": ("a_cleaned.json", json.dumps({"1": STORY}), {}),
    "misnamed stories": ("stories.json", json.dumps({"1": STORY}), {}),
    "unknown pictures": ("a_cleaned.json", json.dumps({"1": STORY}), {"a_image_mapping__json": "{}"}),
    "torn conversation": ("a.txt", '{"conversation_id": 1, "conversation": [\n', {}),
    "one turn each": ("a.txt", '{"conversation_id": 1, "conversation": [{}]}\n', {}),
    "unknown layout": ("a.csv", "a,b\n1,2\n", {}),
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(("name", "text", "others"), BAD.values(), ids=BAD.keys())
def test_a_bad_data_file_is_told_as_the_reader_does_and_without_weights(tmp_path, name, text, others, is_training):
    data = prepare(tmp_path, name, text, **others)
    options = {"voken_text": VOKENS, "seed": 0, "count_tokens": len}
    with pytest.raises(InputError) as wanted:
        open_index(data, Path(name), Split.TRAIN if is_training else Split.TEST, **options)
    with pytest.raises(InputError) as found:
        check_run(paper_run(data, is_training=is_training))
    message = str(found.value)
    assert message.count(str(wanted.value)) == 1  # the file serves training and validation, and is told of once
    assert "/absent/sd" in message  # so the weights are not needed


GOOD = {
    "cc3m": ("a.tsv", "caption\timage_path\nx\nx\ty\n", {}),
    "vist": ("a_cleaned.json", json.dumps({"0": [], "1": STORY}), {"a_image_mapping__json": '{"1": "1.jpg"}'}),
    "mmdialog": ("a.txt", f"not JSON\n{DIALOGUE}\n", {}),
}


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize(("name", "text", "others"), GOOD.values(), ids=GOOD.keys())
def test_one_usable_record_is_enough(tmp_path, name, text, others, split):
    check_records(prepare(tmp_path, name, text, **others), Path(name), split, voken_text=VOKENS)


def test_a_large_file_is_not_read_whole(tmp_path):
    data = prepare(tmp_path, "a.tsv", "caption\timage_path\nx\ty\n")
    with (tmp_path / "a.tsv").open("r+b") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    check_records(data, Path("a.tsv"), Split.TRAIN, voken_text=VOKENS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_file_whose_first_usable_record_comes_late_passes(tmp_path):
    data = prepare(tmp_path, "a.txt", "x" * 99 + "\n")
    with (tmp_path / "a.txt").open("a", encoding="utf-8") as file:
        file.write(("x" * 99 + "\n") * 20_000 + DIALOGUE + "\n")
    check_records(data, Path("a.txt"), Split.TEST, voken_text=VOKENS)


def test_a_limited_file_ends_with_a_whole_line(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\r\ntwo\rtwo\nthree")
    whole = [b"one", b"two\rtwo", b"three"]
    for limit, count in ((4, 0), (5, 1), (9, 1), (13, 2), (17, 2), (18, 3), (None, 3)):
        lines = LineFile(path, limit)
        assert [lines[number] for number in range(len(lines))] == whole[:count], limit


@pytest.mark.parametrize(
    ("name", "text", "is_training", "is_told"),
    [
        ("a.tsv", "caption\timage_path\nx\ty\n", True, True),
        ("a.tsv", "caption\timage_path\nx\ty\n", False, False),
        ("a.txt", DIALOGUE + "\n", True, False),
    ],
    ids=["CC3M", "generating", "MMDialog"],
)
def test_a_missing_feature_folder_is_told_where_it_is_used(tmp_path, capsys, name, text, is_training, is_told):
    data = replace(prepare(tmp_path, name, text), feature_folder=tmp_path / "absent")
    with pytest.raises(InputError) as told:
        check_run(paper_run(data, is_training=is_training))
    assert "/absent/sd" in str(told.value)
    assert (f"{tmp_path / 'absent'}: no such feature folder" in str(told.value)) is is_told
    is_noticed = "(data.feature_folder) is for CC3M; mmdialog is not trained on" in capsys.readouterr().err
    assert is_noticed is (name == "a.txt")
