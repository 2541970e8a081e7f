"""The whole job at tiny size on a CPU: data, both training stages, replies, scores, one page to look at.

It runs the commands a user would type, and shows each before it runs: ``python examples/demo.py``. Where two do
not need each other they run at once, and what they print is kept in ``logs/``.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event

ROOT = Path(__file__).resolve().parent.parent
MARK = ".minigpt5-demo"
CAPTIONS, OTHERS, VALIDATION = 6000, 800, 64
"""Training records of stage 1 and of each data set of stage 2; held-out records of each."""
STAGE1_EPOCHS, STORY_STEPS, DIALOGUE_EPOCHS = 5, 600, 2
OF_OTHER_RUNS = ("OUTPUT_SUFFIX", "PREPROCESS_FEATURE_FOLDER")
"""Variables that, set by the user for other runs, would lead these elsewhere."""
AT_ONCE = 2
"""Jobs beside each other, once stage 1 is trained."""
REPLIES_AT_ONCE = 16
"""The same replies as at the preset's 4, in two thirds of the time on one thread."""
MOST_THREADS = 4
"""Of a job, however many cores there are: models so small hardly have work for more, and two were measured."""
INTERRUPTED = 130
"""Exit code."""
SPINS = 10_000
"""Of a waiting thread, before it lets others have its core. Two threads on two cores took 7.9 steps/s so, 8.4 with
the default; beside two other programs 1.9 and 0.7.
"""


@dataclass(frozen=True)
class Job:
    """One checkpoint: what it is trained on and how it is tested."""

    name: str
    folder: str
    train_file: str
    validation_file: str
    test_file: str
    train_flags: tuple[str, ...] = ()
    test_flags: tuple[str, ...] = ()

    @property
    def is_stage2(self) -> bool:
        """Whether it goes on from stage 1's checkpoint."""
        return self.name.startswith("stage2")

    def variables(self, out: Path, config: str) -> dict[str, str]:
        """Return the published environment variables."""
        return {
            "IS_STAGE2": str(self.is_stage2),
            "DATAFOLDER": str(out / "datasets" / self.folder),
            "MINIGPT5_CONFIG": config,
            "WEIGHTFOLDER": str(out / "weights"),
            "OUTPUT_FOLDER": str(out / "outputs"),
            "CC3M_FOLDER": str(out / "datasets" / "CC3M"),
        }

    def train(self, out: Path, config: str, alone: bool = False) -> None:
        """Train on the job's data; ``alone``, with all cores and what it prints shown."""
        files = ["--train_data_path", self.train_file, "--val_data_path", self.validation_file]
        names = ["--model_save_name", self.name + "_{epoch}-{step}", *self._stage1()]
        flags = ["train_eval.py", "--is_training", "True", *files, *names, "--gpus", "0", *self.train_flags]
        self._run(flags, out, config, alone)

    def test(self, out: Path, config: str, alone: bool = False) -> None:
        """Reply to the job's held-out records and score the replies; ``alone`` as in :meth:`train`."""
        weights = ["--test_weight", f"{self.name}.ckpt", *self._stage1()]
        at_once = ["--batch_size", str(REPLIES_AT_ONCE)]
        flags = ["--test_data_path", self.test_file, *weights, "--gpus", "0", *at_once, *self.test_flags]
        self._run(["train_eval.py", *flags], out, config, alone)
        self._run(["metric.py", "--test_weight", f"{self.name}.ckpt"], out, config, alone)

    def _run(self, arguments: list[str], out: Path, config: str, alone: bool) -> None:
        variables = self.variables(out, config) | core_share(1 if alone else AT_ONCE)
        run(arguments, variables, None if alone else out / "logs" / f"{self.name}.txt")

    def _stage1(self) -> list[str]:
        return ["--stage1_weight", f"{JOBS[0].name}.ckpt"] if self.is_stage2 else []


ONCE_AN_EPOCH = ("--set", "training.val_check_interval=1.0")
STAGE1 = ("--num_train_epochs", str(STAGE1_EPOCHS), *ONCE_AN_EPOCH)
SLOWLY = ("--learning_rate", "3e-4", "--set", "loss.text_weight=0.1")
"""The diffusion loss, which alone trains stage 2's mapper, would soon spoil what captions taught it.
At so low a rate the language loss wants ten times its weight.
"""
STORIES = ("--max_steps", str(STORY_STEPS), *SLOWLY, *ONCE_AN_EPOCH)
"""Less than an epoch."""
DIALOGUES = ("--num_train_epochs", str(DIALOGUE_EPOCHS), *SLOWLY, *ONCE_AN_EPOCH)
STORY_TASKS = ("--set", "data.tasks=[generation, multimodal, understanding]")
JOBS = (
    Job("stage1_cc3m", "CC3M", "cc3m_train.tsv", "cc3m_val.tsv", "cc3m_val.tsv", STAGE1),
    Job("stage2_vist", "VIST", "train_cleaned.json", "val_cleaned.json", "val_cleaned.json", STORIES, STORY_TASKS),
    Job(
        "stage2_mmdialog",
        "MMDialog",
        "train/train_conversations.txt",
        "validation/validation_conversations.txt",
        "test/test_conversations.txt",
        DIALOGUES,
    ),
)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_share(jobs: int) -> dict[str, str]:
    """Return the variables by which each of ``jobs`` jobs takes its share of the cores, unless they are set.

    With more threads than cores they would wait for one another most of the time. A thread that waits spins for a
    moment only: on cores that other programs use too, spinning keeps from its work the very thread waited for.
    """
    share = max(1, min(MOST_THREADS, cores() // jobs))
    variables = {"OMP_NUM_THREADS": str(share), "GOMP_SPINCOUNT": str(SPINS)}
    return {name: value for name, value in variables.items() if not os.environ.get(name)}


def run(arguments: list[str], variables: dict[str, str], log: Path | None = None) -> None:
    """Show and run one command below the project's root; with ``log`` what it prints is added to that file.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    shown = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    print(f"\n$ {shown} python {shlex.join(arguments)}" + (f"  # prints to {log}" if log else ""), flush=True)
    command = [sys.executable, *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in OF_OTHER_RUNS} | variables
    if log is None:
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=file, stderr=subprocess.STDOUT)


def run_jobs(out: Path, config: str) -> None:
    """Train stage 1, then everything else, :data:`AT_ONCE` jobs at once, which share the processor's cores.

    The replies to stories take longest and come last, alone. Once a job has failed no other command begins.

    Raises:
        subprocess.CalledProcessError: a job failed.
    """
    alignment, stories, dialogues = JOBS
    alignment.train(out, config, alone=True)

    stopped = Event()

    def finish(*steps: Callable[[Path, str], None]) -> None:
        try:
            for step in steps:
                if not stopped.is_set():
                    step(out, config)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        together = ((stories.train,), (dialogues.train, dialogues.test), (alignment.test,))
        waiting = [pool.submit(finish, *steps) for steps in together]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException as error:
            stopped.set()
            print(f"\n{shown_failure(error)}; what runs beside it ends first", file=sys.stderr, flush=True)
            raise
    stories.test(out, config, alone=True)


def shown_failure(error: BaseException) -> str:
    """Return one line on why the demo stops."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"error: {shlex.join(error.cmd[1:])}: ended with {error.returncode}"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"


def fresh_folder(folder: Path) -> None:
    """Make an empty folder; only an earlier demo's is replaced."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --out {folder}: cannot be made a folder ({error.strerror}); name another")
    if any(folder.iterdir()):
        if not (folder / MARK).exists():
            sys.exit(f"error: --out {folder}: holds other files; name a new folder")
        shutil.rmtree(folder)
        folder.mkdir()
    (folder / MARK).touch()


def find_config(name: str) -> str:
    """Return a file's path for commands below the project's root: of the current folder's, else the root's."""
    path = (Path(name) if Path(name).is_file() else ROOT / name).resolve()
    if not path.is_file():
        sys.exit(f"error: --config {name}: no such file (looked in {Path.cwd()} and {ROOT})")
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it writes")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="training records of stage 1")
    parser.add_argument("--train", type=int, default=OTHERS, help="training records of each stage-2 data set")
    parser.add_argument("--val", type=int, default=VALIDATION, help="held-out records a data set")
    parser.add_argument("--config", default="config/tiny.yaml", help="configuration of every command")
    options = parser.parse_args()
    started = time.monotonic()
    config, folder = find_config(options.config), options.out.resolve()
    fresh_folder(folder)
    data = ["-m", "minigpt5.tinyworld", "data", "--out", str(folder / "datasets"), "--seed", "0"]
    held_out = ["--val", str(options.val), "--test", str(options.val)]
    run([*data, "--datasets", "cc3m", "--train", str(options.captions), *held_out], {})
    run([*data, "--datasets", "vist", "mmdialog", "--train", str(options.train), *held_out], {})
    run_jobs(folder, config)
    stores = [str(folder / "outputs" / job.name) for job in JOBS]
    run(["-m", "minigpt5.tinyworld", "score", *stores, "--page", str(folder / "report.html")], {})
    print(f"\nall in {(time.monotonic() - started) / 60:.1f} minutes; report: {folder / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{shown_failure(error)}; what it printed is above or in logs/")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
