import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.errors import InputError
from minigpt5.config import PROJECT_ROOT, DataConfig, DatasetName
from minigpt5.data.readers import detect_dataset, open_index
from minigpt5.data.types import Split
from minigpt5.tinyworld.__main__ import main
from minigpt5.tinyworld.datasets import Sizes, media_id, picture_scene, write_datasets
from minigpt5.tinyworld.dialogues import make_dialogue
from minigpt5.tinyworld.recogniser import recognise
from minigpt5.tinyworld.stories import make_story

SEED = 0
SIZES = Sizes(train=6, validation=5, test=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_datasets(folder, SIZES, SEED)
    return folder


@pytest.mark.parametrize("name", ["CC3M", "CC3M/val", "VIST", "MMDialog"])
def test_a_file_where_a_folder_belongs_is_one_clear_error(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"--out {tmp_path}: cannot write .*/{name}.*; give another or remove it"):
        main(["data", "--out", str(tmp_path), "--val", "2"])


def same(picture_path, scene):
    found = recognise(Image.open(picture_path))
    return (set(found.things), found.background) == (set(scene.things), scene.background)


def test_cc3m_layout(world):
    for short, split, count in (("train", "train", 6), ("val", "validation", 5)):
        header, *lines = (world / "CC3M" / f"cc3m_{short}.tsv").read_text().splitlines()
        assert header == "caption\timage_path"
        assert len(lines) == count
        for index, line in enumerate(lines):
            text, path = line.split("\t")
            scene, caption = picture_scene(SEED, split, index)
            assert path == f"{short}/{index:09d}.jpg"
            assert text == caption
            assert same(world / "CC3M" / path, scene)


def test_vist_layout(world):
    for short, split, count in (("train", "train", 6), ("val", "validation", 5)):
        stories = json.loads((world / "VIST" / f"{short}_cleaned.json").read_text())
        mapping = json.loads((world / "VIST" / f"{short}_image_mapping.json").read_text())
        assert len(stories) == count
        assert len(mapping) == count * 5
        for index, records in enumerate(stories.values()):
            assert [record["sequence_index"] for record in records] == [0, 1, 2, 3, 4]
            for record, step in zip(records, make_story(SEED, split, index).steps, strict=True):
                assert record["caption"] == step.text
                assert same(world / "VIST" / mapping[record["image_id"]], step.scene)


def test_mmdialog_layout(world):
    for split, count in (("train", 6), ("validation", 5), ("test", 4)):
        folder = world / "MMDialog" / split
        records = [json.loads(line) for line in (folder / f"{split}_conversations.txt").read_text().splitlines()]
        assert [record["conversation_id"] for record in records] == list(range(count))
        for index, record in enumerate(records):
            for entry, turn in zip(record["conversation"], make_dialogue(SEED, split, index), strict=True):
                text, *media = entry["turn"]
                assert text == {"__TEXT__": turn.text}
                assert bool(media) == (turn.scene is not None)
                if turn.scene is not None:
                    name = media[0]["__MEDIA__"]
                    assert -(2**63) <= int(name) < 2**63
                    assert same(folder / f"{name}.jpg", turn.scene)


def test_records_do_not_depend_on_how_many_are_written(world, tmp_path):
    write_datasets(tmp_path, Sizes(train=3, validation=0), SEED)
    for path in ("CC3M/train/000000002.jpg", "VIST/train_images/000000010.jpg"):
        assert (tmp_path / path).read_bytes() == (world / path).read_bytes()
    few = (tmp_path / "MMDialog/train/train_conversations.txt").read_text()
    assert (world / "MMDialog/train/train_conversations.txt").read_text().startswith(few)
    assert not (tmp_path / "CC3M" / "cc3m_val.tsv").exists()


def test_another_seed_gives_other_records():
    assert picture_scene(0, "train", 0) != picture_scene(1, "train", 0)
    assert media_id(0, "a") != media_id(1, "a")


@pytest.mark.parametrize(
    ("folder", "name", "dataset"),
    [
        ("CC3M", "cc3m_val.tsv", DatasetName.CC3M),
        ("VIST", "val_cleaned.json", DatasetName.VIST),
        ("MMDialog", "test/test_conversations.txt", DatasetName.MMDIALOG),
    ],
)
def test_committed_sample_is_read_whole_by_the_published_data_readers(folder, name, dataset):
    path = PROJECT_ROOT / "datasets" / folder / name
    assert detect_dataset(path) is dataset
    index = open_index(
        DataConfig(folder=path.parents[name.count("/")]),
        Path(name),
        Split.TEST,
        voken_text="[IMG0][IMG1]",
        seed=0,
        count_tokens=lambda text: len(text.split()),
    )
    assert index.problems == []
    samples = [index[position] for position in range(len(index))]
    assert len(samples) >= 48
    assert {path.suffix for sample in samples for path in sample.output_images} == {".jpg"}


def test_committed_sample_is_what_the_generator_writes(tmp_path):
    committed = PROJECT_ROOT / "datasets"
    write_datasets(tmp_path, Sizes(train=0, validation=48), SEED, ("cc3m",))
    write_datasets(tmp_path, Sizes(train=0, validation=12), SEED, ("vist",))
    write_datasets(tmp_path, Sizes(train=0, validation=0, test=16), SEED, ("mmdialog",))
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) > 130
    for name in names:
        if name.suffix == ".jpg":
            assert recognise(Image.open(committed / name)) == recognise(Image.open(tmp_path / name))
        else:
            assert (committed / name).read_text() == (tmp_path / name).read_text()
    assert sum((committed / name).stat().st_size for name in names) < 400_000


@pytest.mark.parametrize(
    ("sizes", "names", "message"),
    [(Sizes(-1, 0), (), "train -1"), (Sizes(1, 0), ("coco",), "known: cc3m, vist, mmdialog")],
)
def test_impossible_requests_name_the_remedy(tmp_path, sizes, names, message):
    with pytest.raises(InputError, match=message):
        write_datasets(tmp_path, sizes, SEED, names)


def test_command_line_writes_and_reports(tmp_path, capsys):
    main(["data", "--out", str(tmp_path), "--val", "2", "--datasets", "cc3m", "vist"])
    printed = capsys.readouterr().out
    assert "cc3m_val.tsv: 2 records" in printed
    assert "val_cleaned.json: 2 records" in printed
    assert not (tmp_path / "MMDialog").exists()


def test_command_line_refuses_to_write_nothing_or_into_a_file(tmp_path):
    with pytest.raises(InputError, match="--train or --val"):
        main(["data", "--out", str(tmp_path)])
    with pytest.raises(InputError, match="--train or --val"):
        main(["data", "--out", str(tmp_path), "--test", "3", "--datasets", "cc3m"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        main(["data", "--out", str(tmp_path / "file" / "inside"), "--val", "1"])


def test_bad_input_exits_with_2_and_one_line():
    command = [sys.executable, "-m", "minigpt5.tinyworld", "data", "--out", "/dev/null/x", "--val", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out /dev/null/x")
    assert len(done.stderr.splitlines()) == 1
