"""The Lightning data module: a run's data files as loaders."""

from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from minigpt4.errors import InputError
from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.config import DatasetName, RunConfig
from minigpt5.data.collate import collate
from minigpt5.data.encode import Encoder
from minigpt5.data.feature_cache import FeatureFolder
from minigpt5.data.index import SelectedSamples
from minigpt5.data.loading import (
    EpochSampler,
    PromptDataset,
    ResumableLoader,
    SampleDataset,
    as_list,
    sample_lengths,
    worker_options,
)
from minigpt5.data.readers import detect_dataset, open_index
from minigpt5.data.types import Batch, Sample, Split
from minigpt5.images import input_transform, output_transform
from minigpt5.vokens import VokenIds, voken_text

FLAGS = {
    Split.TRAIN: "--train_data_path",
    Split.VALIDATION: "--val_data_path",
    Split.TEST: "--test_data_path",
}


class DataModule(pl.LightningDataModule):
    """Loaders of a run's train, validation and test files. Each file is indexed once, when first asked for.

    Args:
        config: the run.
        tokenizer: knows the vokens.
        vokens: their ids.
    """

    def __init__(self, config: RunConfig, tokenizer: LlamaTokenizer, vokens: VokenIds) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.vokens = vokens
        self._indices: dict[Split, SelectedSamples] = {}

    def index(self, split: Split) -> SelectedSamples:
        """Return a split's samples; ``problems`` names the records left out.

        Raises:
            InputError: the run has no data file for the split, or the file cannot be used.
        """
        if split not in self._indices:
            encoder = self.encoder(split)
            self._indices[split] = open_index(
                self.config.data,
                self._path(split),
                split,
                voken_text=voken_text(self.vokens.count),
                seed=self.config.training.seed,
                count_tokens=encoder.count_tokens,
                find_cut=encoder.find_cut,
                features=encoder.features,
            )
        return self._indices[split]

    def dataset_name(self, split: Split) -> DatasetName:
        """Return which data set a split's file is of.

        Raises:
            InputError: the run has no data file for the split, or its layout is not known.
        """
        if self.config.data.dataset is not DatasetName.AUTO:
            return self.config.data.dataset
        return detect_dataset(self.config.data.folder / self._path(split))

    def encoder(self, split: Split) -> Encoder:
        """Return what turns a split's samples into tensors."""
        model = self.config.model
        wanted = output_transform(model.diffusion.image_size, normalize=split is not Split.TEST)
        return Encoder(
            self.tokenizer,
            self.vokens,
            input_transform(model.backbone.vision.image_size),
            wanted,
            mask_vokens=model.vokens.label_loss != "all",
            features=self._features(split, wanted.key),
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this process, shuffled anew each epoch."""
        training = self.config.training
        flip_seed = training.seed if self.config.data.random_flip else None
        index = self.index(Split.TRAIN)
        dataset = SampleDataset(index, self.encoder(Split.TRAIN), flip_seed)
        queries = self.config.model.backbone.qformer.num_queries
        lengths = sample_lengths(index, queries) if self.config.data.bucket_by_length else None
        return ResumableLoader(
            dataset,
            sampler=self._sampler(dataset, shuffle=True, lengths=lengths),
            batch_size=training.batch_size,
            collate_fn=partial(collate, pad_id=self.tokenizer.pad_id),
            **worker_options(self.config.data.num_workers),
        )

    def val_dataloader(self) -> "DataLoader[Batch]":
        """Return the validation batches of this process, in file order."""
        dataset = SampleDataset(self.index(Split.VALIDATION), self.encoder(Split.VALIDATION))
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            sampler=self._sampler(dataset, shuffle=False),
            batch_size=self.config.training.eval_batch_size,
            collate_fn=partial(collate, pad_id=self.tokenizer.pad_id),
            **worker_options(self.config.data.num_workers),
        )

    def predict_dataloader(self) -> "DataLoader[list[Sample]]":
        """Return lists of test samples in file order, none dropped or repeated.

        Lightning shares them over processes.
        """
        return DataLoader(
            PromptDataset(self.index(Split.TEST)),  # type: ignore[arg-type]
            batch_size=self.config.generation.batch_size,
            collate_fn=as_list,
        )

    def transfer_batch_to_device(
        self, batch: Batch | list[Sample], device: torch.device, dataloader_idx: int
    ) -> Batch | list[Sample]:
        """Move a batch; samples to be predicted hold no tensors."""
        return batch.to(device) if isinstance(batch, Batch) else batch

    def _path(self, split: Split) -> Path:
        path: Path | None = getattr(self.config.data, split.value)
        if path is None:
            raise InputError(f"no {split.value} data: give {FLAGS[split]} (data.{split.value})")
        return path

    def _features(self, split: Split, transform: str) -> FeatureFolder | None:
        """Return the feature folder where the published code uses one: CC3M, not for the test split."""
        folder = self.config.data.feature_folder
        if folder is None or split is Split.TEST or self.dataset_name(split) is not DatasetName.CC3M:
            return None
        return FeatureFolder(folder, transform)

    def _sampler(
        self, dataset: SampleDataset, *, shuffle: bool, lengths: np.ndarray | None = None
    ) -> EpochSampler:
        trainer = self.trainer
        return EpochSampler(
            dataset,
            seed=self.config.training.seed,
            shuffle=shuffle,
            num_processes=1 if trainer is None else trainer.world_size,
            rank=0 if trainer is None else trainer.global_rank,
            lengths=lengths,
            batch_size=self.config.training.batch_size,
        )
