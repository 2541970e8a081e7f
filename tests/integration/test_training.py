"""Training as a whole: what is saved, what is logged, and that an interrupted run continues exactly."""

import csv
import json
from functools import partialmethod

import pytest
import torch
from pytorch_lightning import Callback
from torch._dynamo.utils import counters

from minigpt4.errors import InputError
from minigpt5.checkpoint import FORMAT_KEY, trainable_state
from minigpt5.config import Stage
from minigpt5.hardware import choose_hardware
from minigpt5.model import MiniGPT5
from minigpt5.runs import load_model, train


class Killed(Exception):
    pass


class KillBefore(Callback):
    """Stand-in for a kill: nothing of Lightning's orderly shutdown runs."""

    def __init__(self, batch: int) -> None:
        self.batch, self.seen = batch, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen == self.batch:
            raise Killed
        self.seen += 1


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def stage1_checkpoint(quick_config, tmp_path):
    return train(quick_config(training__num_epochs=1, paths__checkpoints=tmp_path / "stage1"))


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_weights(quick_config, tmp_path):
    straight = train(quick_config(paths__checkpoints=tmp_path / "straight"))
    # Four steps an epoch: within the first epoch, between the two, and within the second.
    for killed_before in (2, 4, 6):
        interrupted = tmp_path / f"killed_before_{killed_before}"
        with pytest.raises(Killed):
            train(quick_config(paths__checkpoints=interrupted), [KillBefore(killed_before)])
        last = interrupted / "model-last.ckpt"
        assert torch.load(last, weights_only=True)["global_step"] == killed_before
        resumed = train(quick_config(paths__checkpoints=interrupted, resume=last))
        assert_equal_weights(weights_of(straight.with_name("model-last.ckpt")), weights_of(last))
        assert_equal_weights(weights_of(straight), weights_of(resumed))


@pytest.mark.slow
def test_what_cannot_be_gone_on_with_exactly_is_refused(quick_config, tmp_path):
    with pytest.raises(Killed):
        train(quick_config(paths__checkpoints=tmp_path), [KillBefore(2)])
    last = tmp_path / "model-last.ckpt"
    changes = {
        "training__batch_size": (1, r"--resume: .* another order: batch size 2 \(now 1\)"),
        "model__vokens__count": (4, r"--resume: made with other settings of the model: .* \(now "),
    }
    for key, (value, problem) in changes.items():
        with pytest.raises(InputError, match=problem):
            train(quick_config(paths__checkpoints=tmp_path, resume=last, **{key: value}))


@pytest.mark.slow
def test_resume_of_stage_2_repeats_adapter_dropout_and_accumulation(quick_config, tmp_path, stage1_checkpoint):
    settings = {
        "stage": "multimodal",
        "stage1_weight": stage1_checkpoint,
        "training__effective_batch_size": 4,
        "training__num_epochs": 1,
        "model__adapter__dropout": 0.5,
    }
    train(quick_config("VIST", **settings, paths__checkpoints=tmp_path / "straight"))
    interrupted = tmp_path / "interrupted"
    with pytest.raises(Killed):
        train(quick_config("VIST", **settings, paths__checkpoints=interrupted), [KillBefore(3)])
    last = interrupted / "model-last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1
    other = torch.load(stage1_checkpoint, weights_only=True)
    other["state_dict"]["mapper.queries"] *= 1.01
    torch.save(other, tmp_path / "other.ckpt")
    changed = settings | {"stage1_weight": tmp_path / "other.ckpt"}
    with pytest.raises(InputError, match=f"--resume {last}: was trained on top of other stage-1 weights"):
        train(quick_config("VIST", **changed, paths__checkpoints=interrupted, resume=last))
    train(quick_config("VIST", **settings, paths__checkpoints=interrupted, resume=last))
    assert_equal_weights(weights_of(tmp_path / "straight" / "model-last.ckpt"), weights_of(last))


@pytest.mark.slow
def test_compiled_training_gives_the_same_weights(quick_config, tmp_path, monkeypatch):
    """The captured graphs run as they are: generating code for a whole UNet takes minutes on a CPU."""
    settings = {"training__num_epochs": 1, "training__max_steps": 2, "data__tasks": ["caption"]}
    plain = train(quick_config(**settings, paths__checkpoints=tmp_path / "plain"))
    compile_parts = partialmethod(MiniGPT5.compile_parts, backend="eager")
    monkeypatch.setattr(MiniGPT5, "compile_parts", compile_parts)
    torch._dynamo.reset()
    counters.clear()
    compiled = train(quick_config(**settings, training__compile=True, paths__checkpoints=tmp_path / "compiled"))
    assert counters["stats"]["unique_graphs"] > 0
    assert_equal_weights(weights_of(compiled), weights_of(plain))


@pytest.mark.slow
def test_what_a_training_leaves_behind(quick_config, tmp_path):
    name = "stage1_cc3m_{epoch}-{step}"
    config = quick_config(
        model_save_name=name, training__loggers=["csv", "tensorboard"], training__sample_every_steps=3,
        generation__images="force",
    )  # fmt: skip
    published = train(config)
    folder = tmp_path / "weights"
    assert published == folder / "stage1_cc3m.ckpt"
    assert len(list(folder.glob("stage1_cc3m_epoch=*-step=*.ckpt"))) == config.training.save_total_limit

    content = torch.load(published, weights_only=True)
    model = load_model(config, choose_hardware(config.training))
    assert content["state_dict"].keys() == trainable_state(model).keys()
    assert content[FORMAT_KEY]["stage"] == Stage.ALIGNMENT.value
    assert content["hyper_parameters"]["training"]["learning_rate"] == config.training.learning_rate

    logs = folder / "logs" / "stage1_cc3m"
    with (logs / "version_0" / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames)
    terms = ("loss", "text_loss", "image_loss", "caption_loss")
    assert {f"val_{term}" for term in terms} | {f"train_{term}_epoch" for term in terms} <= columns
    assert list((logs / "version_0").glob("events.out.tfevents.*"))

    samples = [json.loads(line) for line in (logs / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [3, 6, 8]  # the last is the finished model's
    assert all((logs / "samples" / name).is_file() for sample in samples for name in sample["images"])
    assert all(sample["images"] for sample in samples)


@pytest.mark.slow
def test_validation_loss_depends_on_the_weights_alone(quick_config, tmp_path):
    losses = []

    class Record(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                losses.append(trainer.callback_metrics["val_loss"].item())

    train(quick_config(training__learning_rate=1e-12), [Record()])
    assert len(losses) > 2
    assert max(losses) - min(losses) < 1e-5


@pytest.mark.slow
def test_frozen_weights_stay_bit_identical(quick_config):
    before = load_model(quick_config(), choose_hardware(quick_config().training)).state_dict()
    after = {}

    class Grab(Callback):
        def on_train_end(self, trainer, pl_module):
            after.update({name: value.clone() for name, value in pl_module.model.state_dict().items()})

    train(quick_config(), [Grab()])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.startswith(("rows.", "mapper.")) for name in changed)


@pytest.mark.slow
def test_recomputed_activations_change_nothing_but_the_work(quick_config, tmp_path, stage1_checkpoint):
    """The adapter's dropout is repeated too: the second pass has to see the first one's masks."""
    settings = {
        "stage": "multimodal",
        "stage1_weight": stage1_checkpoint,
        "training__max_steps": 3,
        "model__adapter__dropout": 0.5,
    }
    calls = []

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            layer = pl_module.model.backbone.language_model.model.layers[0].mlp
            layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    train(quick_config("VIST", **settings, paths__checkpoints=tmp_path / "kept"), [Count()])
    kept = sum(calls)
    calls.clear()
    recomputing = quick_config(
        "VIST", **settings, paths__checkpoints=tmp_path / "recomputed", training__gradient_checkpointing=True
    )
    train(recomputing, [Count()])
    assert kept == 3
    assert sum(calls) == 6
    last = "model-last.ckpt"
    assert_equal_weights(weights_of(tmp_path / "kept" / last), weights_of(tmp_path / "recomputed" / last))


@pytest.mark.slow
def test_gradients_are_clipped_in_mixed_precision(quick_config, tmp_path):
    settings = {"training__precision": "bf16-mixed", "training__max_steps": 2}
    norms = []

    class Norm(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            held = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if held:
                norms.append(torch.nn.utils.get_total_norm(held).item())

    train(quick_config(**settings, training__max_grad_norm=0.01), [Norm()])
    assert norms and max(norms) <= 0.0101


@pytest.mark.gpu
@pytest.mark.parametrize("clipped", [None, 0.01])
def test_training_runs_and_resumes_on_a_gpu(quick_config, tmp_path, clipped):
    """With pictures drawn in between, gradients clipped or not."""
    settings = {"training__max_grad_norm": clipped, "training__sample_every_steps": 2, "training__max_steps": 4}
    train(quick_config(**settings, paths__checkpoints=tmp_path))
    resumed = {**settings, "training__max_steps": 6, "resume": tmp_path / "model-last.ckpt"}
    train(quick_config(**resumed, paths__checkpoints=tmp_path))
    assert torch.load(tmp_path / "model-last.ckpt", weights_only=True)["global_step"] == 6
