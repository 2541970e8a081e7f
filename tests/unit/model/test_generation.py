"""Decoding: voken forcing, stopping, pictures, and independence of the batch."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.errors import InputError
from minigpt5.config import GenerationConfig
from minigpt5.data.types import Prompt
from minigpt5.generation import choose_scores, stop_sequences
from minigpt5.kv_cache import as_argument, new_cache

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model"
SETTINGS = GenerationConfig(max_new_tokens=12, num_inference_steps=2)


def prompts() -> list[Prompt]:
    picture = Image.open(FIXTURE / "images" / "im4.png").convert("RGB")
    return [
        Prompt("short", "###Human: a boat ###Assistant:"),
        Prompt("picture", "###Human: what is this <Img><ImageHere></Img> ###Assistant:", (picture,)),
        Prompt("long", "###Human: " + "the dog ran into the water and " * 6 + "###Assistant:"),
    ]


@pytest.mark.parametrize("policy", ["auto", "force", "never"])
def test_replies_do_not_depend_on_the_batch(model, policy):
    config = dataclasses.replace(SETTINGS, images=policy)
    together = model.generate(prompts(), config)
    alone = [model.generate([prompt], config)[0] for prompt in prompts()]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
    for one, other in zip(together, alone, strict=True):
        assert len(one.images) == len(other.images)
        for left, right in zip(one.images, other.images, strict=True):
            assert np.abs(np.asarray(left, dtype=int) - np.asarray(right, dtype=int)).max() <= 1


def test_another_seed_gives_another_reply(model):
    settings = [dataclasses.replace(SETTINGS, seed=seed, temperature=3.0) for seed in range(3)]
    replies = {model.generate(prompts()[2:], config)[0].token_ids for config in settings}
    assert len(replies) == 3


def test_forced_picture_comes_first_and_only_img0_is_recorded(model):
    replies = model.generate(prompts(), dataclasses.replace(SETTINGS, images="force"))
    for reply in replies:
        assert reply.token_ids[1] == model.voken_ids.first
        assert len(reply.images) == reply.token_ids.count(model.voken_ids.first)
        assert not isinstance(reply.parts[0], str)
        assert reply.images[0].size == (64, 64)
        assert "[IMG" not in reply.text


def test_never_gives_text_only(model):
    banned = dataclasses.replace(SETTINGS, images="never", temperature=5.0, top_k=0, top_p=1.0)
    for reply in model.generate(prompts(), banned):
        assert model.voken_ids.first not in reply.token_ids
        assert reply.images == ()


def test_img0_as_the_last_allowed_token_still_gets_its_picture(model):
    config = dataclasses.replace(SETTINGS, images="force", max_new_tokens=1)
    (short,) = model.decode_prompts(prompts()[:1], config)
    (long,) = model.decode_prompts(prompts()[:1], dataclasses.replace(config, max_new_tokens=4))
    assert short.token_ids == [model.tokenizer.bos_id, model.voken_ids.first]
    torch.testing.assert_close(short.voken_states[0], long.voken_states[0])


def test_several_pictures_in_one_reply(model, monkeypatch):
    first = model.voken_ids.first
    wanted = iter([first, 40, first, model.tokenizer.eos_id])
    monkeypatch.setattr("minigpt5.generation.choose_token", lambda *_: next(wanted))
    (reply,) = model.generate(prompts()[:1], SETTINGS)
    assert [isinstance(part, str) for part in reply.parts] == [False, True, False]
    assert reply.raw_text.count("[IMG0]") == 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_forcing_works_whatever_the_sign_of_the_scores(sign):
    logits = sign * torch.rand(20).add(0.5)
    (scores,) = choose_scores(logits[None], [[1]], GenerationConfig(), forced=[7])
    assert int(scores.argmax()) == 7
    assert torch.softmax(scores, -1)[7] == 1.0


def test_stop_sequences_cover_both_tokenizations(model):
    found = stop_sequences(model.tokenizer, "###")
    assert tuple(model.tokenizer.encode("###")) in found
    for ids in found:
        assert model.tokenizer.decode([40, *ids]).endswith("###")


def test_reply_ends_at_the_stop_string(model, monkeypatch):
    stop = model.tokenizer.encode("###")
    wanted = iter([40, 41, *stop, 42])
    monkeypatch.setattr("minigpt5.generation.choose_token", lambda *_: next(wanted))
    (reply,) = model.generate(prompts()[:1], SETTINGS)
    assert list(reply.token_ids) == [model.tokenizer.bos_id, 40, 41, *stop]
    assert "#" not in reply.text
    assert reply.raw_text.endswith("###")


def test_a_prompt_fits_as_long_as_its_end_is_read(model, monkeypatch):
    short = Prompt("x", "a dog runs")
    picture = Prompt("x", "a dog runs <Img><ImageHere></Img>", (Image.new("RGB", (8, 8)),))
    monkeypatch.setattr(model.tokenizer, "max_length", len(model.tokenizer.encode(short.text)))
    assert model.fits(short)
    assert not model.fits(Prompt("x", "a dog runs ."))
    with pytest.raises(InputError, match=r"prompt x: the tokenizer's limit of \d+ tokens .* cuts off a picture"):
        model.generate([picture], SETTINGS)


def test_placeholders_and_pictures_must_agree(model):
    with pytest.raises(InputError, match="1 <ImageHere> placeholders but 0 pictures"):
        model.generate([Prompt("x", "look <Img><ImageHere></Img>")], SETTINGS)


def test_generation_leaves_the_mode_as_it_was(model):
    model.train()
    model.generate(prompts()[:1], SETTINGS)
    assert model.training
    assert not model.backbone.training
    assert not model.diffusion.training
    model.eval()


@pytest.mark.parametrize("top_k", [0, 1, 50, 500])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_of_a_batch_are_those_of_transformers_row_by_row(top_k, top_p, temperature):
    torch.manual_seed(0)
    logits = torch.randn(4, 300) * 3
    logits[1] = logits[1].round()  # equal scores, as bfloat16 gives them, also at the boundary of top-k
    histories = [[1], [1, 7, 7, 9], [1, 250], [1, *range(20, 60)]]
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    found = choose_scores(logits, histories, config)
    for row, history in enumerate(histories):
        ids = torch.tensor([history])
        expected = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(ids, logits[row : row + 1].clone())
        if temperature != 1.0:
            expected = TemperatureLogitsWarper(temperature)(ids, expected)
        if top_k:
            expected = TopKLogitsWarper(top_k)(ids, expected)
        if top_p < 1.0:
            expected = TopPLogitsWarper(top_p)(ids, expected)
        if row == 1:  # which of several equal scores top-p keeps is up to the sort
            assert torch.equal(found[row].sort().values, expected[0].sort().values)
        else:
            assert torch.equal(found[row], expected[0])


def test_choosing_leaves_the_logits_as_they_were():
    logits = torch.randn(2, 30)
    before = logits.clone()
    for config in (GenerationConfig(), GenerationConfig(top_k=0, top_p=1.0, repetition_penalty=1.0)):
        choose_scores(logits, [[1], [1, 2]], config, forced=[3, None], banned=4)
        assert torch.equal(logits, before)


def test_buffered_keys_and_values_are_those_of_the_dynamic_cache(model):
    llama = model.backbone.language_model
    caches = new_cache(llama.config), DynamicCache(config=llama.config)
    torch.manual_seed(0)
    for length in (5, 1, 1, 7, *[1] * 70):  # beyond the first room
        embeds = torch.randn(2, length, llama.config.hidden_size)
        with torch.no_grad():
            ours, theirs = (
                llama.model(inputs_embeds=embeds, **as_argument(cache)).last_hidden_state for cache in caches
            )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_vokens_enter_in_one_step_where_all_replies_read_them(model):
    widths = []
    layer = model.backbone.language_model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    model.decode_prompts(prompts()[:1] * 2, dataclasses.replace(SETTINGS, images="force", max_new_tokens=3))
    hook.remove()
    assert widths[1] == model.voken_ids.count
    assert max(widths[2:], default=1) == 1


def unet_batches(model):
    """Return the list that every call of the UNet adds its batch's size to, and the hook."""
    sizes = []
    return sizes, model.diffusion.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))


def test_pictures_of_all_replies_share_each_call_of_the_unet_with_both_guidance_halves(model):
    config = dataclasses.replace(SETTINGS, images="force", max_new_tokens=1, num_inference_steps=4)
    sizes, hook = unet_batches(model)
    model.generate(prompts(), config)
    hook.remove()
    assert sizes == [2 * len(prompts())] * 5  # PNDM takes its second step twice


def test_more_pictures_than_are_taken_at_once_are_the_same(model, monkeypatch):
    shown = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    requests = [
        Prompt("two", "a <Img><ImageHere></Img> b <Img><ImageHere></Img>", tuple(shown[:2])),
        Prompt("none", "a boat"),
        Prompt("one", "c <Img><ImageHere></Img>", tuple(shown[2:])),
    ]
    config = dataclasses.replace(SETTINGS, images="force", max_new_tokens=1)
    expected = model.generate(requests, config)
    monkeypatch.setattr("minigpt5.model.PICTURES_AT_ONCE", 2)
    sizes, hook = unet_batches(model)
    found = model.generate(requests, config)
    hook.remove()
    assert set(sizes) == {4, 2}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        difference = np.asarray(ours.images[0], dtype=int) - np.asarray(theirs.images[0], dtype=int)
        assert np.abs(difference).max() <= 1


def test_decoding_asks_for_no_states_but_the_last(model):
    outputs = []
    hook = model.backbone.language_model.model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    model.decode_prompts(prompts(), SETTINGS)
    hook.remove()
    assert len(outputs) > 1
    assert all(output.hidden_states is None and output.attentions is None for output in outputs)


def test_language_model_is_given_its_cache_by_the_name_it_has_now(model, recwarn):
    llama = model.backbone.language_model
    cache = new_cache(llama.config)
    llama.model(inputs_embeds=torch.zeros(1, 3, 64), **as_argument(cache), use_cache=True)
    assert cache.get_seq_length() == 3
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]
