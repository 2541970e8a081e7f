"""Order, sharing over processes, resuming in the middle of an epoch."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from data_helpers import VOKENS, make_cc3m
from torch.utils.data import DataLoader

from minigpt4.errors import InputError
from minigpt5.config import DataConfig
from minigpt5.data.collate import collate
from minigpt5.data.encode import Encoder
from minigpt5.data.loading import EpochSampler, ResumableLoader, SampleDataset, flip_generator, sample_lengths
from minigpt5.data.readers import open_index
from minigpt5.data.types import Split
from minigpt5.images import input_transform, output_transform


@pytest.fixture
def dataset(tmp_path, tokenizer, vokens):
    path = make_cc3m(tmp_path, 12)
    config = DataConfig(folder=tmp_path)
    index = open_index(config, path, Split.TRAIN, voken_text=VOKENS, seed=0, count_tokens=len)
    encoder = Encoder(tokenizer, vokens, input_transform(8), output_transform(8))
    return SampleDataset(index, encoder, flip_seed=1)


def make_loader(dataset, workers=0, **sampler):
    options = {"persistent_workers": True, "num_workers": workers} if workers else {}
    return ResumableLoader(
        dataset,
        sampler=EpochSampler(dataset, seed=3, shuffle=True, **sampler),
        batch_size=2,
        collate_fn=partial(collate, pad_id=2),
        **options,
    )


def ids_of(loader):
    return [sample.id for batch in loader for sample in batch.samples]


def test_the_order_depends_on_seed_and_epoch_alone(dataset):
    first, second = make_loader(dataset), make_loader(dataset)
    epoch0 = ids_of(first)
    assert epoch0 == ids_of(second) and sorted(epoch0) == sorted(s.id for s in dataset.index)
    first.sampler.set_epoch(1)
    epoch1 = ids_of(first)
    assert epoch1 != epoch0 and sorted(epoch1) == sorted(epoch0)


@pytest.mark.parametrize("workers", [0, 1])
def test_mirroring_depends_on_seed_epoch_and_sample(dataset, workers):
    def pixels(epoch):
        loader = make_loader(dataset, workers)
        seen = {}
        for current in range(epoch + 1):
            loader.sampler.set_epoch(current)
            seen = {s.id: p for b in loader for s, p in zip(b.samples, b.output_pixels_O3HW, strict=True)}
        return seen

    first, again, later = pixels(0), pixels(0), pixels(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    mirrored = [not torch.equal(first[name], later[name]) for name in first]
    assert any(mirrored) and not all(mirrored)
    for name, was_mirrored in zip(first, mirrored, strict=True):
        assert torch.equal(first[name], later[name].flip(-1)) is was_mirrored


def test_flips_are_fair():
    flips = [torch.rand((), generator=flip_generator(0, 0, str(i))).item() < 0.5 for i in range(2000)]
    assert 0.45 < sum(flips) / len(flips) < 0.55


def test_processes_share_the_samples_in_equal_parts(dataset):
    shares = [ids_of(make_loader(dataset, num_processes=2, rank=rank)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 7
    counts = Counter(shares[0] + shares[1])
    assert set(counts) == {sample.id for sample in dataset.index}
    assert sum(counts.values()) == 14  # 13 samples, one of them twice


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_loader_goes_on_where_it_was_saved(dataset, taken, workers):
    whole = make_loader(dataset, workers)
    whole.sampler.set_epoch(2)
    expected = ids_of(whole)
    saved = make_loader(dataset, workers)
    saved.sampler.set_epoch(2)
    batches = iter(saved)
    for _ in range(taken):
        next(batches)
    restored = make_loader(dataset, workers)
    restored.load_state_dict(saved.state_dict())
    assert ids_of(restored) == expected[2 * taken :]
    assert ids_of(restored) == expected, "only the first iteration is shortened"


def test_a_state_saved_at_the_end_of_an_epoch_begins_the_next_one_whole(dataset):
    saved = make_loader(dataset)
    whole = ids_of(saved)
    restored = make_loader(dataset)
    restored.load_state_dict(saved.state_dict())
    restored.sampler.set_epoch(1)
    assert sorted(ids_of(restored)) == sorted(whole)


class Recorder(pl.LightningModule):
    """Records what it is given and trains one number."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.stop_after = [], stop_after

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, *[sample.id for sample in batch.samples]))
        return self.weight * 1.0

    def validation_step(self, batch, _):
        self.log("val_loss", self.weight, batch_size=batch.size)

    def on_train_batch_end(self, *_):
        if len(self.seen) == self.stop_after:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/mid.ckpt")
            self.trainer.should_stop = True
            self.trainer.limit_val_batches = 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(dataset, folder, model, checkpoint=None):
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        val_check_interval=0.5,
        num_sanity_val_steps=0,
    )
    validation = DataLoader(
        dataset, sampler=EpochSampler(dataset, shuffle=False), batch_size=4, collate_fn=partial(collate, pad_id=2)
    )
    trainer.fit(model, make_loader(dataset), validation, ckpt_path=checkpoint)
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop_after", [1, 3, 6, 7, 8, 10])
def test_lightning_resumes_with_the_samples_not_yet_seen(dataset, tmp_path, stop_after):
    whole = fit(dataset, tmp_path, Recorder())
    assert len(whole) == 14
    before = fit(dataset, tmp_path, Recorder(stop_after))
    after = fit(dataset, tmp_path, Recorder(), str(tmp_path / "mid.ckpt"))
    assert before[:stop_after] + after == whole


LENGTHS = np.array([3, 50, 7, 20, 90, 4, 60, 22, 8, 55, 21, 80])


def batches_of(epoch=0, processes=1, rank=0, lengths=LENGTHS):
    """One process's batches of two."""
    sampler = EpochSampler(
        range(len(lengths)),
        seed=5,
        shuffle=True,
        num_processes=processes,
        rank=rank,
        lengths=lengths,
        batch_size=2,
    )
    sampler.set_epoch(epoch)
    numbers = [number for _, number in sampler]
    return [numbers[start : start + 2] for start in range(0, len(numbers), 2)]


def test_buckets_hold_every_sample_once_and_little_padding():
    batches = batches_of()
    assert sorted(number for batch in batches for number in batch) == list(range(12))
    spread = [abs(int(LENGTHS[first]) - int(LENGTHS[second])) for first, second in batches]
    assert sorted(spread) == [1, 1, 1, 5, 10, 28]  # the neighbours of the sorted lengths
    assert batches != batches_of(epoch=1)
    assert batches == batches_of()


def test_processes_share_buckets_and_take_similar_lengths_at_each_step():
    first, second = batches_of(processes=2, rank=0), batches_of(processes=2, rank=1)
    assert sorted(number for batch in first + second for number in batch) == list(range(12))
    for ours, theirs in zip(first, second, strict=True):
        step = LENGTHS[[*ours, *theirs]]
        order = sorted(LENGTHS)
        start = order.index(step.min())
        assert sorted(step) == order[start : start + 4]


def test_a_bucketed_epoch_that_does_not_divide_is_filled_up_and_its_partial_batch_comes_last():
    lengths = LENGTHS[:11]
    first, second = (batches_of(processes=2, rank=rank, lengths=lengths) for rank in (0, 1))
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [2, 2, 2]
    numbers = [number for batch in first + second for number in batch]
    assert len(numbers) == 12 and set(numbers) == set(range(11))
    (*full, last) = batches_of(lengths=lengths)
    assert [len(batch) for batch in full] == [2] * 5 and len(last) == 1


def test_a_loader_that_would_go_on_in_another_order_is_refused(dataset):
    saved = make_loader(dataset)
    next(iter(saved))
    state = saved.state_dict()
    others = {
        "processes 1 (now 2)": make_loader(dataset, num_processes=2, rank=0),
        "bucketed by length False (now True)": make_loader(dataset, lengths=np.ones(len(dataset))),
        "batch size 2 (now 3)": ResumableLoader(dataset, sampler=saved.sampler, batch_size=3),
        "seed 3 (now 4)": ResumableLoader(
            dataset, sampler=EpochSampler(dataset, seed=4, shuffle=True), batch_size=2
        ),
        f"samples {len(dataset)} (now 5)": ResumableLoader(
            range(5), sampler=EpochSampler(range(5), seed=3, shuffle=True), batch_size=2
        ),
    }
    for change, loader in others.items():
        with pytest.raises(InputError, match="--resume: the run .* took its samples in another order") as error:
            loader.load_state_dict(state)
        assert change in str(error.value)
    older = {key: value for key, value in state.items() if key != "order"}
    make_loader(dataset).load_state_dict(older)


def test_a_bucketed_loader_goes_on_where_it_was_left(dataset):
    lengths = sample_lengths(dataset.index, picture_length=32)
    assert len(lengths) == len(dataset) and lengths.min() > 0
    whole = ids_of(make_loader(dataset, lengths=lengths))
    loader = make_loader(dataset, lengths=lengths)
    batches = iter(loader)
    seen = [sample.id for _ in range(2) for sample in next(batches).samples]
    resumed = make_loader(dataset, lengths=lengths)
    resumed.load_state_dict(loader.state_dict())
    assert seen + ids_of(resumed) == whole
