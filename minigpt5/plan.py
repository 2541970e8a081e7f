"""How much memory a run needs on each device, counted before anything is loaded: ``train_eval.py --plan``.

Parameters, gradients and optimizer state are exact: they are counted over the real modules on the meta device.
Activations come from :mod:`minigpt5.replay`. docs/performance.md gives the formulas.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from minigpt4.errors import InputError
from minigpt5.config import RunConfig, Stage
from minigpt5.hardware import FROZEN_DTYPES
from minigpt5.kv_cache import fixed_room, room_after
from minigpt5.model import MiniGPT5, build_random
from minigpt5.preflight import check_settings
from minigpt5.replay import Replay, Workload, is_frozen_part
from minigpt5.strategies import SHARDED

GIBIBYTE = 2**30
CARDS = {16: 14.5, 24: 22.0, 40: 39.0, 80: 79.0}
"""GB in a card's name → GiB that programs get of it, by the smallest of that name (T4, A10, A100, A100)."""
RESERVE = 1.5 * GIBIBYTE
"""Assumed, not counted: CUDA's context, its libraries' workspaces and what the allocator cannot use."""
_FLOAT, _MOMENTS = 4, 2
_NF4_BLOCK = 64
"""Weights that share one float32 scale in bitsandbytes' 4-bit layout."""
_STRATEGIES = ("auto", "ddp", SHARDED, "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2")
_TYPICAL = {Stage.ALIGNMENT: (40, 10, 0), Stage.MULTIMODAL: (150, 40, 4)}
"""Positions of text, of the response, and input pictures: a CC3M caption; a VIST story told to its last step."""


@dataclass(frozen=True)
class WeightBytes:
    """What a stage's parameters, gradients and optimizer state take, before anything is shared out."""

    frozen: dict[str, int]
    """By part."""
    trainable: dict[str, int]
    gradients: int
    optimizer: int
    shardable: int
    """Of the frozen bytes, those of the language model's layers."""
    largest_layer: int
    """Of the shardable bytes, those of one layer, which is whole while it runs."""

    @property
    def parameters(self) -> int:
        """Frozen and trainable."""
        return sum(self.frozen.values()) + sum(self.trainable.values())


@dataclass(frozen=True)
class Plan:
    """Bytes on each device, by what they are for."""

    lines: dict[str, float]

    @property
    def total(self) -> float:
        """All of it, without :data:`RESERVE`."""
        return sum(self.lines.values())

    def fits(self, card: int) -> bool:
        """Return whether a card of :data:`CARDS` holds it, the reserve included."""
        return self.total + RESERVE <= CARDS[card] * GIBIBYTE


def default_workload(stage: Stage) -> Workload:
    """Return what a typical sample of a stage's data looks like."""
    text, response, pictures = _TYPICAL[stage]
    return Workload(text, response, pictures)


def parse_workload(text: str, stage: Stage) -> Workload:
    """Read ``TOKENS,PICTURES`` of ``--plan``; empty is the stage's typical sample.

    Raises:
        InputError: anything else.
    """
    typical = default_workload(stage)
    if not text:
        return typical
    try:
        tokens, pictures = (int(part) for part in text.split(","))
    except ValueError:
        tokens, pictures = 0, 0
    if tokens < 1 or pictures < 0:
        raise InputError(
            f"--plan {text}: expected text tokens and input pictures of a sample, such as "
            f"{typical.text_tokens},{typical.input_pictures}"
        )
    return Workload(tokens, min(typical.response_tokens, tokens), pictures)


def build_counted(config: RunConfig) -> MiniGPT5:
    """Build a run's model without storage.

    Raises:
        InputError: a part's sizes are not in the configuration.
    """
    if config.model.backbone.language_model.architecture is None:
        raise InputError("--plan: counts from model.backbone.language_model.architecture, which is not given")
    if config.model.diffusion.architecture is None:
        raise InputError("--plan: counts from model.diffusion.architecture, which is not given")
    with torch.device("meta"):
        return build_random(config.model, config.loss, config.stage)


def count_weights(model: MiniGPT5, frozen: torch.dtype) -> WeightBytes:
    """Count a model's bytes; buffers, a few kilobytes, are left out.

    Args:
        model: on any device; only shapes and names are looked at.
        frozen: type of the frozen parts; everything else is float32.
    """
    quantization = model.config.backbone.language_model.quantization
    parts: dict[str, int] = {}
    trainable: dict[str, int] = {}
    layers: dict[str, int] = {}
    tensors = 0
    for name, parameter in model.named_parameters():
        size = _FLOAT * parameter.numel()
        if is_frozen_part(name):
            size = frozen.itemsize * parameter.numel()
            layer = name.partition(".model.layers.")[2]
            if layer and name.startswith("backbone.language_model."):
                if parameter.ndim == 2:
                    size = quantized_bytes(parameter.shape, frozen, quantization)
                layers[layer.partition(".")[0]] = layers.get(layer.partition(".")[0], 0) + size
        group = trainable if parameter.requires_grad else parts
        group[_part(name)] = group.get(_part(name), 0) + size
        tensors += parameter.requires_grad
    gradients = sum(trainable.values())
    # AdamW keeps each tensor's step count beside its two moments.
    optimizer = _MOMENTS * gradients + _FLOAT * tensors
    return WeightBytes(
        parts, trainable, gradients, optimizer, sum(layers.values()), max(layers.values(), default=0)
    )


def quantized_bytes(shape: torch.Size, dtype: torch.dtype, quantization: str) -> int:
    """Return what a matrix takes in bitsandbytes' layout, or as it is for ``none``."""
    numel = shape.numel()
    if quantization == "8bit":
        return numel + _FLOAT * shape[0]
    if quantization == "4bit":
        return -(-numel // 2) + _FLOAT * -(-numel // _NF4_BLOCK)
    return dtype.itemsize * numel


def _part(name: str) -> str:
    first, second, *_ = name.split(".")
    if "lora_" in name:
        return "LoRA"
    names = {"rows": "voken rows", "mapper": "mapper", "prefix": "prefix"}
    return names.get(first, second.replace("_", " "))


def planned_strategy(config: RunConfig, devices: int) -> str:
    """Return the strategy that shares a training out; one device has nothing to share.

    Raises:
        InputError: one that the plan has no formula for.
    """
    name = config.training.strategy
    if name not in _STRATEGIES:
        raise InputError(f"--plan: no formula for --strategy {name}; known: {', '.join(_STRATEGIES)}")
    return name if devices > 1 else "auto"


def plan_training(config: RunConfig, weights: WeightBytes, replay: Replay, load: Workload, devices: int) -> Plan:
    """Return the bytes on each device while training.

    DeepSpeed's stage 1 shares out the optimizer state, stage 2 (its default) the gradients too.

    Args:
        config: batch size, strategy.
        weights: the model's bytes.
        replay: the model, for its activations.
        load: what a sample holds.
        devices: over all machines.

    Raises:
        InputError: a strategy that the plan has no formula for.
    """
    training = config.training
    strategy = planned_strategy(config, devices)
    phases = replay.training(training.batch_size, load, recompute=training.gradient_checkpointing)
    frozen, gradients, optimizer = sum(weights.frozen.values()), weights.gradients, weights.optimizer
    lines: dict[str, float] = {}
    if strategy == SHARDED:
        # Two layers are whole at a time: the one that runs and the next, which is on its way.
        frozen += weights.shardable // devices - weights.shardable + 2 * weights.largest_layer
    elif strategy.startswith("deepspeed"):
        optimizer //= devices
        gradients //= 1 if strategy == "deepspeed_stage_1" else devices
    lines["parameters, frozen"] = frozen
    lines["parameters, trainable"] = sum(weights.trainable.values())
    lines["gradients"] = gradients
    if devices > 1:
        lines["gradients being exchanged"] = weights.gradients
    lines["optimizer state"] = optimizer
    lines[f"activations (largest: {_largest(phases)})"] = max(phases.values())
    return Plan(lines)


def plan_prediction(config: RunConfig, weights: WeightBytes, replay: Replay, load: Workload) -> Plan:
    """Return the bytes on each device while generating; every device holds the whole model."""
    batch, generation = config.generation.batch_size, config.generation
    phases = replay.prediction(batch, load, guided=generation.guidance_scale > 1)
    positions = load.positions(config.model)
    longest = positions + generation.max_new_tokens
    if generation.compile:
        room = fixed_room(longest + config.model.vokens.count)
    else:
        room = room_after(positions, longest)
    cache = kv_cache_bytes(replay.model, batch, room)
    kept = weights.parameters
    needs = dict(phases)
    if config.model.diffusion.offload:
        diffusion = {part: weights.frozen[part] for part in ("unet", "vae", "text encoder")}
        kept -= sum(diffusion.values())
        needs = {phase: size + diffusion.get(phase, 0) for phase, size in needs.items()}
        if generation.baseline_images:
            needs["text encoder"] = diffusion["text encoder"]
    # The cache of compiled steps stays, also while pictures are rendered.
    held = {phase: cache if generation.compile or phase == "language" else 0 for phase in needs}
    largest = max(needs, key=lambda phase: needs[phase] + held[phase])
    lines = {"parameters": float(kept)}
    if held[largest]:
        lines["keys and values"] = cache
    lines[f"activations (largest: {largest})"] = needs[largest]
    return Plan(lines)


def kv_cache_bytes(model: MiniGPT5, batch: int, room: int) -> int:
    """Return the bytes of the buffers that hold every layer's keys and values.

    batch · layers · 2 · key-value heads · head width · room (positions of a prompt that there is space for).
    """
    config = model.backbone.language_model.config
    width = config.hidden_size // config.num_attention_heads
    itemsize = model.backbone.projection.weight.dtype.itemsize
    return batch * config.num_hidden_layers * 2 * config.num_key_value_heads * width * room * itemsize


def report(config: RunConfig, workload: str) -> Iterator[str]:
    """Yield the lines of a run's plan.

    Args:
        config: the run.
        workload: ``--plan``'s value.

    Raises:
        InputError: settings that rule each other out; else as :func:`build_counted`, :func:`parse_workload` and
            :func:`planned_strategy`.
    """
    check_settings(config)
    load = parse_workload(workload, config.stage)
    precision = "bf16-mixed" if config.training.precision == "auto" else config.training.precision
    per_node = len(config.training.devices or ()) or torch.cuda.device_count() or 1
    devices = per_node * config.training.num_nodes
    strategy = planned_strategy(config, devices)
    model = build_counted(config)
    weights = count_weights(model, FROZEN_DTYPES[precision])
    replay = Replay(model, FROZEN_DTYPES[precision])
    positions = load.positions(config.model)
    yield f"{config.stage.value} stage, {precision}, {devices} device(s), strategy {strategy}"
    yield (
        f"a sample: {positions} positions ({load.text_tokens} of text, {load.input_pictures} input pictures), "
        f"{load.output_pictures} picture drawn"
    )
    yield from _weight_lines(weights)
    # Generation is replayed first: training leaves gradients behind.
    prediction = plan_prediction(config, weights, replay, load)
    training = plan_training(config, weights, replay, load, devices)
    yield from _plan_lines(f"training, batch {config.training.batch_size} on each device", training)
    title = f"prediction, batch {config.generation.batch_size}, {config.generation.max_new_tokens} new tokens"
    yield from _plan_lines(title, prediction)
    yield ""
    given = ", ".join(f"{card} GB {size:g} GiB" for card, size in CARDS.items())
    yield f"Beside the totals, {_readable(RESERVE)} is assumed for CUDA's context, workspaces and fragmentation."
    yield f"Cards count as what the smallest of their name give programs: {given}."
    yield "Parameters, gradients and optimizer state are exact; activations are an estimate (docs/performance.md)."


def _weight_lines(weights: WeightBytes) -> Iterator[str]:
    yield ""
    yield "parameters"
    for part, size in weights.frozen.items():
        yield f"  {part + ', frozen':44}{_readable(size):>12}"
    for part, size in weights.trainable.items():
        yield f"  {part + ', trainable':44}{_readable(size):>12}"
    yield f"  {'total':44}{_readable(weights.parameters):>12}"


def _plan_lines(title: str, plan: Plan) -> Iterator[str]:
    yield ""
    yield title
    for name, size in plan.lines.items():
        yield f"  {name:44}{_readable(size):>12}"
    yield f"  {'total':44}{_readable(plan.total):>12}"
    verdicts = [f"{card} GB {'yes' if plan.fits(card) else 'no'}" for card in CARDS]
    yield f"  fits on a card of: {', '.join(verdicts)}"


def _largest(phases: dict[str, int]) -> str:
    return max(phases, key=lambda phase: phases[phase])


def _readable(size: float) -> str:
    return f"{size / GIBIBYTE:.2f} GiB" if size >= GIBIBYTE / 10 else f"{size / 2**20:.2f} MiB"
