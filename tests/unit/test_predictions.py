"""The prediction store survives a kill, refuses another run, and reads back what was written."""

from dataclasses import replace

import pytest
from PIL import Image

from minigpt4.errors import InputError
from minigpt5.predictions import Prediction, PredictionStore, file_stem, read_predictions


def prediction(name: str) -> Prediction:
    return Prediction(
        id=name, dataset="vist", task="generation", prompt="p", text="t [IMG0]", target="g", caption="é"
    )


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


def test_round_trip(tmp_path):
    store = PredictionStore(tmp_path / "run", {"seed": 1})
    written = store.append(
        prediction("1_0-gen"),
        images=[picture("red"), picture("blue")],
        target_images=[picture("green")],
        baseline_image=picture("white"),
        input_images=[picture("black")],
    )
    assert read_predictions(tmp_path / "run") == [written]
    assert written.images == ("images/1_0-gen.png", "images/1_0-gen_1.png")
    assert written.wants_image
    colour = Image.open(tmp_path / "run" / written.images[1]).getpixel((0, 0))
    assert colour == (0, 0, 255)


def test_a_picture_that_several_prompts_hold_is_kept_once(tmp_path):
    held = [("red",), ("red", "blue"), ("red", "blue", "red")]
    for rank, colours in enumerate(held):
        store = PredictionStore(tmp_path, {}, rank)
        store.append(prediction(f"7_{rank}-gen"), input_images=[picture(colour) for colour in colours])
    found = [entry.input_images for entry in read_predictions(tmp_path)]
    assert [len(names) for names in found] == [1, 2, 3]
    assert found[2] == (*found[1], found[0][0])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(
        name.removeprefix("images/") for name in set(found[2])
    )
    assert [Image.open(tmp_path / name).getpixel((0, 0)) for name in found[1]] == [(255, 0, 0), (0, 0, 255)]


def test_reopening_knows_what_is_done_and_drops_a_torn_line(tmp_path):
    store = PredictionStore(tmp_path, {"seed": 1})
    store.append(prediction("a"))
    store.append(prediction("b"))
    content = store.path.read_bytes()
    store.path.write_bytes(content[:-9])
    reopened = PredictionStore(tmp_path, {"seed": 1})
    assert reopened.done == {"a"}
    reopened.append(prediction("b"))
    assert [entry.id for entry in read_predictions(tmp_path)] == ["a", "b"]


def test_a_line_torn_within_a_letter_is_dropped_like_any_other(tmp_path):
    for rank in range(2):
        PredictionStore(tmp_path, {}, rank).append(prediction(f"from-{rank}"))
    torn = tmp_path / "predictions.rank1.jsonl"
    content = torn.read_bytes()
    torn.write_bytes(content + content[: content.index("é".encode()) + 1])
    assert [entry.id for entry in read_predictions(tmp_path)] == ["from-0", "from-1"]
    assert PredictionStore(tmp_path, {}).done == {"from-0", "from-1"}
    torn.write_bytes(content + b"\xff\n")
    with pytest.raises(InputError, match=r"rank1\.jsonl:2: not a prediction"):
        read_predictions(tmp_path)


def test_predictions_come_in_the_test_files_order_however_many_processes_replied(tmp_path):
    for rank in range(3):
        store = PredictionStore(tmp_path, {}, rank)
        for place in range(rank, 8, 3):
            store.append(replace(prediction(f"sample-{place}"), place=place))
    PredictionStore(tmp_path, {}).append(prediction("of an older version"))
    names = [f"sample-{place}" for place in range(8)]
    assert [entry.id for entry in read_predictions(tmp_path)] == [*names, "of an older version"]


def test_another_run_is_refused_and_nothing_is_lost(tmp_path):
    PredictionStore(tmp_path, {"seed": 1}).append(prediction("a"))
    with pytest.raises(InputError, match=r"another run \(different: seed\)"):
        PredictionStore(tmp_path, {"seed": 2})
    assert len(read_predictions(tmp_path)) == 1


def test_processes_write_files_of_their_own(tmp_path):
    for rank in range(2):
        PredictionStore(tmp_path, {}, rank).append(prediction(f"from-{rank}"))
    assert {entry.id for entry in read_predictions(tmp_path)} == {"from-0", "from-1"}


def test_malformed_lines_are_named(tmp_path):
    PredictionStore(tmp_path, {}).append(prediction("a"))
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.read_text() + '{"id": "b"}\n')
    with pytest.raises(InputError, match=r"predictions\.jsonl:2: not a prediction"):
        read_predictions(tmp_path)


def test_missing_folder_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"train_eval\.py"):
        read_predictions(tmp_path / "nowhere")


def test_file_names_are_safe_and_distinct():
    assert file_stem("cc3m_0") == "cc3m_0"
    odd = [file_stem(name) for name in ("a/b", "a\\b", "a b")]
    assert len(set(odd)) == 3
    assert not any("/" in name or " " in name for name in odd)
