"""One sample → tensors: prompt and response ids, labels, pictures.

Shapes: T tokens, P input pictures, O output pictures, L queries a picture, H language width, C moment channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minigpt4.errors import InputError
from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.data.feature_cache import FeatureFolder
from minigpt5.data.types import INPUT_PICTURE, EncodedSample, Sample
from minigpt5.images import PictureTransform, open_picture
from minigpt5.vokens import IGNORE_INDEX, VokenIds, mask_inner_vokens


@dataclass(frozen=True)
class Encoder:
    """Everything that turns samples into tensors.

    Args:
        tokenizer: knows the vokens.
        vokens: their ids.
        input_transform: for pictures of the prompt.
        output_transform: for wanted pictures.
        mask_vokens: ignore the inner vokens of each run in the language loss (published).
        features: precomputed features that replace pictures.
    """

    tokenizer: LlamaTokenizer
    vokens: VokenIds
    input_transform: PictureTransform
    output_transform: PictureTransform
    mask_vokens: bool = True
    features: FeatureFolder | None = None

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> EncodedSample:
        """Encode a sample; with a generator, pictures are mirrored at random.

        Raises:
            InputError: a picture cannot be read, or the tokenizer's limit cuts a placeholder or a run of vokens.
        """
        prompt, response = self._token_ids(sample)
        fault = self._cut(sample, prompt, response)
        if fault is not None:
            raise InputError(f"sample {sample.id}: {fault}")
        wanted_T = torch.tensor(response, dtype=torch.long)
        labels_T = torch.full((len(prompt) + len(response),), IGNORE_INDEX, dtype=torch.long)
        labels_T[len(prompt) :] = mask_inner_vokens(wanted_T, self.vokens) if self.mask_vokens else wanted_T
        return EncodedSample(
            sample=sample,
            input_ids_T=torch.tensor(prompt + response, dtype=torch.long),
            labels_T=labels_T,
            **self._pictures(sample, generator),
        )

    def count_tokens(self, text: str) -> int:
        """Return a text's length, at most the tokenizer's limit."""
        return len(self.tokenizer.encode(text))

    def find_cut(self, sample: Sample) -> str | None:
        """Return why a sample is too long to be used, or None. Short texts are not tokenized."""
        limit = self.tokenizer.max_length
        # A token is a byte at least, but for one word-boundary mark before each piece between added tokens.
        if limit is None or max(len(sample.prompt.encode()), len(sample.response.encode())) < limit // 2:
            return None
        return self._cut(sample, *self._token_ids(sample))

    def _token_ids(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Tokenize prompt and response, and cut them to the limit, each on its own (published)."""
        return self.tokenizer.encode(sample.prompt), self.tokenizer.encode(sample.response)

    def _cut(self, sample: Sample, prompt: list[int], response: list[int]) -> str | None:
        last_voken = self.tokenizer.id_to_token(self.vokens.vokens[-1])
        if prompt.count(self.vokens.picture) < sample.prompt.count(INPUT_PICTURE):
            what = "a picture of the prompt"
        elif response.count(self.vokens.vokens[-1]) < sample.response.count(last_voken):
            what = "the vokens of the response"
        else:
            return None
        return f"the tokenizer's limit of {self.tokenizer.max_length} tokens a text cuts off {what}"

    def _pictures(self, sample: Sample, generator: torch.Generator | None) -> dict[str, torch.Tensor | None]:
        """Return the pictures' tensors under their names in :class:`EncodedSample`."""
        inputs, outputs = sample.input_images, sample.output_images
        if self.features is None:
            return {
                "input_pixels_P3HW": _stack(inputs, partial(self._load, self.input_transform, generator)),
                "output_pixels_O3HW": _stack(outputs, partial(self._load, self.output_transform, generator)),
            }
        return {
            "input_pixels_P3HW": None,
            "output_pixels_O3HW": None,
            "input_features_PLH": _stack(inputs, partial(self.features.load, "input")),
            "output_moments_OCHW": _stack(outputs, partial(self.features.load, "output")),
        }

    @staticmethod
    def _load(transform: PictureTransform, generator: torch.Generator | None, path: Path) -> torch.Tensor:
        return transform(open_picture(path), generator)


def _stack(paths: Sequence[Path], load: Callable[[Path], torch.Tensor]) -> torch.Tensor | None:
    return torch.stack([load(path) for path in paths]) if paths else None
