"""The whole job at tiny size on a CPU: data, both training stages, generation, scores, report.

It runs the commands a user would type, and shows each before it runs: ``python examples/demo.py``.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = ".minigpt5-demo"


def run(arguments: list[str], variables: dict[str, str]) -> None:
    """Show and run one command below the project's root; stop the demo if it fails."""
    shown = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    print("\n$", *shown, "python", shlex.join(arguments), flush=True)
    finished = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | variables)
    if finished.returncode != 0:
        sys.exit(finished.returncode)


def fresh_folder(folder: Path) -> None:
    """Make an empty folder; only an earlier demo's is replaced."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            sys.exit(f"error: --out {folder}: holds other files; name a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it writes")
    parser.add_argument("--train", type=int, default=96, help="training records a data set")
    parser.add_argument("--val", type=int, default=8, help="held-out records a data set")
    parser.add_argument("--config", default="config/tiny.yaml", help="configuration of every command")
    options = parser.parse_args()
    folder = options.out.resolve()
    fresh_folder(folder)
    data, weights, outputs = folder / "datasets", folder / "weights", folder / "outputs"
    shared = {"MINIGPT5_CONFIG": options.config, "WEIGHTFOLDER": str(weights), "OUTPUT_FOLDER": str(outputs)}
    stage1 = {"IS_STAGE2": "False", "DATAFOLDER": str(data / "CC3M"), **shared}
    stage2 = {"IS_STAGE2": "True", "DATAFOLDER": str(data / "VIST"), **shared}

    sizes = ["--train", str(options.train), "--val", str(options.val), "--seed", "0"]
    run(["-m", "minigpt5.tinyworld", "data", "--out", str(data), *sizes], {})
    training = ["train_eval.py", "--is_training", "True", "--gpus", "0"]
    files = ["--train_data_path", "cc3m_train.tsv", "--val_data_path", "cc3m_val.tsv"]
    run([*training, *files, "--model_save_name", "stage1_cc3m_{epoch}-{step}"], stage1)
    files = ["--train_data_path", "train_cleaned.json", "--val_data_path", "val_cleaned.json"]
    names = ["--model_save_name", "stage2_vist_{epoch}-{step}", "--stage1_weight", "stage1_cc3m.ckpt"]
    run([*training, *files, *names], stage2)
    weight_flags = ["--test_weight", "stage2_vist.ckpt", "--stage1_weight", "stage1_cc3m.ckpt"]
    run(["train_eval.py", "--test_data_path", "val_cleaned.json", *weight_flags, "--gpus", "0"], stage2)
    run(["metric.py", "--test_weight", "stage2_vist.ckpt"], stage2)
    print(f"\nreport: {outputs / 'stage2_vist' / 'report.html'}")


if __name__ == "__main__":
    main()
