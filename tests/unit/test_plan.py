"""The memory plan against models that were really built, and steps that were really run."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from minigpt4.errors import InputError
from minigpt5.config import PROJECT_ROOT, RunConfig, Stage, load_config
from minigpt5.data.module import DataModule
from minigpt5.kv_cache import new_cache, room_after
from minigpt5.model import PICTURES_AT_ONCE, MiniGPT5, build_model
from minigpt5.plan import (
    GIBIBYTE,
    Plan,
    build_counted,
    count_weights,
    kv_cache_bytes,
    parse_workload,
    plan_prediction,
    plan_training,
    quantized_bytes,
    report,
)
from minigpt5.replay import Replay, Workload, is_frozen_part
from minigpt5.training import build_optimizer

FILES = {Stage.ALIGNMENT: ("CC3M", "cc3m_val.tsv"), Stage.MULTIMODAL: ("VIST", "val_cleaned.json")}
FACTOR = 1.5
"""The activation estimate is within this factor of the measured peak, either way."""


def configure(stage: Stage, **values) -> RunConfig:
    folder, file = FILES[stage]
    given = {
        "stage": stage.value,
        "training.precision": "32-true",
        "data.folder": PROJECT_ROOT / "datasets" / folder,
        "data.train": file,
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return load_config(PROJECT_ROOT / "config" / "tiny.yaml", given, {})


def build(config: RunConfig, dtype: torch.dtype = torch.float32) -> MiniGPT5:
    return build_model(config.model, config.loss, config.stage, dtype)


class Step:
    """A training step of the tiny model on the CPU."""

    def __init__(self, config: RunConfig) -> None:
        self.model = build(config)
        data = DataModule(config, self.model.tokenizer, self.model.voken_ids)
        self.batch = next(iter(data.train_dataloader()))
        self.optimizer = build_optimizer(self.model, config.training)
        self.draws = self.model.draw(self.batch, seed=0, epoch=0, training=True)
        self.model.train()

    def run(self) -> None:
        self.model(self.batch, self.draws).total.backward()

    @property
    def workload(self) -> Workload:
        """What the batch's samples hold, at most."""
        queries = self.model.config.backbone.qformer.num_queries
        pictures = max(self.batch.input_counts)
        with torch.no_grad():
            prompt = self.model.language_states(self.batch).prompt
        behind = int((prompt.mask_BT.sum(1) - prompt.constant_B).max())
        labelled = int((prompt.labels_BT != -100).sum(1).max())
        positions = prompt.mask_BT.shape[1]
        response = behind if self.model.stage is Stage.ALIGNMENT else labelled
        return Workload(positions - pictures * queries, response, pictures)


def peak_of(run) -> int:
    """Return the most bytes of tensors that were held at once while it ran, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", list(Stage))
def test_parameter_bytes_are_those_of_the_built_model(stage, dtype):
    config = configure(stage)
    counted = count_weights(build_counted(config), dtype)
    model = build(config, dtype)
    sizes = {name: (value.nbytes, value.requires_grad) for name, value in model.named_parameters()}
    assert sum(counted.frozen.values()) == sum(size for size, trains in sizes.values() if not trains)
    assert sum(counted.trainable.values()) == sum(size for size, trains in sizes.values() if trains)
    layers = [p for p in model.backbone.language_model.model.layers.parameters() if not p.requires_grad]
    assert counted.shardable == sum(parameter.nbytes for parameter in layers)
    types = {value.dtype for name, value in model.named_parameters() if is_frozen_part(name)}
    assert types == {dtype}


@pytest.mark.parametrize("stage", list(Stage))
def test_gradient_optimizer_and_activation_bytes_are_those_of_a_step(stage):
    config = configure(stage, training__batch_size=4)
    step = Step(config)
    step.run()
    step.optimizer.step()
    counted = count_weights(build_counted(config), torch.float32)
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    assert counted.gradients == sum(parameter.grad.nbytes for parameter in trained)
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    assert counted.optimizer == sum(value.nbytes for value in states)

    measured = peak_of(step.run)  # gradients are there from the first step, and accumulate
    phases = Replay(build_counted(config), torch.float32).training(4, step.workload, recompute=False)
    assert measured / FACTOR < max(phases.values()) < measured * FACTOR, (measured, phases)


def test_recomputed_activations_take_less():
    config = configure(Stage.MULTIMODAL)
    load = Workload(150, 40, 4)
    kept = Replay(build_counted(config), torch.float32).training(4, load, recompute=False)
    recomputed = Replay(build_counted(config), torch.float32).training(4, load, recompute=True)
    assert recomputed["language"] < 0.6 * kept["language"]
    assert recomputed["unet"] < 0.7 * kept["unet"]


def test_a_step_without_pictures_skips_vision_and_unet():
    replay = Replay(build_counted(configure(Stage.MULTIMODAL)), torch.float32)
    without = replay.training(2, Workload(60, 20, 0, output_pictures=0), recompute=False)
    assert "unet" not in without and "vae" not in without


@pytest.mark.parametrize(("prompt", "longest"), [(5, 20), (40, 81), (100, 356)])
def test_keys_and_values_take_what_the_cache_takes(prompt, longest):
    model = build_counted(configure(Stage.ALIGNMENT))
    llama = model.backbone.language_model.config
    cache = new_cache(llama)
    shape = (3, llama.num_key_value_heads, prompt, llama.hidden_size // llama.num_attention_heads)
    new = torch.empty(shape)
    for positions in (prompt, *[1] * (longest - prompt)):
        for layer in range(llama.num_hidden_layers):
            cache.update(new[:, :, :positions], new[:, :, :positions], layer)
    held = {id(buffer): buffer.nbytes for layer in cache.layers for buffer in layer._buffers}
    assert cache.layers[0]._buffers[0].shape[2] == room_after(prompt, longest)
    assert kv_cache_bytes(model, 3, room_after(prompt, longest)) == sum(held.values())


def test_compiled_steps_keep_a_room_of_their_own():
    """It stays, also in the phase that takes most, which is drawing here."""
    plain, compiled = (
        configure(Stage.ALIGNMENT, generation__batch_size=8, generation__compile=compile)
        for compile in (False, True)
    )
    model = build_counted(plain)
    weights, replay, load = count_weights(model, torch.float32), Replay(model, torch.float32), Workload(40, 10, 0)
    lines = plan_prediction(plain, weights, replay, load).lines
    assert "keys and values" not in lines
    lines |= {"keys and values": kv_cache_bytes(model, 8, 256)}
    assert plan_prediction(compiled, weights, replay, load).lines == lines


def test_strategies_share_out_what_they_say():
    config = configure(Stage.ALIGNMENT)
    model = build_counted(config)
    weights = count_weights(model, torch.float32)
    replay, load = Replay(model, torch.float32), Workload(40, 10, 0)

    def lines(strategy: str, devices: int) -> dict[str, float]:
        chosen = configure(Stage.ALIGNMENT, training__strategy=strategy)
        return plan_training(chosen, weights, replay, load, devices).lines

    one, two = lines("auto", 1), lines("ddp", 2)
    assert two.keys() - one.keys() == {"gradients being exchanged"}
    assert lines("fsdp", 1) == one
    shared = lines("fsdp", 4)["parameters, frozen"]
    whole = sum(weights.frozen.values()) - weights.shardable
    assert shared == whole + weights.shardable // 4 + 2 * weights.largest_layer
    assert lines("deepspeed_stage_2", 4)["optimizer state"] == weights.optimizer // 4
    with pytest.raises(InputError, match="--plan: no formula for --strategy deepspeed_stage_3; known: auto, ddp"):
        lines("deepspeed_stage_3", 2)


def test_offloading_leaves_only_the_running_part_of_the_diffusion_model():
    load = Workload(40, 10, 0)
    config = configure(Stage.ALIGNMENT)
    model = build_counted(config)
    weights, replay = count_weights(model, torch.float32), Replay(model, torch.float32)
    kept = plan_prediction(config, weights, replay, load)
    offloaded = plan_prediction(configure(Stage.ALIGNMENT, model__diffusion__offload=True), weights, replay, load)
    diffusion = sum(weights.frozen[part] for part in ("unet", "vae", "text encoder"))
    assert kept.lines["parameters"] - offloaded.lines["parameters"] == diffusion
    assert offloaded.total < kept.total


def test_generating_in_half_precision_takes_half():
    """It knows no autocast, which would run the norms in float32."""
    load = Workload(40, 10, 1)
    whole, half = (
        Replay(build_counted(configure(Stage.ALIGNMENT)), dtype).prediction(4, load, guided=True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for phase in ("input pictures", "unet", "vae"):
        assert half[phase] == pytest.approx(whole[phase] / 2, rel=0.05)


def test_only_so_many_pictures_are_seen_and_drawn_at_once():
    load = Workload(40, 10, 1)
    few, many = (
        Replay(build_counted(configure(Stage.ALIGNMENT)), torch.float32).prediction(batch, load, guided=True)
        for batch in (PICTURES_AT_ONCE, 2 * PICTURES_AT_ONCE)
    )
    for phase in ("input pictures", "vae"):
        assert many[phase] == pytest.approx(few[phase], rel=0.05)
    assert many["language"] > 1.8 * few["language"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__strategy": "dpp"}, "no formula for --strategy dpp"),
        ({"training__strategy": "fsdp_cpu_offload"}, "does not fit this model"),
        (
            {"training__strategy": "fsdp", "model__backbone__language_model__quantization": "8bit"},
            "cannot share out quantized layers",
        ),
        (
            {"model__adapter__kind": "prefix", "training__gradient_checkpointing": True},
            r"training\.gradient_checkpointing: not with model\.adapter\.kind: prefix",
        ),
        (
            {"generation__compile": True, "model__backbone__language_model__quantization": "8bit"},
            r"generation\.compile: not with quantization: 8bit",
        ),
        ({"is_training": True, "model__diffusion__offload": True}, r"\.offload: for generating alone"),
    ],
)
def test_a_run_that_would_be_refused_is_not_planned(changes, message):
    with pytest.raises(InputError, match=message):
        list(report(configure(Stage.MULTIMODAL, **changes), ""))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantized_layers_are_counted_as_bitsandbytes_stores_them():
    from bitsandbytes.functional import quantize_4bit

    config = configure(Stage.ALIGNMENT, model__backbone__language_model__quantization="8bit")
    counted = count_weights(build_counted(config), torch.float32)
    layers = build(config).backbone.language_model.model.layers
    scales = [parameter.SCB.nbytes for parameter in layers.parameters() if hasattr(parameter, "SCB")]
    assert len(scales) == 7 * len(layers)
    assert counted.shardable == sum(parameter.nbytes for parameter in layers.parameters()) + sum(scales)
    matrix = torch.randn(344, 128)
    packed, state = quantize_4bit(matrix, quant_type="nf4")
    assert quantized_bytes(matrix.shape, matrix.dtype, "4bit") == packed.nbytes + state.absmax.nbytes


def test_a_plan_fits_with_its_reserve():
    """Of what a card named by 24 GB gives, not of 24 GiB."""
    assert Plan({"parameters": 20.4 * GIBIBYTE}).fits(24)
    assert not Plan({"parameters": 20.6 * GIBIBYTE}).fits(24)


def test_one_device_exchanges_nothing_whatever_the_strategy():
    """As ``choose_strategy`` gives Lightning no ``ddp`` then."""
    for strategy, devices, exchanges in (("ddp", 1, False), ("ddp", 2, True), ("auto", 2, True)):
        config = configure(Stage.ALIGNMENT, training__strategy=strategy)
        model = build_counted(config)
        weights = count_weights(model, torch.float32)
        plan = plan_training(config, weights, Replay(model, torch.float32), Workload(40, 10, 0), devices)
        assert ("gradients being exchanged" in plan.lines) is exchanges


@pytest.mark.parametrize("text", ["many", "0,1", "10", "10,-1", "10,1,1"])
def test_a_malformed_sample_is_an_input_error(text):
    with pytest.raises(InputError, match="--plan .*: expected text tokens and input pictures"):
        parse_workload(text, Stage.ALIGNMENT)


def test_sizes_that_only_the_weights_know_are_an_input_error():
    config = configure(Stage.ALIGNMENT, model__diffusion__architecture=None)
    with pytest.raises(InputError, match=r"--plan: counts from model\.diffusion\.architecture"):
        list(report(config, ""))


@pytest.mark.slow
def test_command_line_prints_the_plan_of_the_papers_model_without_its_weights(tmp_path):
    """Sizes alone are needed: neither weights nor data exist here."""
    command = [sys.executable, str(PROJECT_ROOT / "train_eval.py"), "--plan", "60,1"]
    command += [
        "--config",
        str(PROJECT_ROOT / "config" / "minigpt5_7b.yaml"),
        "--gpus",
        "0,1",
        "--strategy",
        "fsdp",
    ]
    command += ["--set", "model.diffusion.weights=/absent"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "a sample: 92 positions (60 of text, 1 input pictures)" in finished.stdout
    assert finished.stdout.count("fits on a card of: 16 GB") == 2
    assert "give programs: 16 GB 14.5 GiB, 24 GB 22 GiB" in finished.stdout
    assert "language model, frozen                         12.55 GiB" in finished.stdout
