"""A run's loaders, from configuration to batches."""

import pytest
import pytorch_lightning as pl
import torch
from data_helpers import make_cc3m

from minigpt4.errors import InputError
from minigpt5.config import DatasetName, validate_config
from minigpt5.data.module import DataModule
from minigpt5.data.types import Batch, Split


def make_module(folder, tokenizer, vokens, **data):
    values = {
        "model": {"backbone": {"vision": {"image_size": 8}}, "diffusion": {"image_size": 16}},
        "data": {"folder": str(folder), "num_workers": 0} | data,
        "training": {"batch_size": 2, "eval_batch_size": 3},
        "generation": {"batch_size": 2},
    }
    return DataModule(validate_config(values, "test"), tokenizer, vokens)


def test_loaders_follow_the_configuration(tmp_path, tokenizer, vokens):
    path = str(make_cc3m(tmp_path, 4))
    module = make_module(tmp_path, tokenizer, vokens, train=path, validation=path, test=path)
    train, validation = list(module.train_dataloader()), list(module.val_dataloader())
    assert [batch.size for batch in train] == [2, 2, 1] and [batch.size for batch in validation] == [3, 2]
    assert all(isinstance(batch, Batch) for batch in train)
    assert train[0].output_pixels_O3HW.shape == (2, 3, 16, 16)
    in_order = [sample.id for batch in validation for sample in batch.samples]
    assert in_order == ["cc3m_0", "cc3m_0_instruction", "cc3m_1", "cc3m_2", "cc3m_3"]
    assert module.dataset_name(Split.TRAIN) is DatasetName.CC3M
    again = list(module.val_dataloader())
    assert torch.equal(validation[0].output_pixels_O3HW, again[0].output_pixels_O3HW)  # nothing is mirrored


@pytest.mark.parametrize("by_length", [True, False])
def test_length_buckets_are_a_setting(tmp_path, tokenizer, vokens, by_length):
    """Captions of two lengths, in turn; ``data.tasks`` keeps out what would be of a third one."""
    table = make_cc3m(tmp_path, 16)
    rows = (tmp_path / table).read_text().splitlines()
    pictures = [row.split("\t")[1] for row in rows[1:]]
    texts = [" ".join(["dog"] * (1 + 30 * (number % 2))) for number in range(len(pictures))]
    lines = [rows[0], *(f"{text}\t{picture}" for text, picture in zip(texts, pictures, strict=True))]
    (tmp_path / table).write_text("\n".join(lines) + "\n")
    settings = {"train": str(table), "tasks": ["caption"], "bucket_by_length": by_length}
    batches = list(make_module(tmp_path, tokenizer, vokens, **settings).train_dataloader())
    assert len(batches) == 8
    assert all(bool(batch.attention_mask_BT.all()) for batch in batches) == by_length


class Collector(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.seen = []

    def predict_step(self, batch, _):
        self.seen += [sample.id for sample in batch]


def test_every_test_sample_is_predicted_once_in_order(tmp_path, tokenizer, vokens):
    module = make_module(tmp_path, tokenizer, vokens, test=str(make_cc3m(tmp_path, 5)))
    collector = Collector()
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.predict(collector, datamodule=module, return_predictions=False)
    assert collector.seen == [f"cc3m_{row}" for row in range(5)]


@pytest.mark.parametrize(
    ("loader", "flag"),
    [
        ("train_dataloader", "--train_data_path"),
        ("val_dataloader", "--val_data_path"),
        ("predict_dataloader", "--test_data_path"),
    ],
)
def test_a_missing_path_names_its_flag(tmp_path, tokenizer, vokens, loader, flag):
    with pytest.raises(InputError, match=flag):
        getattr(make_module(tmp_path, tokenizer, vokens), loader)()


def test_workers_and_no_flips(tmp_path, tokenizer, vokens):
    path = str(make_cc3m(tmp_path, 3))
    module = make_module(tmp_path, tokenizer, vokens, train=path, num_workers=1, random_flip=False)
    loader = module.train_dataloader()
    assert loader.persistent_workers and loader.prefetch_factor == 4
    assert loader.pin_memory == torch.cuda.is_available()

    def pixels():
        return {s.id: p for batch in loader for s, p in zip(batch.samples, batch.output_pixels_O3HW, strict=True)}

    first = pixels()
    loader.sampler.set_epoch(1)
    second = pixels()
    assert all(torch.equal(first[name], second[name]) for name in first)
