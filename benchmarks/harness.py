"""What every suite shares: alternating timings, peak memory in a fresh process, the table and the JSON file."""

import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

MEBIBYTE = 2**20
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "diffusers", "peft", "pytorch-lightning", "open_clip_torch", "pandas")

Phases = dict[str, float]
"""Seconds by phase; ``total`` is always there."""


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    suite: str
    preset: str
    repeats: int
    seed: int
    device: torch.device
    threads: int


@dataclass(frozen=True)
class Row:
    """One line of the table: a quantity in the reference path and in ours."""

    name: str
    unit: str
    reference: float | None
    ours: float
    higher_is_better: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better ours is; above 1 is better."""
        if self.reference is None or not self.reference or not self.ours:
            return None
        return self.ours / self.reference if self.higher_is_better else self.reference / self.ours


@dataclass
class Report:
    """Everything one suite found."""

    settings: Settings
    rows: list[Row] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    """What was compared, and found equal, before anything was timed."""
    rounds: int = 0
    """Counted rounds behind each time; 0 takes what the command line asked for."""

    def __post_init__(self) -> None:
        self.rounds = self.rounds or self.settings.repeats

    def add(self, name: str, unit: str, reference: float | None, ours: float, **more: Any) -> None:
        """Append a row."""
        self.rows.append(Row(name, unit, reference, ours, **more))


class PhaseClock:
    """Seconds of consecutive phases; waits for the device at each boundary."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: Phases = {"total": 0.0}
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = self._now()
        self.phases[name] = self.phases.get(name, 0.0) + now - self._last
        self.phases["total"] += now - self._last
        self._last = now


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return what a training step runs under: ``bf16-mixed`` on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def timed(function: Callable[[], object], device: torch.device) -> Phases:
    """Return how long one call takes."""
    clock = PhaseClock(device)
    function()
    clock.lap("call")
    return clock.phases


def alternate(paths: Mapping[str, Callable[[], Phases]], repeats: int) -> dict[str, Phases]:
    """Run the paths in turn, so that whatever else the machine does meets all of them; return medians.

    One round before the counted ones warms caches and allocators.
    """
    found: dict[str, list[Phases]] = {name: [] for name in paths}
    for round_number in range(repeats + 1):
        for name, path in paths.items():
            phases = path()
            if round_number:
                found[name].append(phases)
    return {
        name: {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
        for name, runs in found.items()
    }


def in_child(settings: Settings, path: str) -> dict[str, float]:
    """Run one path of a suite alone in a fresh process and return the figures that it prints.

    A GPU's memory that this process holds and no longer needs is given back first: two models may not fit.
    """
    with Worker(settings, path) as worker:
        return worker.finish()


class Worker:
    """One path of a suite in a process of its own, which takes a step when it is told to (:func:`serve`)."""

    def __init__(self, settings: Settings, path: str) -> None:
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        run = Path(__file__).with_name("run.py")
        self._command = [sys.executable, str(run), "--suite", settings.suite, "--preset", settings.preset]
        self._command += ["--seed", str(settings.seed), "--device", str(settings.device)]
        self._command += ["--threads", str(settings.threads), "--alone", path]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed on exit
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def step(self) -> Phases:
        """Let it take a step and return the step's times.

        Raises:
            RuntimeError: the process has failed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # there will be no answer either
            print(file=self._process.stdin, flush=True)
        for answer in iter(self._process.stdout.readline, ""):
            if answer.startswith("{"):  # libraries may print, too
                return json.loads(answer)
        raise self._failure()

    def finish(self) -> dict[str, Any]:
        """Let it end and return the figures that it prints then.

        Raises:
            RuntimeError: the process has failed.
        """
        printed, _ = self._process.communicate()
        if self._process.returncode != 0:
            raise self._failure()
        return json.loads(printed.splitlines()[-1])

    def _failure(self) -> RuntimeError:
        self._process.wait()
        self._errors.seek(0)
        return RuntimeError(f"{' '.join(self._command)} failed:\n{self._errors.read()}")


def serve(step: Callable[[], Phases]) -> None:
    """Take a step for every line of the standard input and print its times; the other end of :class:`Worker`."""
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def alternate_alone(
    settings: Settings, paths: Mapping[str, str]
) -> tuple[dict[str, Phases], dict[str, dict[str, Any]]]:
    """Run the paths in turn as :func:`alternate` does, each in a process of its own.

    So each finds memory as its own steps left it, as in a run of its own: what one path gives back to the system,
    another would have to ask for again. A GPU may hold no more than one model, so there a path begins when the one
    before has ended.

    Args:
        settings: of the suite, whose ``measure_alone`` serves.
        paths: name → what ``measure_alone`` is told.

    Returns:
        Medians, and the figures that each process printed at its end.
    """
    groups = [[name] for name in paths] if settings.device.type == "cuda" else [list(paths)]
    medians: dict[str, Phases] = {}
    printed: dict[str, dict[str, Any]] = {}
    for group in groups:
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(settings, paths[name])) for name in group}
            medians |= alternate({name: worker.step for name, worker in workers.items()}, settings.repeats)
            printed |= {name: worker.finish() for name, worker in workers.items()}
    return medians, printed


def forget_peak(device: torch.device) -> None:
    """Let :func:`peak_bytes` count from here on; what is held now stays in it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: the GPU's, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage would give a child the peak of the process that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def describe_machine(settings: Settings) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else None
    return {
        "processor": processor,
        "threads": settings.threads,
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def print_table(report: Report) -> None:
    """Print a suite's rows."""
    settings = report.settings
    counted = f"median of {report.rounds}" if report.rounds > 1 else "one round"
    print(f"\n{settings.suite} · {settings.preset} · {counted} · {settings.device}")
    for compared in report.equal:
        print(f"  equal: {compared}")
    header = ("", "reference", "ours", "", "ratio", "")
    lines = [header, *(_cells(row) for row in report.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:5], widths[1:5], strict=True)]
        print("  " + "  ".join([*cells, line[5]]).rstrip())


def _cells(row: Row) -> tuple[str, ...]:
    reference = "–" if row.reference is None else f"{row.reference:.4g}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}×"
    return row.name, reference, f"{row.ours:.4g}", row.unit, ratio, row.note


def write_json(report: Report, folder: Path) -> Path:
    """Write a suite's result under its date; an earlier one of the same day is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = report.settings
    now = datetime.now(UTC)
    device = settings.device.type
    path = folder / f"{now:%Y-%m-%d}-{settings.suite}-{settings.preset}-{device}.json"
    content = {
        "time": now.isoformat(timespec="seconds"),
        "suite": settings.suite,
        "preset": settings.preset,
        "seed": settings.seed,
        "rounds": report.rounds,
        "machine": describe_machine(settings),
        "equal": report.equal,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in report.rows],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def assert_close(name: str, reference: Sequence[float], ours: Sequence[float], relative: float) -> str:
    """Return a line for the report, or fail: what is not equal is not worth timing."""
    differences = [abs(one - other) / max(abs(one), 1e-12) for one, other in zip(reference, ours, strict=True)]
    worst = next(filter(math.isnan, differences), max(differences))
    if not worst <= relative:  # nor is what is no number equal
        raise AssertionError(f"{name}: the paths differ by {worst:.2e}, more than {relative:.0e}")
    return f"{name} (largest relative difference {worst:.1e})"
