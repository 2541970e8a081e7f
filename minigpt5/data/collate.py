"""Encoded samples → one padded batch."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from minigpt5.data.types import Batch, EncodedSample
from minigpt5.vokens import IGNORE_INDEX


def collate(samples: Sequence[EncodedSample], pad_id: int) -> Batch:
    """Pad texts on the right and concatenate pictures in sample order.

    Args:
        samples: at least one; all with pixels or all with features, not both kinds.
        pad_id: fills ids; the mask is 0 and the label -100 there.
    """
    ids = [sample.input_ids_T for sample in samples]
    return Batch(
        samples=[sample.sample for sample in samples],
        input_ids_BT=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        attention_mask_BT=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        labels_BT=pad_sequence(
            [sample.labels_T for sample in samples], batch_first=True, padding_value=IGNORE_INDEX
        ),
        input_counts=[len(sample.sample.input_images) for sample in samples],
        output_counts=[len(sample.sample.output_images) for sample in samples],
        input_pixels_P3HW=_concatenate([sample.input_pixels_P3HW for sample in samples]),
        output_pixels_O3HW=_concatenate([sample.output_pixels_O3HW for sample in samples]),
        input_features_PLH=_concatenate([sample.input_features_PLH for sample in samples]),
        output_moments_OCHW=_concatenate([sample.output_moments_OCHW for sample in samples]),
    )


def _concatenate(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
