"""Ids, labels, pictures of one sample, and the batch they make."""

from pathlib import Path

import pytest
import torch
from data_helpers import FIXTURES, VOKENS, draw

from minigpt4.errors import InputError
from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.data.collate import collate
from minigpt5.data.encode import Encoder
from minigpt5.data.types import Sample, Task
from minigpt5.images import input_transform, output_transform
from minigpt5.vokens import VokenIds


def make_encoder(tokenizer, vokens, **changes):
    return Encoder(tokenizer, vokens, input_transform(8), output_transform(16), **changes)


def make_sample(folder: Path, inputs: int, outputs: int, name="s") -> Sample:
    pictures = [draw(folder / f"{name}{i}.png", seed=i) for i in range(inputs + outputs)]
    return Sample(
        id=name,
        task=Task.DIALOGUE,
        prompt="the dog " + "<Img><ImageHere></Img>" * inputs,
        response="a cat " + f"{VOKENS} " * outputs + "###",
        input_images=tuple(pictures[:inputs]),
        output_images=tuple(pictures[inputs:]),
    )


def test_the_prompt_and_inner_vokens_of_every_run_are_not_labelled(tmp_path, tokenizer, vokens):
    sample = make_sample(tmp_path, inputs=2, outputs=2)
    encoded = make_encoder(tokenizer, vokens)(sample)
    prompt, response = tokenizer.encode(sample.prompt), tokenizer.encode(sample.response)
    assert encoded.input_ids_T.tolist() == prompt + response
    expected = [-100] * len(prompt) + [token if token not in vokens.vokens[1:-1] else -100 for token in response]
    assert encoded.labels_T.tolist() == expected
    assert encoded.labels_T.tolist().count(vokens.first) == 2
    every = make_encoder(tokenizer, vokens, mask_vokens=False)(sample)
    assert every.labels_T.tolist() == [-100] * len(prompt) + response
    assert encoded.input_pixels_P3HW.shape == (2, 3, 8, 8) and encoded.output_pixels_O3HW.shape == (2, 3, 16, 16)


def test_texts_without_pictures_or_without_words_encode(tokenizer, vokens):
    encoded = make_encoder(tokenizer, vokens)(Sample("s", Task.CAPTION, "", "", caption=""))
    assert encoded.input_ids_T.shape == encoded.labels_T.shape == (0,)
    assert encoded.input_ids_T.dtype == encoded.labels_T.dtype == torch.long
    assert encoded.input_pixels_P3HW is None and encoded.output_pixels_O3HW is None


@pytest.mark.parametrize(("limit", "what"), [(12, "a picture of the prompt"), (26, "the vokens of the response")])
def test_a_limit_that_cuts_pictures_off_is_an_error_and_found_beforehand(tmp_path, limit, what):
    tokenizer = LlamaTokenizer(FIXTURES / "tokenizer" / "tokenizer.model", limit)
    encoder = make_encoder(tokenizer, VokenIds.install(tokenizer, 8))
    sample = make_sample(tmp_path, inputs=2, outputs=3)
    cut = encoder.find_cut(sample)
    assert cut == f"the tokenizer's limit of {limit} tokens a text cuts off {what}"
    with pytest.raises(InputError, match=f"sample s: .* cuts off {what}"):
        encoder(sample)


def test_a_limit_that_cuts_only_words_is_kept_as_published(tokenizer, vokens):
    tokenizer.max_length = 16
    sample = Sample("s", Task.DIALOGUE, "the dog " * 40, "the cat " * 40)
    encoder = make_encoder(tokenizer, vokens)
    assert encoder.find_cut(sample) is None
    assert len(encoder(sample).input_ids_T) == 32


def test_a_batch_is_padded_on_the_right_and_its_pictures_concatenated(tmp_path, tokenizer, vokens):
    encoder = make_encoder(tokenizer, vokens)
    samples = [
        make_sample(tmp_path, 1, 0, "a"),
        make_sample(tmp_path, 0, 2, "bb"),
        make_sample(tmp_path, 2, 1, "c"),
    ]
    encoded = [encoder(sample) for sample in samples]
    batch = collate(encoded, pad_id=tokenizer.pad_id)
    assert batch.samples == samples and batch.size == 3
    assert batch.input_counts == [1, 0, 2] and batch.output_counts == [0, 2, 1]
    length = max(len(item.input_ids_T) for item in encoded)
    for row, item in enumerate(encoded):
        own = len(item.input_ids_T)
        rest = length - own
        assert batch.input_ids_BT[row].tolist() == item.input_ids_T.tolist() + [tokenizer.eos_id] * rest
        assert batch.attention_mask_BT[row].tolist() == [1] * own + [0] * rest
        assert batch.labels_BT[row].tolist() == item.labels_T.tolist() + [-100] * rest
    assert torch.equal(
        batch.input_pixels_P3HW, torch.cat([encoded[0].input_pixels_P3HW, encoded[2].input_pixels_P3HW])
    )
    assert batch.output_pixels_O3HW.shape == (3, 3, 16, 16)
    alone = collate(encoded[:1], pad_id=0)
    assert alone.output_pixels_O3HW is None and alone.output_counts == [0]
