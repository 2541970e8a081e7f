"""Two processes on the CPU, training and predicting: they come to an end, and give what one process gives."""

import csv
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from minigpt5.config import CONFIG_VARIABLE, ENVIRONMENT, PROJECT_ROOT, STAGE_VARIABLE
from minigpt5.predictions import read_predictions
from tests.integration.conftest import QUICK, TINY

LOSSES = re.compile(r"train_\w+_epoch|val_\w+")
STAGE1 = PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights" / "checkpoints" / "stage1_cc3m.ckpt"


def write_config(folder, data, **sections):
    """Write a run's configuration below ``folder`` and return its file."""
    values = {"base": str(TINY), "paths": {"weights": str(folder), "outputs": str(folder / "outputs")}}
    given = {**QUICK, "training.num_epochs": 1, "training.loggers": ["csv"], "data.folder": str(data), **sections}
    for key, value in given.items():
        *parents, name = key.replace("__", ".").split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    folder.mkdir(parents=True)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def run(config, processes):
    """Run a configuration in this many processes, started by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    command += [str(PROJECT_ROOT / "train_eval.py"), "--config", str(config)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]


def train(folder, data, processes, **sections):
    """Train in this many processes and return what came of it."""
    run(write_config(folder, data, is_training=True, **sections), processes)
    return read_run(folder)


def read_run(folder):
    """Return the checkpoint of the last step, and the losses of the epoch and of its last validation by name."""
    losses = {}
    with (folder / "logs" / "model" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            losses |= {name: float(row[name]) for name in row if LOSSES.fullmatch(name) and row[name]}
    return torch.load(folder / "model-last.ckpt", weights_only=True), losses


def assert_same_run(ours, expected):
    (last, losses), (other, others) = ours, expected
    assert last["global_step"] == other["global_step"] == 4
    assert last["state_dict"].keys() == other["state_dict"].keys()
    for name, value in other["state_dict"].items():
        torch.testing.assert_close(last["state_dict"][name], value, rtol=0, atol=1e-6, msg=name)
    assert {"train_loss_epoch", "train_text_loss_epoch", "val_loss", "val_text_loss"} <= losses.keys()
    assert losses == pytest.approx(others, rel=1e-6)


COMPARED = {
    # With the usual epsilon, AdamW makes whole steps of gradients that are nothing but rounding.
    "training__adam_epsilon": 1e-3,
}
CC3M = {
    "data__train": "cc3m_train.tsv",
    "data__validation": "cc3m_val.tsv",
    # As many as the processes can share evenly: otherwise the first ones come again, and count twice in the loss.
    "data__tasks": ["caption"],
    **COMPARED,
}
VIST = {
    "stage": "multimodal",
    "stage1_weight": str(STAGE1),
    "data__train": "train_cleaned.json",
    "data__validation": "val_cleaned.json",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_data):
    """One process's training."""
    with pytest.MonkeyPatch.context() as environment:
        for variable in (*ENVIRONMENT, CONFIG_VARIABLE, STAGE_VARIABLE):
            environment.delenv(variable, raising=False)
        return train(
            tmp_path_factory.mktemp("alone") / "run", tiny_data / "CC3M", 1, training__batch_size=2, **CC3M
        )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_two_processes_give_the_weights_and_losses_of_one(tmp_path, tiny_data, clean_environment, alone, strategy):
    settings = {"training__strategy": strategy, "training__batch_size": 1, **CC3M}
    assert_same_run(train(tmp_path / "two", tiny_data / "CC3M", 2, **settings), alone)


@pytest.mark.slow
def test_two_processes_give_those_of_one_in_stage_2_too(tmp_path, tiny_data, clean_environment):
    """Samples one by one: the mean of a batch's text loss depends on which texts share it, as does dropout."""
    settings = {"training__batch_size": 1, "training__eval_batch_size": 1, **VIST, **COMPARED}
    two, one = (train(tmp_path / str(number), tiny_data / "VIST", number, **settings) for number in (2, 1))
    assert_same_run(two, one)


@pytest.mark.slow
def test_two_machines_under_slurm_give_those_of_one(tmp_path, tiny_data, clean_environment, alone):
    """One task on each of two machines, both of them this one; no launcher but the variables that srun sets."""
    settings = {"training__num_nodes": 2, "training__batch_size": 1, **CC3M}
    folder = tmp_path / "two"
    config = write_config(folder, tiny_data / "CC3M", is_training=True, **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = []
    for rank in range(2):
        slurm = {"NTASKS": 2, "PROCID": rank, "NODEID": rank, "LOCALID": 0, "NTASKS_PER_NODE": 1, "JOB_ID": 1}
        slurm["STEP_NUM_TASKS"] = 2
        environment = {**os.environ, **{f"SLURM_{name}": str(value) for name, value in slurm.items()}}
        environment |= {"SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(PROJECT_ROOT / "train_eval.py"), "--config", str(config)]
        tasks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for task in tasks:
        _, errors = task.communicate(timeout=600)
        assert task.returncode == 0, errors[-3000:]
    assert_same_run(read_run(folder), alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_processes_stay_in_step_where_only_some_batches_hold_a_picture(
    tmp_path, tiny_data, clean_environment, strategy
):
    settings = {
        "training__strategy": strategy,
        "training__sample_every_steps": 2,
        "data__tasks": ["understanding", "multimodal"],
        "data__bucket_by_length": True,
        **VIST,
    }
    last, _ = train(tmp_path / "two", tiny_data / "VIST", 2, training__batch_size=1, **settings)
    assert last["global_step"] == 4


@pytest.mark.slow
def test_two_processes_predict_what_one_does(tmp_path, tiny_data, clean_environment):
    stores = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        settings = {
            "data__test": "cc3m_val.tsv",
            "test_weight": str(STAGE1),
            "generation__images": "force",
            "generation__batch_size": 1,  # in batches of another size, a pixel may be rounded the other way
        }
        run(write_config(folder, tiny_data / "CC3M", **settings), processes)
        stores.append(folder / "outputs" / STAGE1.stem)
    one, two = ({prediction.id: prediction for prediction in read_predictions(store)} for store in stores)
    assert one and one == two
    assert len(list(stores[1].glob("predictions*.jsonl"))) == 2
    pictures = {path.name: path.read_bytes() for path in (stores[0] / "images").iterdir()}
    assert pictures == {path.name: path.read_bytes() for path in (stores[1] / "images").iterdir()}
