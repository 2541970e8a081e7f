import json
from pathlib import Path

import pytest
import yaml

from minigpt5.config import PROJECT_ROOT, RunConfig, Stage, load_config
from minigpt5.tinyworld import foundations

CONFIG = PROJECT_ROOT / "config"
TINY = CONFIG / "tiny.yaml"
PAPER = CONFIG / "minigpt5_7b.yaml"


def keys(values, prefix=""):
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def fields_of(value, prefix=""):
    for name in getattr(value, "__dataclass_fields__", {}):
        yield f"{prefix}{name}"
        yield from fields_of(getattr(value, name), f"{prefix}{name}.")


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_is_valid(path):
    assert isinstance(load_config(path, {}, {}), RunConfig)


def test_the_two_whole_presets_have_the_same_keys():
    assert list(keys(read(TINY))) == list(keys(read(PAPER)))


@pytest.mark.parametrize("path", [TINY, PAPER], ids=["tiny", "paper"])
def test_whole_presets_write_every_setting_out(path):
    run_only = {"is_training", "model_save_name", "stage1_weight", "test_weight", "resume"}
    assert set(fields_of(RunConfig())) - run_only <= set(keys(read(path)))


def test_the_papers_preset_has_the_papers_values():
    written, defaults = load_config(PAPER, {}, {}), RunConfig()
    assert written.loss == defaults.loss
    assert written.training == defaults.training
    assert written.generation == defaults.generation
    assert written.metrics == defaults.metrics
    assert written.model.mapper == defaults.model.mapper
    assert written.model.adapter == defaults.model.adapter
    assert written.model.vokens == defaults.model.vokens


@pytest.mark.parametrize(
    ("name", "stage", "dataset"),
    [
        ("stage1_cc3m", Stage.ALIGNMENT, "cc3m"),
        ("stage2_vist", Stage.MULTIMODAL, "vist"),
        ("stage2_mmdialog", Stage.MULTIMODAL, "mmdialog"),
    ],
)
def test_stage_presets_build_on_the_papers_model(name, stage, dataset):
    config = load_config(CONFIG / f"{name}.yaml", {}, {})
    assert config.stage is stage
    assert config.data.dataset == dataset
    assert config.model == load_config(PAPER, {}, {}).model
    assert (config.data.folder / config.data.test).is_file()


def test_tiny_sizes_are_those_of_the_models():
    model = load_config(TINY, {}, {}).model
    sizes = {key: value for key, value in vars(foundations.VISION).items() if key != "weights"}
    assert sizes.items() <= vars(model.backbone.vision).items()
    sizes = {key: value for key, value in vars(foundations.QFORMER).items() if key != "weights"}
    assert sizes.items() <= vars(model.backbone.qformer).items()
    language = model.backbone.language_model
    assert language.architecture == foundations.LANGUAGE | {"vocab_size": language.architecture["vocab_size"]}
    parts = {"unet": foundations.UNET, "vae": foundations.VAE, "scheduler": foundations.SCHEDULER}
    for part, expected in (parts | {"text_encoder": foundations.TEXT_ENCODER}).items():
        assert expected.items() <= model.diffusion.architecture[part].items()


def test_tiny_architectures_agree_with_the_committed_folders():
    model = load_config(TINY, {}, {}).model
    folders = {"llama": (Path(model.backbone.language_model.weights), model.backbone.language_model.architecture)}
    for part in ("unet", "vae", "text_encoder"):
        folders[part] = Path(model.diffusion.weights) / part, model.diffusion.architecture[part]
    for folder, architecture in folders.values():
        stored = json.loads((folder / "config.json").read_text())
        assert {key: stored[key] for key in architecture} == architecture
