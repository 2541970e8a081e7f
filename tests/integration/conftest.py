import pytest

from minigpt5.config import CONFIG_VARIABLE, ENVIRONMENT, PROJECT_ROOT, STAGE_VARIABLE, load_config
from minigpt5.tinyworld.datasets import Sizes, write_datasets

TINY = PROJECT_ROOT / "config" / "tiny.yaml"

# Small enough for seconds, large enough for several optimizer steps and validations in an epoch.
QUICK = {
    "training.batch_size": 2,
    "training.eval_batch_size": 4,
    "training.effective_batch_size": 2,
    "training.num_epochs": 2,
    "training.warmup_steps": 2,
    "training.learning_rate": 1e-3,
    "training.sample_every_steps": 0,
    "training.loggers": [],
    "data.max_samples": 8,
    "generation.max_new_tokens": 12,
    "generation.num_inference_steps": 2,
    # a missing checkpoint stays missing
    "paths.bundled_checkpoints": None,
}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """CC3M, VIST and MMDialog files of the tiny world, one folder each."""
    folder = tmp_path_factory.mktemp("tiny_data")
    write_datasets(folder, Sizes(train=8, validation=4, test=4), seed=0)
    return folder


@pytest.fixture
def clean_environment(monkeypatch):
    """No variable of the caller's shell reaches the command lines."""
    for variable in (*ENVIRONMENT, CONFIG_VARIABLE, STAGE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.fixture
def quick_config(tiny_data, tmp_path):
    """Return a configuration of the tiny preset for a data set, writing below ``tmp_path``."""
    files = {
        "CC3M": ("cc3m_train.tsv", "cc3m_val.tsv"),
        "VIST": ("train_cleaned.json", "val_cleaned.json"),
    }

    def make(dataset="CC3M", **overrides):
        train, validation = files[dataset]
        values = {
            **QUICK,
            "data.folder": tiny_data / dataset,
            "data.train": train,
            "data.validation": validation,
            "paths.weights": tmp_path / "weights",
            "paths.outputs": tmp_path / "outputs",
            **{key.replace("__", "."): value for key, value in overrides.items()},
        }
        return load_config(TINY, values, {})

    return make
