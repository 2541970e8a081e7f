"""Training steps: seconds by phase, samples a second, peak memory, and the state the trained rows carry."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import limits, reference, worlds
from benchmarks.harness import (
    MEBIBYTE,
    PhaseClock,
    Phases,
    Report,
    Settings,
    alternate_alone,
    assert_close,
    forget_peak,
    mixed_precision,
    peak_bytes,
    serve,
)
from minigpt5.config import Stage, TrainingConfig
from minigpt5.data.types import Batch
from minigpt5.losses import Draws
from minigpt5.model import MiniGPT5
from minigpt5.plan import build_counted, count_weights, plan_training
from minigpt5.replay import Replay, Workload
from minigpt5.training import build_optimizer
from minigpt5.vokens import IGNORE_INDEX

BATCH_SIZE = 4


@dataclass(frozen=True)
class Case:
    """What a training step is measured on."""

    stage: Stage
    tokens: int
    """Of each text, before its picture takes its place."""
    pictures: int
    """Of each prompt: 0 or 1."""
    cached: bool
    """Whether a feature folder can take the pictures' place: in CC3M's training."""

    def batch(self, world: worlds.World, seed: int) -> Batch:
        """Return the batch of every step."""
        return worlds.training_batch(world, BATCH_SIZE, seed, tokens=self.tokens, pictures=self.pictures)


CASES = {
    "stage1": Case(Stage.ALIGNMENT, 104, 1, cached=True),
    "captions": Case(Stage.ALIGNMENT, 40, 0, cached=True),
    "stage2": Case(Stage.MULTIMODAL, 104, 1, cached=False),
}
"""Captions are as long as CC3M's, which have no picture in their prompt."""
EQUAL_STEPS = 3
WARM_UP = 2
"""Steps of a process before those that are asked for: the first ask for memory and make the optimizer's state."""
TERA = 1e12
TOLERANCE = {"cpu": 2e-5, "cuda": 2e-2}
"""Of the loss, relative; on a GPU the frozen parts are bfloat16 and sums are ordered differently."""
ROWS_TOLERANCE = {"cpu": 1e-3, "cuda": 0.5}
"""Of all that the steps changed in the rows, relative; 1 if one side had not trained. 4e-6 was seen on a CPU.
AdamW makes a whole step of a gradient that differs by rounding alone, so a GPU is given much; none was measured.
"""


def measure(settings: Settings) -> Report:
    """Measure every case, live and, where there is one, with the feature cache on either side."""
    report = Report(settings)
    for name, case in CASES.items():
        _measure_case(report, name, case)
    return report


def _measure_case(report: Report, name: str, case: Case) -> None:
    settings = report.settings
    paths = _Paths(settings, case)
    report.equal.append(f"{name}: " + paths.check_equal())
    ours = {"live": paths.live, **({"cached": paths.cached} if case.cached else {})}
    flop = {path: limits.flop_of(step) for path, step in ours.items()}
    dtype = paths.model.backbone.projection.weight.dtype
    rows_reference, rows_ours = paths.row_state()
    planned = paths.planned_bytes()
    del paths, ours  # the workers' models take their place
    which = ("reference", "live", *(("reference_cached", "cached") if case.cached else ()))
    medians, printed = alternate_alone(settings, {path: f"{name}:{path}" for path in which})
    published, live = medians["reference"], medians["live"]
    for phase in ("forward", "backward", "optimizer", "total"):
        report.add(f"{name} {phase}", "s", published[phase], live[phase])
    rates = {path: BATCH_SIZE / phases["total"] for path, phases in medians.items()}
    more = {"higher_is_better": True}
    report.add(f"{name} live", "samples/s", rates["reference"], rates["live"], **more)
    if case.cached:
        report.add(f"{name} feature cache", "samples/s", rates["reference"], rates["cached"], **more)
        both = f"{name} feature cache in both"
        report.add(both, "samples/s", rates["reference_cached"], rates["cached"], **more)
    rate = limits.product_rate(settings.device, dtype)
    note = f"of {rate / TERA:.3g} TFLOP/s"
    for path in flop:
        share = flop[path] / medians[path]["total"] / rate
        label = f"{name} {path}, of the rate of matrix products"
        report.add(label, "share", None, share, note=note, **more)
    report.add(f"{name} rows: gradients, moments, masks", "MiB", rows_reference / MEBIBYTE, rows_ours / MEBIBYTE)
    report.add(f"{name} peak memory that --plan tells, live", "MiB", None, planned / MEBIBYTE)
    labels = {"live": "live", "cached": "feature cache"}
    peaks = {"peak": "peak memory"}
    if settings.device.type == "cpu":  # torch counts nothing of the libraries on a GPU
        peaks["beyond_imports"] = "peak beyond the libraries"
    for path in flop:
        for key, what in peaks.items():
            theirs, held = (printed[one][key] / MEBIBYTE for one in ("reference", path))
            report.add(f"{name} {what}, {labels[path]}", "MiB", theirs, held)


def measure_alone(settings: Settings, path: str) -> dict[str, float]:
    """Take the steps of one path that it is told to, and return the peak memory of the process."""
    name, which = path.split(":")
    imports = peak_bytes(settings.device)
    paths = _Paths(settings, CASES[name], only=which)
    forget_peak(settings.device)  # of building the model, and of encoding what a feature folder holds
    step = getattr(paths, which)
    for _ in range(WARM_UP):
        step()
    serve(step)
    peak = peak_bytes(settings.device)
    return {"peak": peak, "beyond_imports": peak - imports}


class _Paths:
    """The reference's and our training step over the same model and batch."""

    def __init__(self, settings: Settings, case: Case, only: str | None = None) -> None:
        self.settings = settings
        self.case = case
        self.world = worlds.open_world(settings.preset, case.stage, settings.device, settings.seed)
        self.model = self.world.model
        # The adapter's dropout would draw different masks in the two paths.
        self.model.eval()
        self.training = TrainingConfig(warmup_steps=0)
        self.batch = case.batch(self.world, settings.seed)
        if only is None or only.endswith("cached"):
            self.features = worlds.with_features(self.world, self.batch)
        self.draws = self.model.draw(self.batch, seed=settings.seed, epoch=0, training=True)
        self.optimizer = build_optimizer(self.model, self.training)
        if only is None or only.startswith("reference"):
            self.published = reference.ReferenceModel(self.model, take=only is not None)
            factor = self.training.mapper_learning_rate_factor if case.stage is Stage.ALIGNMENT else 1.0
            self.published_optimizer = self.published.optimizer(self.training, factor)

    def check_equal(self) -> str:
        """Compare losses over a few optimizer steps, live and cached, and what these did to the trained rows."""
        theirs, ours = [], []
        tables = (
            (self.published.embedding, self.model.rows.embedding),
            (self.published.head, self.model.rows.head),
        )
        before = [rows.detach().clone() for _, rows in tables]
        for _ in range(EQUAL_STEPS):
            with torch.no_grad(), mixed_precision(self.settings.device):
                cached = float(self.model(self.features, self.draws).total)
                published_cached = float(self.published(self.features, self.draws))
            loss, _ = self._published_step(self.batch)
            live, _ = _step(self.model, self.batch, self.draws, self.optimizer, self.settings.device)
            theirs += [loss, published_cached]
            ours += [live, cached]
        kind = self.settings.device.type
        line = assert_close(f"losses of {EQUAL_STEPS} steps", theirs, ours, TOLERANCE[kind])
        for (whole, rows), start in zip(tables, before, strict=True):
            change = rows.detach() - start
            error = float((whole[-len(rows) :].detach() - rows.detach()).norm() / change.norm())
            if not error <= ROWS_TOLERANCE[kind]:
                raise AssertionError(f"the trained rows' changes differ by {error:.1%}")
        return f"{line}, and what they changed in the trained rows"

    def reference(self) -> Phases:
        return self._published_step(self.batch)[1]

    def reference_cached(self) -> Phases:
        return self._published_step(self.features)[1]

    def live(self) -> Phases:
        return _step(self.model, self.batch, self.draws, self.optimizer, self.settings.device)[1]

    def cached(self) -> Phases:
        return _step(self.model, self.features, self.draws, self.optimizer, self.settings.device)[1]

    def row_state(self) -> tuple[int, int]:
        """Return the bytes of gradients, moments and masks that the new rows cost, in the reference and here."""
        matrices = (self.published.embedding, self.published.head)
        masks = (self.published.embedding_mask, self.published.head_mask)
        theirs = _state_bytes(self.published_optimizer, matrices) + sum(mask.nbytes for mask in masks)
        return theirs, _state_bytes(self.optimizer, (self.model.rows.embedding, self.model.rows.head))

    def planned_bytes(self) -> float:
        """Return what ``--plan`` computes for our live step, without its reserve."""
        config = self.world.config
        config = replace(config, training=replace(config.training, batch_size=BATCH_SIZE))
        counted = build_counted(config)
        frozen = self.model.backbone.projection.weight.dtype
        weights = count_weights(counted, frozen)
        # With the beginning-of-sequence token; pictures are counted apart.
        positions = 1 + self.case.tokens - self.case.pictures
        first_label = int((self.batch.labels_BT[0] != IGNORE_INDEX).nonzero()[0])
        load = Workload(positions, self.case.tokens - first_label, input_pictures=self.case.pictures)
        return plan_training(config, weights, Replay(counted, frozen), load, devices=1).total

    def _published_step(self, batch: Batch) -> tuple[float, Phases]:
        return reference.training_step(
            self.published, batch, self.draws, self.published_optimizer, self.settings.device
        )


def _step(
    model: MiniGPT5, batch: Batch, draws: Draws, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[float, Phases]:
    clock = PhaseClock(device)
    with mixed_precision(device):
        loss = model(batch, draws).total
    clock.lap("forward")
    loss.backward()
    clock.lap("backward")
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("optimizer")
    return float(loss.detach()), clock.phases


def _state_bytes(optimizer: torch.optim.Optimizer, parameters: tuple[Tensor, ...]) -> int:
    """Return gradient and moments of parameters, in bytes."""
    moments = sum(
        value.nbytes
        for parameter in parameters
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor) and value.ndim
    )
    return moments + sum(parameter.nbytes for parameter in parameters)
