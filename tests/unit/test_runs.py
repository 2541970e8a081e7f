from pathlib import Path

import pytest

from minigpt4.errors import InputError
from minigpt5.callbacks import plain_name, publish_checkpoint
from minigpt5.config import PROJECT_ROOT, TrainingConfig, load_config
from minigpt5.hardware import Place, check_machines, check_processes_here, choose_hardware, process_place
from minigpt5.preflight import is_local
from minigpt5.runs import StepPlan, build_loggers, build_trainer, describe_batches, plan_steps, predict


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("stage1_cc3m_{epoch}-{step}", "stage1_cc3m"),
        ("model_{epoch}-{step}", "model"),
        ("run_{epoch:02d}_{val_loss:.2f}", "run"),
        ("best", "best"),
        ("{epoch}", "model"),
    ],
)
def test_plain_name(pattern, name):
    assert plain_name(pattern) == name


def test_published_checkpoint_keeps_what_was_there(tmp_path):
    best, target = tmp_path / "name_epoch=0.ckpt", tmp_path / "name.ckpt"
    target.write_text("downloaded")
    best.write_text("first")
    publish_checkpoint(best, target)
    best.write_text("second")
    publish_checkpoint(best, target)
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents == {
        "name_epoch=0.ckpt": "second",
        "name.ckpt": "second",
        "name-v1.ckpt": "downloaded",
        "name-v2.ckpt": "first",
    }


def test_a_folder_of_a_sharding_strategy_is_published_too(tmp_path):
    best, target = tmp_path / "name_epoch=0.ckpt", tmp_path / "name.ckpt"
    best.mkdir()
    (best / "shard").write_text("state")
    publish_checkpoint(best, target)
    publish_checkpoint(best, target)
    assert (target / "shard").read_text() == (tmp_path / "name-v1.ckpt" / "shard").read_text() == "state"


def test_publishing_a_checkpoint_under_its_own_name_changes_nothing(tmp_path):
    path = tmp_path / "name.ckpt"
    path.write_text("best")
    publish_checkpoint(path, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["best"]


def test_a_checkpoints_own_name_may_be_relative_or_lead_over_a_link(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "name.ckpt").write_text("best")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for target in (Path("weights/name.ckpt"), Path("link/name.ckpt")):
        publish_checkpoint(folder / "name.ckpt", target)
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("name.ckpt", "best")]


def test_nothing_is_moved_away_for_a_checkpoint_that_is_gone(tmp_path):
    (tmp_path / "name.ckpt").write_text("downloaded")
    with pytest.raises(FileNotFoundError):
        publish_checkpoint(tmp_path / "gone.ckpt", tmp_path / "name.ckpt")
    assert (tmp_path / "name.ckpt").read_text() == "downloaded"


@pytest.mark.parametrize(
    ("effective", "batch", "processes", "nodes", "expected"),
    [(48, 2, 1, 1, 24), (48, 2, 4, 1, 6), (48, 2, 4, 2, 3), (4, 8, 1, 1, 1), (50, 4, 3, 1, 4)],
)
def test_accumulation_reaches_the_effective_batch_size(effective, batch, processes, nodes, expected):
    training = TrainingConfig(effective_batch_size=effective, batch_size=batch, num_nodes=nodes)
    plan = plan_steps(training, 1000, processes, is_cc3m=True)
    assert plan.accumulate == expected
    assert plan.effective_batch_size == expected * batch * processes * nodes


def test_another_effective_batch_than_the_wanted_one_is_told():
    training = TrainingConfig(effective_batch_size=48, batch_size=2)
    line = describe_batches(training, plan_steps(training, 1000, 7, is_cc3m=True))
    assert line.startswith("42 samples an optimizer step (3 batches of 2 on each device), not the 48")


@pytest.mark.parametrize("fraction", [None, 0.1, 1.0])
@pytest.mark.parametrize("accumulate", [1, 3, 24])
@pytest.mark.parametrize("batches", [1, 2, 7, 100, 1001])
def test_validations_fall_on_optimizer_steps(batches, accumulate, fraction):
    training = TrainingConfig(
        batch_size=2, effective_batch_size=2 * accumulate, val_check_interval=fraction, num_epochs=3
    )
    plan = plan_steps(training, 2 * batches - 1, 1, is_cc3m=False)
    assert 1 <= plan.validate_every <= batches
    assert plan.validate_every % accumulate == 0 or plan.validate_every == batches
    assert abs(plan.validate_every - batches * (fraction or 0.5)) <= accumulate
    assert plan.total_steps == 3 * -(-batches // accumulate)


def test_step_limit_and_published_validation_intervals():
    training = TrainingConfig(batch_size=1, effective_batch_size=1, max_steps=30)
    assert plan_steps(training, 100, 1, is_cc3m=True) == StepPlan(1, 25, 30, 1)
    assert plan_steps(training, 100, 1, is_cc3m=False) == StepPlan(1, 50, 30, 1)


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("Vision-CAIR/vicuna-7b", False),
        ("https://host/eva_vit_g.pth", False),
        ("../weights/eva_vit_g.pth", True),
        ("/models/vicuna", True),
        ("weights/eva_vit_g.pth", True),
        ("./vicuna/7b", True),
    ],
)
def test_local_weight_sources(source, local):
    assert is_local(source) is local


def test_unknown_gpu_or_cpu_with_a_notice(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hardware = choose_hardware(TrainingConfig(devices=(0,)))
    assert (hardware.gpus, hardware.precision, hardware.device(0).type) == ((), "32-true", "cpu")
    assert capsys.readouterr().err.count("\n") == 1

    assert choose_hardware(TrainingConfig(precision="16-mixed")).precision == "32-true"
    assert "--precision 16-mixed needs one and 32-true is used" in capsys.readouterr().err
    assert choose_hardware(TrainingConfig(precision="bf16-mixed")).precision == "bf16-mixed"
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_hardware(TrainingConfig()).gpus == (0, 1)
    assert choose_hardware(TrainingConfig(devices=(1,))).precision == "bf16-mixed"
    with pytest.raises(InputError, match="--gpus: no GPU 2, 5"):
        choose_hardware(TrainingConfig(devices=(0, 2, 5)))


def test_logger_of_an_absent_package_is_an_input_error(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(InputError, match="--loggers wandb: .*pip install wandb"):
        build_loggers(["csv", "wandb"], tmp_path, "run")


SLURM = {
    "STEP_NUM_TASKS": "8",
    "NTASKS": "8",
    "PROCID": "5",
    "LOCALID": "1",
    "NTASKS_PER_NODE": "4",
    "JOB_NAME": "train",
}


def test_processes_of_torchrun_and_slurm_know_their_place(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process_place() == Place(0, 0, 1)
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert process_place() == Place(local_rank=1, rank=5, world=8)
    assert choose_hardware(TrainingConfig()).cpu_processes == 4
    # torchrun within a SLURM allocation starts the processes, and counts them
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert process_place() == Place(1, 1, 2)
    # a shell within an allocation is no task of it
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert process_place() == Place(0, 0, 1)


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_job_script_that_starts_one_of_several_tasks_itself_is_refused(no_launcher, monkeypatch):
    """It would answer its share of the test samples alone, and wait for ever to train."""
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    check_processes_here(choose_hardware(TrainingConfig()))
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    with pytest.raises(InputError, match="the job has 8 tasks, .* put srun before the command"):
        check_processes_here(choose_hardware(TrainingConfig()))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    check_processes_here(choose_hardware(TrainingConfig()))


def test_what_lightning_refuses_of_slurm_is_an_input_error(no_launcher, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(InputError, match="SLURM: You set .*--ntasks"):
        process_place()


def test_gpus_that_no_process_was_started_for_are_told(no_launcher, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    one = {"NTASKS": "1", "STEP_NUM_TASKS": "1", "PROCID": "0", "LOCALID": "0", "NTASKS_PER_NODE": "1"}
    for name, value in (SLURM | one).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert choose_hardware(TrainingConfig()).gpus == (0,)
    assert (
        "of this machine's 8 GPUs, as many are used as processes were started on it: 1" in capsys.readouterr().err
    )
    assert choose_hardware(TrainingConfig(devices=(0,))).gpus == (0,)
    assert not capsys.readouterr().err


def test_several_machines_started_by_hand_must_know_each_other(no_launcher, monkeypatch):
    training = TrainingConfig(num_nodes=2)
    with pytest.raises(InputError, match="--num_nodes 2: nothing says where the other machines are"):
        check_machines(choose_hardware(training), training)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_machines(choose_hardware(training), training)


def test_what_lightning_leaves_behind_is_no_place_among_processes(monkeypatch):
    """Its launcher sets WORLD_SIZE in the parent, and LOCAL_RANK in the processes that it starts."""
    for name in ("RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert process_place() == Place(local_rank=2, rank=0, world=1)


@pytest.mark.parametrize(
    ("processes", "visible", "devices", "nodes", "problem"),
    [
        (2, 8, None, 1, None),  # as many GPUs as processes are taken
        (2, 2, (0, 1), 1, None),
        (2, 0, None, 1, None),
        (2, 1, None, 1, "2 processes were started on this machine, but the run uses 1 of its GPUs"),
        (2, 8, (0, 1, 2), 1, "2 processes were started on this machine, but the run uses 3 of its GPUs"),
        (2, 2, None, 2, "--num_nodes 2: 2 processes were started, 2 on each machine"),
    ],
)
def test_processes_that_were_started_must_be_the_runs_devices(
    processes, visible, devices, nodes, problem, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    started = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": processes}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    training = TrainingConfig(devices=devices, num_nodes=nodes)
    hardware = choose_hardware(training)
    if problem is None:
        check_processes_here(hardware)
        check_machines(hardware, training)
        assert hardware.device_count == processes
    else:
        with pytest.raises(InputError, match=problem):
            check_processes_here(hardware)
            check_machines(hardware, training)


def test_processes_that_predict_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    for name, value in {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    flags = {"data.folder": "datasets/CC3M", "data.test": "cc3m_val.tsv", "test_weight": "stage1_cc3m.ckpt"}
    config = load_config(PROJECT_ROOT / "config" / "tiny.yaml", {**flags, "training.devices": [0]}, {})
    monkeypatch.chdir(PROJECT_ROOT)
    with pytest.raises(InputError, match="8 processes were started on this machine, but the run uses 1 of"):
        predict(config)


def test_a_job_of_slurm_goes_on_only_when_asked_to(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (SLURM | {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NTASKS_PER_NODE": "1"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    # what Lightning writes when a job is about to be requeued
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    config = load_config(
        PROJECT_ROOT / "config" / "tiny.yaml", {"paths.checkpoints": tmp_path, "training.loggers": []}, {}
    )
    trainer = build_trainer(config, choose_hardware(config.training), StepPlan(1, 1, 1, 1), [])
    assert trainer._accelerator_connector.cluster_environment.auto_requeue is False
    assert trainer._checkpoint_connector._hpc_resume_path is None


def test_cards_without_bfloat16_train_in_float16(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for supported, precision in ((True, "bf16-mixed"), (False, "16-mixed")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, found=supported: found)
        assert choose_hardware(TrainingConfig()).precision == precision
