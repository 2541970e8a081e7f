"""What a story's prompt holds of the steps before it (data.context)."""

import json

import pytest

from minigpt4.errors import InputError
from minigpt5 import prompts
from minigpt5.config import DataConfig
from minigpt5.data.index import first_template
from minigpt5.data.readers import open_index
from minigpt5.data.types import Split, Task
from minigpt5.data.vist import read_vist
from tests.unit.data.data_helpers import VOKENS, draw, make_cc3m, make_options

PICTURE = "<Img><ImageHere></Img>"
ARGUMENTS = {"voken_text": VOKENS, "seed": 0, "count_tokens": len}


@pytest.fixture
def story(tmp_path):
    texts = ["a boat comes .", "it turns red .", "night falls ."]
    steps = [{"caption": text, "image_id": str(n), "sequence_index": n} for n, text in enumerate(texts)]
    (tmp_path / "val_cleaned.json").write_text(json.dumps({"7": steps}))
    (tmp_path / "val_image_mapping.json").write_text(json.dumps({str(n): f"{n}.jpg" for n in range(3)}))
    for number in range(3):
        draw(tmp_path / f"{number}.jpg", number)
    return tmp_path


def samples(folder, context):
    options = make_options(folder, Split.TRAIN, context=context, choose=first_template)
    index = read_vist(folder / "val_cleaned.json", options)
    return {index[number].id: index[number] for number in range(len(index))}


@pytest.mark.parametrize(
    ("context", "history", "pictures"),
    [
        ("full", f"a boat comes .{PICTURE}it turns red .{PICTURE}\n", ["0.jpg", "1.jpg"]),
        ("text", "a boat comes . it turns red .\n", []),
        ("last_text", "it turns red .\n", []),
        ("none", "", []),
    ],
)
def test_prompts_of_the_third_step(story, context, history, pictures):
    found = samples(story, context)
    human = f"{prompts.VIST_SYSTEM}###Human:{history}"
    generation = found["7_2-gen"]
    assert (
        generation.prompt == f"{human} Generate an image with the scene description: night falls . ###Assistant:"
    )
    assert found["7_2-multimodal"].prompt == f"{human} Tell me the next scene with image. ###Assistant:"
    understanding = f"{human} Tell me the next scene description by this image: {PICTURE} ###Assistant:"
    assert found["7_2-understanding"].prompt == understanding
    assert [path.name for path in generation.input_images] == pictures
    assert [path.name for path in found["7_2-understanding"].input_images] == [*pictures, "2.jpg"]
    assert found["7_2-multimodal"].response == f"night falls . {VOKENS} ###"


@pytest.mark.parametrize("context", ["full", "text", "last_text", "none"])
def test_the_first_step_has_no_history(story, context):
    first = samples(story, context)["7_0-gen"]
    assert first.prompt.startswith(f"{prompts.VIST_SYSTEM}###Human: Generate an image")
    assert first.input_images == ()


def test_pictures_that_no_prompt_shows_need_not_be_readable(story):
    (story / "0.jpg").unlink()
    found = {}
    for context in ("full", "text"):
        config = DataConfig(folder=story, context=context, tasks=(Task.UNDERSTANDING,))
        try:
            found[context] = len(open_index(config, "val_cleaned.json", Split.TRAIN, **ARGUMENTS))
        except InputError:
            found[context] = 0
    assert found == {"full": 0, "text": 2}


def test_other_data_sets_refuse_it(tmp_path):
    config = DataConfig(folder=tmp_path, context="text")
    with pytest.raises(
        InputError, match=r"data\.context: text: only VIST's .*cc3m\.tsv is of cc3m; leave it at full"
    ):
        open_index(config, make_cc3m(tmp_path, 2), Split.TRAIN, **ARGUMENTS)
