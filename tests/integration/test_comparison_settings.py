"""The paper's comparisons as configuration values: whole runs, and what is refused before one."""

import json

import pytest

from minigpt4.errors import InputError
from minigpt5.preflight import check_run
from minigpt5.runs import predict, train


def test_recomputing_activations_is_refused_with_a_prefix(quick_config):
    settings = {"stage": "multimodal", "model__adapter__kind": "prefix", "model__mapper__stage2_trains": "whole"}
    check_run(quick_config("VIST", **settings, is_training=True))
    config = quick_config("VIST", **settings, is_training=True, training__gradient_checkpointing=True)
    with pytest.raises(
        InputError, match=r"training\.gradient_checkpointing: not with model\.adapter\.kind: prefix"
    ):
        check_run(config)


def test_stage_2_without_stage_1_says_what_makes_it_possible(quick_config):
    config = quick_config("VIST", stage="multimodal", is_training=True)
    with pytest.raises(InputError, match=r"--stage1_weight: .*--set model\.mapper\.stage2_trains=whole"):
        check_run(config)
    check_run(quick_config("VIST", stage="multimodal", is_training=True, model__mapper__stage2_trains="whole"))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["prefix", "none"])
def test_stage_2_alone_trains_resumes_and_predicts(quick_config, adapter):
    settings = {
        "stage": "multimodal",
        "model__mapper__kind": "mlp",
        "model__mapper__stage2_trains": "whole",
        "model__adapter__kind": adapter,
        "model__adapter__prefix_length": 2,
        "data__context": "last_text",
        "data__max_samples": 3,
    }
    train(quick_config("VIST", **settings, training__max_steps=2))
    last = quick_config().paths.weights / "model-last.ckpt"
    checkpoint = train(quick_config("VIST", **settings, training__max_steps=3, resume=last))
    folder = predict(quick_config("VIST", **settings, data__test="val_cleaned.json", test_weight=checkpoint))
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 3
    assert json.loads((folder / "run.json").read_text())["context"] == "last_text"
