"""What fits on which card, computed and not measured: ``python benchmarks/cards.py``.

Prints the tables of docs/performance.md from the plan of the paper's model (``train_eval.py --plan``).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from minigpt5.config import PROJECT_ROOT, RunConfig, Stage, load_config  # noqa: E402
from minigpt5.plan import (  # noqa: E402
    GIBIBYTE,
    build_counted,
    count_weights,
    default_workload,
    plan_prediction,
    plan_training,
)
from minigpt5.replay import Replay, Workload  # noqa: E402

MACHINES = ((1, 24, "auto"), (1, 40, "auto"), (1, 80, "auto"), (8, 24, "fsdp"), (8, 80, "ddp"), (8, 80, "fsdp"))
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for stage in Stage:
        config = load_config(PROJECT_ROOT / "config" / "minigpt5_7b.yaml", {"stage": stage.value}, {})
        print(f"\n{stage.value} stage: activations in GiB")
        lines = print_activations(config)
        print(f"\n{stage.value} stage: GiB on each device at the largest batch of {BATCHES} that fits")
        print_machines(config, lines)
    print("\nprediction: GiB by batch")
    print_prediction(config)


class Linear:
    """Peak bytes of a step as a line through those of batches 2 and 4; stands in for a replay in a plan."""

    def __init__(self, config: RunConfig, load: Workload, *, recompute: bool) -> None:
        peaks = [max(fresh(config).training(batch, load, recompute=recompute).values()) for batch in (2, 4)]
        self.slope = (peaks[1] - peaks[0]) / 2
        self.start = peaks[0] - 2 * self.slope

    def training(self, batch: int, *_: object, **__: object) -> dict[str, float]:
        """Return the line's value at a batch, as :meth:`minigpt5.replay.Replay.training` would."""
        return {"a line": self.start + self.slope * batch}


def fresh(config: RunConfig) -> Replay:
    return Replay(build_counted(config), torch.bfloat16)


def print_activations(config: RunConfig) -> dict[bool, Linear]:
    """Print the lines; returns those of the typical sample, kept and recomputed."""
    load = default_workload(config.stage)
    variants = {
        "one input picture more": replace(load, input_pictures=load.input_pictures + 1),
        "100 text positions more": replace(load, text_tokens=load.text_tokens + 100),
        "two pictures drawn": replace(load, output_pictures=2),
    }
    typical = {recompute: Linear(config, load, recompute=recompute) for recompute in (False, True)}
    lines = {"typical": typical[False], "typical, recomputed": typical[True]}
    lines |= {name: Linear(config, one, recompute=False) for name, one in variants.items()}
    for name, line in lines.items():
        print(f"  {name:28}{line.start / GIBIBYTE:6.2f} + {line.slope / GIBIBYTE:.2f} a sample")
    return typical


def print_machines(config: RunConfig, lines: dict[bool, Linear]) -> None:
    weights = count_weights(build_counted(config), torch.bfloat16)
    load = default_workload(config.stage)
    for recompute, line in lines.items():
        for devices, card, strategy in MACHINES:
            found = "does not fit at batch 1"
            for batch in BATCHES:
                training = replace(config.training, batch_size=batch, strategy=strategy)
                plan = plan_training(replace(config, training=training), weights, line, load, devices)
                if plan.fits(card):
                    found = f"batch {batch}, {plan.total / GIBIBYTE:.1f} GiB"
            print(f"  {devices} x {card} GB, {strategy}{', recomputed' if recompute else ''}: {found}")


def print_prediction(config: RunConfig) -> None:
    load = default_workload(config.stage)
    for quantization in ("none", "8bit", "4bit"):
        for offload in (False, True):
            backbone = config.model.backbone
            language_model = replace(backbone.language_model, quantization=quantization)
            diffusion = replace(config.model.diffusion, offload=offload)
            model = replace(
                config.model, backbone=replace(backbone, language_model=language_model), diffusion=diffusion
            )
            counted = replace(config, model=model)
            weights, replay = count_weights(build_counted(counted), torch.bfloat16), fresh(counted)
            sizes = []
            for batch in (1, 8):
                generation = replace(config.generation, batch_size=batch)
                plan = plan_prediction(replace(counted, generation=generation), weights, replay, load)
                sizes.append(f"{plan.total / GIBIBYTE:.1f}")
            print(f"  quantization {quantization}, offload {offload}: {', '.join(sizes)} at batch 1, 8")


if __name__ == "__main__":
    main()
