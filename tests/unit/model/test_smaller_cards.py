"""Quantized layers, an offloaded diffusion model, compiled steps: close to, or the same as, the whole model."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from PIL import Image
from torch._inductor import config as inductor_config

from minigpt4.errors import InputError
from minigpt4.language_model import check_quantization, load_language_model
from minigpt5.compilation import cpp_compiler
from minigpt5.config import PROJECT_ROOT, RunConfig, Stage, TrainingConfig, load_config
from minigpt5.data.types import Prompt
from minigpt5.hardware import Hardware
from minigpt5.model import MiniGPT5, build_model
from minigpt5.prediction_run import describe_run
from minigpt5.preflight import check_run
from minigpt5.runs import load_model
from minigpt5.strategies import choose_strategy
from minigpt5.training import build_optimizer

CHECKPOINTS = PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights" / "checkpoints"
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
PROMPTS = [Prompt("one", "###Human: Draw a red circle.\n###Assistant:", ())]


def configure(**values) -> RunConfig:
    given = {"generation.num_inference_steps": 2, "generation.max_new_tokens": 12, "generation.images": "force"}
    given |= {key.replace("__", "."): value for key, value in values.items()}
    return load_config(PROJECT_ROOT / "config" / "tiny.yaml", given, {})


def build(config: RunConfig, stage: Stage = Stage.ALIGNMENT) -> MiniGPT5:
    torch.manual_seed(0)
    return build_model(config.model, config.loss, stage)


def pictures(model: MiniGPT5, config: RunConfig) -> list[Image.Image]:
    drawn = [picture for reply in model.generate(PROMPTS, config.generation) for picture in reply.images]
    return drawn + model.render_captions(["a red circle"], ["one"], config.generation)


def test_offloaded_diffusion_model_draws_the_same_pictures():
    config = configure(model__diffusion__offload=True)
    offloaded = build(config).place(torch.device("cpu"))
    whole = build(configure()).place(torch.device("cpu"))
    for _ in range(2):  # the second time, the parts have been away
        ours, expected = pictures(offloaded, config), pictures(whole, config)
        assert len(ours) == len(expected) == 2
        assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, expected, strict=True))


def test_offloaded_parts_stay_behind_until_they_are_called():
    """The meta device stands for a GPU: what is moved there can be told from what is not."""
    model = build(configure(model__diffusion__offload=True)).place(torch.device("meta"))
    assert {p.device.type for name, p in model.named_parameters() if not name.startswith("diffusion.")} == {"meta"}
    assert {parameter.device.type for parameter in model.diffusion.parameters()} == {"cpu"}
    model.diffusion.vae.decode(torch.zeros(1, 4, 8, 8, device="meta"))
    assert {parameter.device.type for parameter in model.diffusion.vae.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.diffusion.unet.parameters()} == {"cpu"}


def test_offloading_is_refused_in_training_and_no_matter_to_predictions():
    config = configure(model__diffusion__offload=True, is_training=True)
    with pytest.raises(InputError, match=r"model\.diffusion\.offload: for generating alone"):
        check_run(config)
    data, checkpoint = PROJECT_ROOT / "config" / "tiny.yaml", {"--test_weight": CHECKPOINTS / "stage1_cc3m.ckpt"}
    plain = configure(is_training=True)
    assert describe_run(config, "cc3m", data, checkpoint) == describe_run(plain, "cc3m", data, checkpoint)


@pytest.mark.parametrize(("key", "is_training"), [("training.compile", True), ("generation.compile", False)])
def test_compiling_without_a_compiler_is_an_input_error(monkeypatch, key, is_training):
    monkeypatch.setattr("minigpt5.preflight.cpp_compiler", lambda: None)
    with pytest.raises(InputError, match=rf"{key}: torch\.compile needs a C\+\+ compiler"):
        check_run(configure(**{key.replace(".", "__"): True}, is_training=is_training))


def test_the_compiler_that_is_found_is_the_one_that_torch_takes():
    with inductor_config.patch({"cpp.cxx": ("/absent/c++",)}):
        assert cpp_compiler() is None
    with inductor_config.patch({"cpp.cxx": (sys.executable,)}):
        assert cpp_compiler() == sys.executable


def test_compiled_steps_with_8_bits_are_an_input_error():
    config = configure(generation__compile=True, model__backbone__language_model__quantization="8bit")
    with pytest.raises(InputError, match=r"generation\.compile: not with quantization: 8bit"):
        check_run(config)


def test_compiled_steps_are_no_matter_to_predictions():
    data, checkpoint = PROJECT_ROOT / "config" / "tiny.yaml", {"--test_weight": CHECKPOINTS / "stage1_cc3m.ckpt"}
    plain, compiled = configure(), configure(generation__compile=True)
    assert describe_run(compiled, "cc3m", data, checkpoint) == describe_run(plain, "cc3m", data, checkpoint)


def test_absent_quantization_package_is_an_input_error(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    config = configure(model__backbone__language_model__quantization="8bit")
    with pytest.raises(InputError, match=r"quantization: 8bit: .*pip install bitsandbytes"):
        check_quantization(config.model.backbone.language_model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_bits_without_a_gpu_are_an_input_error():
    config = configure(model__backbone__language_model__quantization="4bit", is_training=True)
    with pytest.raises(InputError, match=r"quantization: 4bit: needs a GPU.*take 8bit"):
        check_run(config)
    with pytest.raises(InputError, match=r"quantization: 4bit: needs a GPU.*take 8bit"):
        build(config)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_quantized_language_model_is_close_and_trains():
    config = configure(model__backbone__language_model__quantization="8bit")
    quantized, _, _ = load_language_model(config.model.backbone.language_model, torch.float32)
    whole, _, _ = load_language_model(configure().model.backbone.language_model, torch.float32)
    embeds = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected = (llama.model(inputs_embeds=embeds).last_hidden_state for llama in (quantized, whole))
    assert 0 < (ours - expected).norm() / expected.norm() < 0.02

    model = build(config, Stage.MULTIMODAL).train()
    states = model.backbone.language_model.model(inputs_embeds=embeds).last_hidden_state
    model.logits(states).sum().backward()
    lora = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert lora and all(parameter.grad.abs().sum() > 0 for parameter in lora)
    build_optimizer(model, TrainingConfig()).step()
    assert pictures(build(config), config)


GPU, CPU = Hardware((0, 1), "bf16-mixed"), Hardware((), "32-true")
ONE = Hardware((0,), "bf16-mixed")


@pytest.mark.parametrize(
    ("strategy", "hardware", "chosen"),
    [
        ("auto", GPU, "auto"),
        ("ddp", GPU, "ddp"),
        ("fsdp", GPU, "ddp"),
        ("fsdp", CPU, "auto"),
        ("ddp", ONE, "auto"),
        ("deepspeed_stage_2", GPU, "deepspeed_stage_2"),
    ],
)
def test_strategy_that_lightning_is_given(strategy, hardware, chosen, monkeypatch):
    """DeepSpeed's package is taken for installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert choose_strategy(configure(training__strategy=strategy), hardware) == chosen


def test_strategies_that_cannot_run_are_input_errors():
    with pytest.raises(InputError, match="--strategy fsdp_cpu_offload: .*take fsdp"):
        choose_strategy(configure(training__strategy="fsdp_cpu_offload"), GPU)
    quantized = configure(training__strategy="fsdp", model__backbone__language_model__quantization="8bit")
    with pytest.raises(InputError, match="--strategy fsdp: cannot share out quantized layers"):
        choose_strategy(quantized, GPU)
    installed = importlib.util.find_spec("deepspeed") is not None
    message = "needs a GPU" if installed else "pip install deepspeed"
    with pytest.raises(InputError, match=f"--strategy deepspeed_stage_2: .*{message}"):
        choose_strategy(configure(training__strategy="deepspeed_stage_2"), CPU)


@pytest.mark.parametrize(
    ("strategy", "is_training", "place"), [("ddp", True, "meta"), ("fsdp", False, "meta"), ("fsdp", True, "cpu")]
)
def test_language_model_goes_straight_to_its_card_unless_cards_share_it_out(strategy, is_training, place):
    """The meta device stands for a GPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()

    class Elsewhere(Hardware):
        def device(self, local_rank: int) -> torch.device:
            return torch.device("meta")

    config = configure(training__strategy=strategy, is_training=is_training)
    if not is_training:
        config = dataclasses.replace(config, test_weight=None)
    try:
        model = load_model(config, Elsewhere((0,), "32-true"), 0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.enable_cudnn_sdp(before[1])
    assert {p.device.type for p in model.backbone.language_model.parameters()} == {place}
    assert {p.device.type for p in model.diffusion.parameters()} == {"cpu"}
    assert {p.device.type for p in model.place(torch.device("meta")).parameters()} == {"meta"}
