"""Prefix tuning: what it computes, what it trains, and that it survives batches, decoding and checkpoints."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.errors import InputError
from minigpt5.adapters import Prefix
from minigpt5.assembly import Assembled
from minigpt5.checkpoint import FORMAT_KEY, checkpoint_mark, convert, load_checkpoint, trainable_state
from minigpt5.config import AdapterConfig, GenerationConfig, LossConfig, Stage, TrainingConfig
from minigpt5.data.types import Prompt
from minigpt5.language_states import last_states
from minigpt5.model import MiniGPT5, build_model
from minigpt5.training import TrainingModule
from tests.parity.model import StageFixture, model_config

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model"
PREFIX = AdapterConfig(kind="prefix", prefix_length=3)
SIZES = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="sdpa",
)


@pytest.fixture(scope="module")
def fixture() -> StageFixture:
    return StageFixture(FIXTURE, 1)


def build(adapter: AdapterConfig = PREFIX) -> MiniGPT5:
    """The fixture's model for stage 2 with stage-1 weights, and a prefix that matters."""
    sizes = StageFixture(FIXTURE, 1).config["dims"]
    config = dataclasses.replace(model_config(FIXTURE, sizes, 8), adapter=adapter)
    model = build_model(config, LossConfig(), Stage.MULTIMODAL)
    load_checkpoint(model, FIXTURE / "stage1.ckpt", Stage.ALIGNMENT, "--stage1_weight")
    if model.prefix is not None:
        enlarge(model.prefix)
    return model.eval()


def enlarge(prefix: Prefix) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(SIZES)
    with torch.no_grad():  # at its own initialisation attention is nearly uniform, and no test of anything
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.ndim > 1 else parameter.normal_(1.0, 0.1)
    return model.requires_grad_(False).eval()


def assembled(embeds: list[torch.Tensor]) -> Assembled:
    longest = max(map(len, embeds))
    padded = torch.stack([F.pad(embed, (0, 0, 0, longest - len(embed)), value=5.0) for embed in embeds])
    mask = torch.stack([F.pad(torch.ones(len(embed)), (0, longest - len(embed))) for embed in embeds]).long()
    return Assembled(padded, mask, torch.full_like(mask, -100), torch.zeros(len(embeds), dtype=torch.long))


def by_hand(llama: LlamaForCausalLM, embeds_TH: torch.Tensor, prefix: Prefix) -> torch.Tensor:
    """LLaMA of one unpadded sample in plain torch, the prefix concatenated in front of every layer's keys."""
    heads, shared, width = 4, 2, 8
    length, ahead = len(embeds_TH), prefix.keys_KAPD.shape[2]
    angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + SIZES.rms_norm_eps).sqrt() * module.weight

    def rotated(x_TAD):  # dimension i turns with dimension i + width / 2
        turned = torch.complex(x_TAD[..., : width // 2], x_TAD[..., width // 2 :]) * turn[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    hidden = embeds_TH
    allowed = torch.cat([torch.ones(length, ahead), torch.ones(length, length).tril()], 1).bool()
    for number, layer in enumerate(llama.model.layers):
        attention, x = layer.self_attn, norm(hidden, layer.input_layernorm)
        queries = rotated((x @ attention.q_proj.weight.T).view(length, heads, width))
        keys = rotated((x @ attention.k_proj.weight.T).view(length, shared, width))
        values = (x @ attention.v_proj.weight.T).view(length, shared, width)
        outputs = []
        for head in range(heads):
            group = head // (heads // shared)
            every_key = torch.cat([prefix.keys_KAPD[number, group], keys[:, group]])
            every_value = torch.cat([prefix.values_KAPD[number, group], values[:, group]])
            scores = (queries[:, head] @ every_key.T / math.sqrt(width)).masked_fill(~allowed, float("-inf"))
            outputs.append(scores.softmax(-1) @ every_value)
        hidden = hidden + torch.cat(outputs, -1) @ attention.o_proj.weight.T
        x, mlp = norm(hidden, layer.post_attention_layernorm), layer.mlp
        gated = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        hidden = hidden + gated @ mlp.down_proj.weight.T
    return norm(hidden, llama.model.norm)


def test_a_padded_batch_is_computed_as_by_hand_sample_by_sample(llama):
    prefix = Prefix(SIZES, 5)
    enlarge(prefix)
    embeds = [torch.randn(length, 32) for length in (7, 3, 11)]
    with torch.no_grad():
        states, without = (last_states(llama, assembled(embeds), torch.float32, one) for one in (prefix, None))
    for row, embed in enumerate(embeds):
        expected = by_hand(llama, embed, prefix)
        torch.testing.assert_close(states[row, : len(embed)], expected.detach(), rtol=1e-4, atol=1e-4)
        assert (without[row, : len(embed)] - expected).abs().mean() > 0.1


def test_the_prefixs_gradient_of_a_padded_batch_is_the_sum_of_its_samples(llama):
    prefix = Prefix(SIZES, 5)
    enlarge(prefix)
    embeds = [torch.randn(length, 32) for length in (7, 3, 11)]

    def gradients(groups):
        prefix.zero_grad()
        for group in groups:
            prompt = assembled(group)
            states = last_states(llama, prompt, torch.float32, prefix)
            (states * torch.linspace(-1, 1, 32))[prompt.mask_BT.bool()].square().sum().backward()
        return [parameter.grad.clone() for parameter in prefix.parameters()]

    for together, alone in zip(gradients([embeds]), gradients([[one] for one in embeds]), strict=True):
        assert together.abs().amax(dim=(1, 2, 3)).min() > 0  # every layer
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_a_fresh_prefix_changes_little(fixture):
    plain, tuned = build(AdapterConfig(kind="none")), build()
    torch.manual_seed(0)
    tuned.prefix = Prefix(tuned.backbone.language_model.config, 3)
    with torch.no_grad():
        before, after = (model.language_states(fixture.batch) for model in (plain, tuned))
    held = before.prompt.mask_BT.bool()
    similar = F.cosine_similarity(before.hidden_BTH[held], after.hidden_BTH[held], dim=-1)
    assert 0.9 < similar.mean() < 0.99999


def test_gradients_reach_the_prefix_and_nothing_frozen(fixture):
    model = build()
    model(fixture.batch, fixture.draws()).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert {name.split(".")[0] for name in trainable_state(model)} == {"rows", "mapper", "prefix"}
    assert all(parameter.grad.abs().max() > 0 for parameter in model.prefix.parameters())


def test_greedy_replies_do_not_depend_on_the_batch():
    model = build()
    requests = [
        Prompt("short", "###Human: a boat ###Assistant:"),
        Prompt("middle", "###Human: what is this, where is it and why ###Assistant:"),
        Prompt("long", "###Human: " + "the dog ran into the water and " * 6 + "###Assistant:"),
    ]
    greedy = GenerationConfig(temperature=0.0, max_new_tokens=12, images="force")
    together = model.decode_prompts(requests, greedy)
    alone = [model.decode_prompts([request], greedy)[0] for request in requests]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left.voken_states[0], right.voken_states[0], rtol=1e-4, atol=1e-4)
    states = torch.stack([one.voken_states[0] for one in together])
    model.prefix = None
    unread = torch.stack([one.voken_states[0] for one in model.decode_prompts(requests, greedy)])
    assert (states - unread).abs().mean() > 0.01


def test_decoding_reads_the_states_that_training_sees():
    model = build()
    prompt = Prompt("one", "###Human: a boat ###Assistant:")
    greedy = GenerationConfig(temperature=0.0, max_new_tokens=2, images="force")
    (decoded,) = model.decode_prompts([prompt], greedy)
    text = prompt.text + "".join(f"[IMG{index}]" for index in range(8))
    embeds = model.prompt_embeds([Prompt("whole", text)])
    states = last_states(model.backbone.language_model, assembled(embeds), torch.float32, model.prefix)
    expected = states[0, -9:-1]
    torch.testing.assert_close(decoded.voken_states[0], expected, rtol=1e-4, atol=1e-4)


def save(model: MiniGPT5, path: Path) -> Path:
    torch.save({"state_dict": trainable_state(model), FORMAT_KEY: checkpoint_mark(model.stage)}, path)
    return path


def test_checkpoints_hold_the_prefix(tmp_path):
    model, other = build(), build()
    path = save(model, tmp_path / "prefix.ckpt")
    torch.nn.init.zeros_(other.prefix.keys_KAPD)
    load_checkpoint(other, path, Stage.MULTIMODAL, "--test_weight")
    assert torch.equal(other.prefix.keys_KAPD, model.prefix.keys_KAPD)
    assert torch.equal(other.prefix.values_KAPD, model.prefix.values_KAPD)
    torch.nn.init.zeros_(other.prefix.keys_KAPD)
    TrainingModule(other, TrainingConfig(), 1, {}).load_state_dict(trainable_state(model))  # --resume
    assert torch.equal(other.prefix.keys_KAPD, model.prefix.keys_KAPD)


def test_a_checkpoint_of_another_adapter_names_the_setting(tmp_path):
    path = save(build(), tmp_path / "prefix.ckpt")
    with pytest.raises(InputError, match=r"model\.adapter\.kind: prefix are in the file alone(.|\n)*kind: lora"):
        load_checkpoint(build(AdapterConfig()), path, Stage.MULTIMODAL, "--test_weight")
    longer = dataclasses.replace(PREFIX, prefix_length=4)
    with pytest.raises(InputError, match=r"prefix\.keys_KAPD: file .*3.*, model .*4"):
        load_checkpoint(build(longer), path, Stage.MULTIMODAL, "--test_weight")


def test_the_published_layout_has_no_place_for_a_prefix(tmp_path):
    path = save(build(), tmp_path / "prefix.ckpt")
    with pytest.raises(InputError, match=r"prefix\.keys_KAPD: the published layout has no place"):
        convert(path, tmp_path / "x.ckpt", to="published", new_tokens=9, language_model=FIXTURE / "llama")
