"""The floor of one stage-1 step of the paper's model, counted: ``python benchmarks/floor.py``.

FLOP come from torch's counter over the real modules on the meta device (two a multiply-add), so no weights and no
GPU are needed. docs/performance.md explains the formulas.

Shapes: B samples, T positions, S positions behind the constants, H language width, V vocabulary.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import DynamicCache, LlamaForCausalLM  # noqa: E402

from minigpt5.config import PROJECT_ROOT, Stage, load_config  # noqa: E402
from minigpt5.kv_cache import as_argument  # noqa: E402
from minigpt5.model import MiniGPT5, build_random  # noqa: E402

GIGA, TERA = 1e9, 1e12
LABELLED = 3
"""Of a CC3M response: the first and the last voken and the stop token."""
ADAM_BYTES = 28
"""Of a float32 parameter: read value, gradient and two moments; write value and moments."""


@dataclass(frozen=True)
class Part:
    """One line of the count, for the whole batch."""

    name: str
    flop: float
    weight_bytes: float
    """Read once a pass."""


def main() -> None:
    """Print the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="samples of a step (default: the paper's 2)")
    parser.add_argument("--tokens", type=int, default=40, help="positions of a sample, pictures included")
    parser.add_argument("--response", type=int, default=10, help="positions from the first voken on")
    parser.add_argument("--pictures", type=int, default=0, help="input pictures of a sample (CC3M: none)")
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 rate of the card (H100: 989)")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s of the card's memory (H100: 3.35)")
    arguments = parser.parse_args()
    if not 0 < arguments.response < arguments.tokens:
        given = f"--response {arguments.response} --tokens {arguments.tokens}"
        parser.error(f"{given}: the response is a part of a sample's positions; give 0 < response < tokens")
    config = load_config(PROJECT_ROOT / "config" / "minigpt5_7b.yaml", {}, {})
    with torch.device("meta"):
        model = build_random(config.model, config.loss, Stage.ALIGNMENT)
        parts = count_step(model, arguments.batch, arguments.tokens, arguments.response, arguments.pictures)
    _print_parts(parts, arguments.tflops, arguments.bandwidth)
    _print_rows(model)


def count_step(model: MiniGPT5, batch: int, tokens: int, response: int, pictures: int) -> list[Part]:
    """Return forward and backward passes of every part, in the order they run."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.to(torch.bfloat16).requires_grad_(False)
    model.mapper.train()  # torch's fused inference path would not be counted
    llama, diffusion = model.backbone.language_model, model.diffusion
    layers = _bytes(llama.model.layers)
    width = llama.config.hidden_size
    constants = tokens - response
    head = 2 * batch * LABELLED * width * len(model.backbone.head_VH)
    head_bytes = 2 * model.backbone.head_VH.numel()

    def language(positions: int, before: int = 0, *, backward: bool = False) -> float:
        return _count_language(llama, batch, positions, before, backward=backward)

    side = model.config.diffusion.image_size
    latent = side // diffusion.vae_factor
    noisy = torch.empty(batch, 4, latent, latent, dtype=torch.bfloat16)
    condition = torch.empty(batch, 77, diffusion.width, dtype=torch.bfloat16, requires_grad=True)

    def unet(*, backward: bool = False) -> float:
        steps = torch.zeros(batch, dtype=torch.long)
        return _count(lambda: diffusion.unet(noisy, steps, condition).sample, backward=backward)

    vae = _count(lambda: diffusion.vae.encode(torch.empty(batch, 3, side, side, dtype=torch.bfloat16)))
    captions = torch.zeros(batch, 77, dtype=torch.long)
    text = _count(lambda: diffusion.text_encoder(captions))
    mapper = _count(lambda: model.mapper(torch.empty(batch, 8, width, dtype=torch.bfloat16)))
    vision_size = model.config.backbone.vision.image_size
    parts = [
        Part("VAE encoder", vae, _bytes(diffusion.vae.encoder)),
        Part("text encoder", text, _bytes(diffusion.text_encoder)),
        Part("LLaMA forward, constants", language(constants), layers),
        Part("LLaMA forward, rest", language(response, constants), layers),
        Part("LLaMA backward, rest (inputs only)", language(response, constants, backward=True), layers),
        Part("head at labels, forward and backward", 2 * head, 2 * head_bytes),
        Part("mapper forward", mapper, 2 * _bytes(model.mapper)),
        Part("mapper backward (inputs and weights)", 2 * mapper, 2 * _bytes(model.mapper)),
        Part("UNet forward", unet(), _bytes(diffusion.unet)),
        Part("UNet backward (inputs only)", unet(backward=True), _bytes(diffusion.unet)),
        Part("AdamW", 0.0, ADAM_BYTES * trainable),
    ]
    if pictures:
        pixels = torch.empty(batch * pictures, 3, vision_size, vision_size, dtype=torch.bfloat16)
        vision = _count(lambda: model.backbone.encode_images(pixels))
        parts.insert(
            0, Part("ViT and Q-Former", vision, _bytes(model.backbone.vision) + _bytes(model.backbone.qformer))
        )
    return parts


def _count_language(llama: LlamaForCausalLM, batch: int, positions: int, before: int, *, backward: bool) -> float:
    """Count the layers over positions that attend to those before them and to each other."""
    config = llama.config
    embeds = torch.empty(batch, positions, config.hidden_size, dtype=torch.bfloat16, requires_grad=backward)
    cache = DynamicCache(config=config)
    head_width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        keys = torch.empty(batch, config.num_key_value_heads, before, head_width, dtype=torch.bfloat16)
        cache.update(keys, keys, layer)
    # A mask that is ready spares transformers a look at values, which the meta device does not have.
    mask = torch.empty(batch, 1, positions, before + positions, dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        arguments = as_argument(cache)
        return llama.model(
            inputs_embeds=embeds, attention_mask=mask, **arguments, use_cache=True
        ).last_hidden_state

    return _count(run, backward=backward)


def _count(run: Callable[[], Any], *, backward: bool = False) -> float:
    """Return the FLOP of a call, or of the backward pass from what it returns."""
    result = run() if backward else None
    with FlopCounterMode(display=False) as counter:
        if result is not None:
            result.sum().backward()
        else:
            with torch.no_grad():
                run()
    return float(counter.get_total_flops())


def _bytes(module: nn.Module) -> float:
    """Return a module's weights in bfloat16."""
    return 2.0 * sum(parameter.numel() for parameter in module.parameters())


def _print_parts(parts: list[Part], tflops: float, bandwidth: float) -> None:
    print(f"{'':40}{'GFLOP':>10}{'weights GB':>12}{'compute ms':>12}{'memory ms':>11}{'floor ms':>10}")
    total = 0.0
    for part in parts:
        compute, memory = 1e3 * part.flop / (tflops * TERA), 1e3 * part.weight_bytes / (bandwidth * TERA)
        total += max(compute, memory)
        print(
            f"{part.name:40}{part.flop / GIGA:10.0f}{part.weight_bytes / GIGA:12.2f}{compute:12.2f}{memory:11.2f}"
            f"{max(compute, memory):10.2f}"
        )
    flop, weights = sum(part.flop for part in parts), sum(part.weight_bytes for part in parts)
    print(f"{'total':40}{flop / GIGA:10.0f}{weights / GIGA:12.2f}{'':23}{total:10.2f}")


def _print_rows(model: MiniGPT5) -> None:
    """Print what gradient, moments and mask of the new rows cost, and those of the whole matrices."""
    rows = sum(value.numel() for value in (model.rows.embedding, model.rows.head))
    whole = 2 * model.backbone.head_VH.numel() + rows
    ours, published = 3 * 4 * rows, 3 * 4 * whole
    print(f"\nrows: gradient and moments {ours / 1e6:.2f} MB; of the whole matrices {published / GIGA:.2f} GB, ")
    print(f"and {4 * whole / GIGA:.2f} GB of masks")


if __name__ == "__main__":
    main()
