"""Training in two processes on the CPU: it comes to its end, and gives what one process gives."""

import subprocess
import sys

import pytest
import torch
import yaml

from minigpt5.config import PROJECT_ROOT
from tests.integration.conftest import QUICK, TINY

STAGE1 = PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights" / "checkpoints" / "stage1_cc3m.ckpt"


def train(folder, data, processes, **sections):
    """Train in this many processes and return the checkpoint of the last step."""
    values = {"base": str(TINY), "is_training": True, "paths": {"weights": str(folder)}}
    for key, value in {**QUICK, "training.num_epochs": 1, "data.folder": str(data), **sections}.items():
        *parents, name = key.replace("__", ".").split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    folder.mkdir(parents=True)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    command += [str(PROJECT_ROOT / "train_eval.py"), "--config", str(config)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return torch.load(folder / "model-last.ckpt", weights_only=True)


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path, tiny_data, clean_environment):
    settings = {
        "data__train": "cc3m_train.tsv",
        "data__validation": "cc3m_val.tsv",
        # With the usual epsilon, AdamW makes whole steps of gradients that are nothing but rounding.
        "training__adam_epsilon": 1e-3,
    }
    data = tiny_data / "CC3M"
    two = train(tmp_path / "two", data, 2, training__batch_size=1, **settings)
    one = train(tmp_path / "one", data, 1, training__batch_size=2, **settings)
    assert two["global_step"] == one["global_step"] == 4
    assert two["state_dict"].keys() == one["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_processes_stay_in_step_where_only_some_batches_hold_a_picture(tmp_path, tiny_data, clean_environment):
    settings = {
        "stage": "multimodal",
        "stage1_weight": str(STAGE1),
        "data__train": "train_cleaned.json",
        "data__validation": "val_cleaned.json",
        "data__tasks": ["understanding", "multimodal"],
        "data__bucket_by_length": True,
    }
    last = train(tmp_path / "two", tiny_data / "VIST", 2, training__batch_size=1, **settings)
    assert last["global_step"] == 4
