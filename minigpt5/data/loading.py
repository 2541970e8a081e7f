"""Encoded samples in a seeded order, over processes and epochs, resumable in the middle of an epoch."""

import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from minigpt4.errors import InputError
from minigpt5.data.encode import Encoder
from minigpt5.data.types import EncodedSample, Sample, SampleIndex

Key = tuple[int, int]
"""Epoch and sample number. The epoch travels with the key, so it also reaches worker processes that persist."""

BUCKET_WINDOW = 64
"""Steps whose samples are sorted together: enough for little padding, few enough to keep the order random."""

_LETTERS_A_TOKEN = 4


class SampleDataset(Dataset[EncodedSample]):
    """Encoded samples of an index.

    Args:
        index: the samples.
        encoder: turns one into tensors.
        flip_seed: mirrors pictures at random, each by (seed, epoch, sample id) alone; None never does.
    """

    def __init__(self, index: SampleIndex, encoder: Encoder, flip_seed: int | None = None) -> None:
        self.index = index
        self.encoder = encoder
        self.flip_seed = flip_seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Key) -> EncodedSample:
        epoch, number = key
        sample = self.index[number]
        generator = None if self.flip_seed is None else flip_generator(self.flip_seed, epoch, sample.id)
        return self.encoder(sample, generator)


class PromptDataset(Dataset[Sample]):
    """Samples as they are, to be predicted."""

    def __init__(self, index: SampleIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample:
        return self.index[number]


class EpochSampler(DistributedSampler[Key]):
    """A process's share of each epoch's order, as keys of a :class:`SampleDataset`.

    The order depends on (seed, epoch) alone. As in torch's sampler, the shares are filled up with the first
    samples to equal length, so that the processes stay in step. Lightning keeps a sampler of this type and
    calls its ``set_epoch``.

    With ``lengths``, samples of similar length come together: windows of a shuffled epoch are sorted, cut into
    batches, and the batches shuffled. The batches that the processes take at one step come from one place, so
    none waits for a longer one.

    Args:
        dataset: sized.
        seed: of the order.
        shuffle: False keeps the file's order.
        num_processes: over which the samples are shared.
        rank: this process.
        lengths: of each sample, in any unit; None leaves the order as it was shuffled.
        batch_size: samples of a process and step; only used with ``lengths``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        seed: int = 0,
        shuffle: bool,
        num_processes: int = 1,
        rank: int = 0,
        lengths: np.ndarray | None = None,
        batch_size: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=num_processes, rank=rank, shuffle=shuffle, seed=seed)
        self.lengths = lengths
        self.step_size = batch_size * num_processes
        self.skip = 0
        """Samples of the next iteration that were already seen; later iterations are whole again."""

    def __iter__(self) -> Iterator[Key]:
        # torch's sampler yields numbers, whatever the type of the keys
        numbers: list[Any] = list(super().__iter__() if self.lengths is None else self._bucketed(self.lengths))
        skip, self.skip = self.skip, 0
        return iter([(self.epoch, int(number)) for number in numbers[skip:]])

    def _bucketed(self, lengths: np.ndarray) -> list[int]:
        """Return this process's share of an order in which every step's samples are of similar length."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.resize(rng.permutation(len(lengths)), self.total_size)
        steps: list[np.ndarray] = []
        for start in range(0, self.total_size, self.step_size * BUCKET_WINDOW):
            window = order[start : start + self.step_size * BUCKET_WINDOW]
            window = window[np.argsort(lengths[window], kind="stable")]
            steps += [window[at : at + self.step_size] for at in range(0, len(window), self.step_size)]
        # A step that is not full has to stay the last, or the batches behind it would begin in its middle.
        full = [step for step in steps if len(step) == self.step_size]
        partial = [step for step in steps if len(step) < self.step_size]
        shuffled = [full[index] for index in rng.permutation(len(full))]
        return np.concatenate([*shuffled, *partial])[self.rank :: self.num_replicas].tolist()


class ResumableLoader(DataLoader[EncodedSample]):
    """A loader that can be saved in the middle of an epoch and go on with the samples not yet seen.

    Lightning stores ``state_dict()`` in its checkpoints and restores it. What counts is what was handed out,
    not what workers have prefetched.

    Args:
        dataset: samples.
        sampler: its order.
        **options: as for ``DataLoader``; ``batch_size`` is not None.
    """

    def __init__(self, dataset: SampleDataset, *, sampler: EpochSampler, **options: Any) -> None:
        super().__init__(dataset, sampler=sampler, **options)
        self._epoch_sampler = sampler
        self._handed_out = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is read before the first batch is asked for: Lightning makes the iterator
        # before it sets the epoch.
        self._handed_out = self._take_resume()
        assert self.batch_size is not None
        self._epoch_sampler.skip = self._handed_out * self.batch_size
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches handed out, and what their order depends on."""
        return {"epoch": self._epoch_sampler.epoch, "batches": self._handed_out, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration of that epoch begin behind the batches already handed out.

        Raises:
            InputError: the run's samples come in another order than those of the run that was saved.
        """
        now, then = self._order(), state.get("order", {})
        changed = [
            f"{name} {then[name]} (now {value})" for name, value in now.items() if then.get(name, value) != value
        ]
        if changed:
            raise InputError(
                f"--resume: the run it goes on with took its samples in another order: {', '.join(changed)}; give "
                "the data, batch size, devices and seed that it was started with"
            )
        self._resume = {"epoch": state["epoch"], "batches": state["batches"]}
        self._epoch_sampler.set_epoch(state["epoch"])
        self._handed_out = state["batches"]

    def _order(self) -> dict[str, int | bool]:
        sampler, batch_size = self._epoch_sampler, self.batch_size
        assert batch_size is not None
        return {
            "samples": len(self.dataset),  # type: ignore[arg-type]
            "batch size": batch_size,
            "processes": sampler.num_replicas,
            "seed": sampler.seed,
            "bucketed by length": sampler.lengths is not None,
        }

    def _take_resume(self) -> int:
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != self._epoch_sampler.epoch or state["batches"] >= len(self):
            return 0
        return state["batches"]


def sample_lengths(index: SampleIndex, picture_length: int) -> np.ndarray:
    """Return about how long each sample is, without tokenizing: texts by their letters, and pictures.

    Args:
        index: the samples.
        picture_length: positions of a picture in the prompt.
    """
    samples = (index[number] for number in range(len(index)))
    lengths = (
        (len(sample.prompt) + len(sample.response)) / _LETTERS_A_TOKEN + len(sample.input_images) * picture_length
        for sample in samples
    )
    return np.fromiter(lengths, dtype=np.float32, count=len(index))


def flip_generator(seed: int, epoch: int, sample_id: str) -> torch.Generator:
    """Return the generator of one sample's mirroring in one epoch."""
    digest = sha256(f"flip:{seed}:{epoch}:{sample_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return ``DataLoader`` arguments that only make sense with workers, or only with a GPU."""
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    if num_workers:
        options |= {"prefetch_factor": 4, "persistent_workers": True}
        if sys.platform == "linux":
            # So workers share the index; from Python 3.14 on they would each get a copy of their own.
            options["multiprocessing_context"] = "fork"
    return options


def as_list(samples: Sequence[Sample]) -> list[Sample]:
    """Collate samples to a list."""
    return list(samples)
