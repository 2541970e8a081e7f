"""What one device computes, another computes too. Run on a CPU against itself, these tests show that they work."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from minigpt4.config import LanguageModelConfig
from minigpt4.language_model import load_language_model
from minigpt5.checkpoint import load_checkpoint
from minigpt5.config import PROJECT_ROOT, LossConfig, RunConfig, Stage, load_config
from minigpt5.data.types import Prompt, Reply
from minigpt5.hardware import set_up_gpus
from minigpt5.model import MiniGPT5, build_model
from minigpt5.tinyworld.pretraining.loop import Place
from minigpt5.tinyworld.pretraining.parts import PARTS, prepare_folder
from tests.parity.model import StageFixture, model_config
from tests.pretended_gpu import pretended_gpu

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "model"
WEIGHTS = PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights"
TINY = PROJECT_ROOT / "config" / "tiny.yaml"
PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
PROMPTS = [
    Prompt("draw", "###Human: draw a red circle .\n###Assistant:"),
    Prompt("picture", "###Human: what is this ? <Img><ImageHere></Img>\n###Assistant:", (PICTURE,)),
]
on_a_gpu = pytest.mark.gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def device(request) -> Iterator[torch.device]:
    if request.param == "pretended":
        with pretended_gpu() as pretended:
            yield pretended
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    set_up_gpus()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.backends.cuda.enable_cudnn_sdp(attention)


also_on_a_pretended_gpu = pytest.mark.parametrize(
    "device", ["cpu", "pretended", pytest.param("cuda", marks=on_a_gpu)], indirect=True
)
"""It refuses what was left on the CPU, on a machine without a GPU too."""


@pytest.fixture(params=[1, 2], ids=["stage1", "stage2"])
def fixture(request) -> StageFixture:
    return StageFixture(FIXTURES, request.param)


def configure(**values: object) -> RunConfig:
    given = {"generation.num_inference_steps": 4, "generation.max_new_tokens": 12, "generation.images": "force"}
    given |= {"generation.temperature": 0.0} | {key.replace("__", "."): value for key, value in values.items()}
    return load_config(TINY, given, {})


def build(config: RunConfig, device: torch.device) -> MiniGPT5:
    torch.manual_seed(0)
    return build_model(config.model, config.loss, Stage.ALIGNMENT).place(device).eval()


def farthest(first: list[Reply], second: list[Reply]) -> int:
    """Return the largest difference of any value of the replies' pictures, of 255."""
    pairs = [
        pair
        for one, other in zip(first, second, strict=True)
        for pair in zip(one.images, other.images, strict=True)
    ]
    assert len(pairs) == len(PROMPTS)
    return max(int(np.abs(np.subtract(*(np.asarray(image, dtype=int) for image in pair))).max()) for pair in pairs)


def test_pretended_gpu_refuses_what_a_real_one_does():
    with pretended_gpu() as place:
        here, there = torch.arange(3.0), torch.arange(3.0).to(place)
        assert (there * torch.tensor(2.0))[torch.tensor([2, 0])].tolist() == [4.0, 0.0]
        assert torch.equal(there.cpu().add_(1), here + 1) and there.sum().item() == 3.0
        for mixed in (lambda: here + there, lambda: torch.cat([there, here]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@also_on_a_pretended_gpu
def test_losses_and_gradients_are_the_cpus(fixture, device):
    found = {}
    for place in (torch.device("cpu"), device):
        model = fixture.model.to(place)
        model.zero_grad()
        losses = model(fixture.batch.to(place), fixture.draws())
        losses.total.backward()
        gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        found[place.type] = (losses, torch.cat(gradients))
    (expected, gradient), (ours, other) = found["cpu"], found[device.type]
    for name, value in expected.as_dict().items():
        assert ours.as_dict()[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.9999


def test_training_in_bfloat16_follows_float32(fixture, device):
    """Ten steps: frozen parts in bfloat16 under autocast, as ``bf16-mixed`` trains, against float32."""
    curves = []
    dims = json.loads((FIXTURES / "config.json").read_text())["dims"]
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(model_config(FIXTURES, dims, 8), LossConfig(), fixture.stage, dtype).eval().to(device)
        start = fixture.model.to(device).state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(start[name])
        batch, draws = fixture.batch.to(device), fixture.draws()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        curve = []
        for _ in range(10):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = model(batch, draws).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    whole, half = curves
    assert whole[-1] < 0.95 * whole[0]
    assert half == pytest.approx(whole, rel=0.03)


@also_on_a_pretended_gpu
def test_replies_are_the_cpus(device):
    config = configure()
    expected = build(config, torch.device("cpu")).generate(PROMPTS, config.generation)
    ours = build(config, device).generate(PROMPTS, config.generation)
    assert [reply.token_ids for reply in ours] == [reply.token_ids for reply in expected]
    assert farthest(ours, expected) <= 2


def test_replies_in_bfloat16_do_not_depend_on_the_batch(device):
    """Prompts of two lengths, so that the shorter one is padded: its states are those it has alone."""
    config = configure(generation__max_new_tokens=1)
    torch.manual_seed(0)
    model = build_model(config.model, config.loss, Stage.ALIGNMENT, torch.bfloat16).place(device).eval()
    together = model.decode_prompts(PROMPTS, config.generation)
    for prompt, ours in zip(PROMPTS, together, strict=True):
        (alone,) = model.decode_prompts([prompt], config.generation)
        states, expected = ours.voken_states[0].float(), alone.voken_states[0].float()
        assert (states - expected).norm() < 0.05 * expected.norm()


@also_on_a_pretended_gpu
def test_offloaded_diffusion_model_draws_the_same_pictures(device):
    config = configure(model__diffusion__offload=True)
    whole, offloaded = build(configure(), device), build(config, device)
    for _ in range(2):  # the second time, the parts have been away
        replies = [model.generate(PROMPTS, config.generation) for model in (whole, offloaded)]
        assert farthest(*replies) <= 1
        assert {parameter.device.type for parameter in offloaded.diffusion.parameters()} == {"cpu"}


def test_language_model_that_is_loaded_to_the_device_is_the_same(device):
    config = LanguageModelConfig(weights=str(WEIGHTS / "llama"))
    expected, _, _ = load_language_model(config, torch.bfloat16)
    ours, _, _ = load_language_model(config, torch.bfloat16, device)
    assert {tensor.device.type for tensor in (*ours.parameters(), *ours.buffers())} == {device.type}
    found = ours.state_dict()
    assert all(torch.equal(found[name].cpu(), value) for name, value in expected.state_dict().items())


def test_published_checkpoint_goes_into_a_model_on_the_device(device):
    """Its own frozen rows too, which the published training drifted."""
    dims = json.loads((FIXTURES / "config.json").read_text())["dims"]
    config = model_config(FIXTURES, dims, 8)
    expected = StageFixture(FIXTURES, 1).model
    ours = build_model(config, LossConfig(), Stage.ALIGNMENT, device=device).to(device)
    load_checkpoint(ours, FIXTURES / "stage1.ckpt", Stage.ALIGNMENT, "--test_weight")
    assert torch.equal(ours.backbone.embedding_VH.cpu(), expected.backbone.embedding_VH)
    assert torch.equal(ours.rows.head.cpu(), expected.rows.head)


@also_on_a_pretended_gpu
def test_killed_pretraining_goes_on(device, tmp_path):
    """Its checkpoint is read to the CPU, whatever the device."""
    recipe = replace(PARTS["vae"].recipe, steps=2, batch_size=4, warmup_steps=1)
    place = Place(tmp_path, 0, device)
    prepare_folder(place)
    PARTS["vae"].run(place, recipe, 8)
    assert PARTS["vae"].run(place, replace(recipe, steps=4), 8)["steps"] == 4


@on_a_gpu
@pytest.mark.compiler
def test_compiled_model_agrees_on_a_gpu(fixture):
    model, batch = fixture.model.to("cuda"), fixture.batch.to("cuda")
    expected = model(batch, fixture.draws()).total
    model.compile_parts()
    compiled = model(batch, fixture.draws()).total
    compiled.backward()
    assert compiled.item() == pytest.approx(expected.item(), rel=1e-3)
    assert model.mapper.queries.grad.abs().sum() > 0


@pytest.mark.compiler
def test_replies_with_compiled_steps_are_the_same(device):
    config = configure(generation__images="never")
    model = build(config, device)
    expected = model.generate(PROMPTS, config.generation)
    torch._dynamo.reset()
    counters.clear()
    for _ in range(3):  # on a GPU recorded, then replayed over the same cache
        replies = model.generate(PROMPTS, replace(config.generation, compile=True))
        assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    assert counters["stats"]["unique_graphs"] == 1
    if device.type == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize(
    ("where", "quantization", "most"),
    [
        ("cpu", "8bit", 0.06),
        pytest.param("cuda", "8bit", 0.1, marks=on_a_gpu),  # in bfloat16
        pytest.param("cuda", "4bit", 0.3, marks=on_a_gpu),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantized_model_reads_prompts_as_the_whole_one(where, quantization, most):
    device, dtype = torch.device(where), torch.float32 if where == "cpu" else torch.bfloat16

    def build_with(quantization: str) -> tuple[MiniGPT5, torch.Tensor]:
        config = configure(model__backbone__language_model__quantization=quantization)
        torch.manual_seed(0)
        model = build_model(config.model, config.loss, Stage.ALIGNMENT, dtype, device).place(device).eval()
        decoded = model.decode_prompts(PROMPTS, config.generation, trace=True)
        return model, torch.stack([one.step_states[0] for one in decoded]).float()

    (_, expected), (model, states) = build_with("none"), build_with(quantization)
    assert 0 < (states - expected).norm() / expected.norm() < most
    assert all(len(reply.images) == 1 for reply in model.generate(PROMPTS, configure().generation))
