"""Putting pictures into prompts, for a whole batch at once.

Shapes: B samples, T text tokens, T' positions with pictures, P pictures of the batch, L queries a picture,
H language width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt5.vokens import IGNORE_INDEX


@dataclass(frozen=True)
class Assembled:
    """The language model's input: embeddings, mask (0 at padding) and labels, each with ``[B, T']`` first."""

    embeds_BTH: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    constant_B: Tensor
    """Leading positions of each sample that hold no trained token: as long as the language model itself is frozen,
    no trainable parameter reaches their states."""


def insert_pictures(
    text_BTH: Tensor,
    mask_BT: Tensor,
    labels_BT: Tensor,
    *,
    is_picture_BT: Tensor,
    is_trained_BT: Tensor,
    features_PLH: Tensor | None,
    num_queries: int,
) -> Assembled:
    """Replace every placeholder by its picture's L states.

    Text padding keeps its embedding with mask 0; samples that have fewer pictures than the longest are padded
    with zeros behind that, as published.

    Args:
        text_BTH: text embeddings; those of placeholders are not used.
        mask_BT: 0 at padding.
        labels_BT: -100 where there is no label; pictures get none.
        is_picture_BT: where the placeholders are.
        is_trained_BT: where tokens are whose embedding trains.
        features_PLH: the pictures' states in the placeholders' order.
        num_queries: L.
    """
    rows = torch.arange(len(text_BTH), device=text_BTH.device)[:, None].expand_as(mask_BT)
    width_BT = torch.where(is_picture_BT, num_queries, 1)
    starts_BT = width_BT.cumsum(1) - width_BT
    length = int(width_BT.sum(1).max())
    is_text_BT = ~is_picture_BT
    text = (rows[is_text_BT], starts_BT[is_text_BT])
    embeds = text_BTH.new_zeros(len(text_BTH), length, text_BTH.shape[2])
    mask = mask_BT.new_zeros(len(text_BTH), length)
    labels = labels_BT.new_full((len(text_BTH), length), IGNORE_INDEX)
    embeds = embeds.index_put(text, text_BTH[is_text_BT])
    mask[text] = mask_BT[is_text_BT]
    labels[text] = labels_BT[is_text_BT]
    count = int(is_picture_BT.sum())
    given = 0 if features_PLH is None else len(features_PLH)
    assert given == count, f"{count} picture placeholders but {given} pictures"
    if features_PLH is not None and count:
        offsets_L = torch.arange(num_queries, device=text_BTH.device)
        pictures = (
            rows[is_picture_BT][:, None].expand(-1, num_queries),
            starts_BT[is_picture_BT][:, None] + offsets_L,
        )
        embeds = embeds.index_put(pictures, features_PLH.to(embeds.dtype))
        mask[pictures] = 1
    constant_B = starts_BT.masked_fill(~is_trained_BT, length).amin(1)
    return Assembled(embeds, mask, labels, constant_B)
