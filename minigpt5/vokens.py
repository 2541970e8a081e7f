"""Generative vokens: the token set, its label mask, its positions and the rows it adds to the language model.

Shapes: B batch, T text, N vokens a picture, K new tokens (N vokens and the picture placeholder), V base
vocabulary, H language width, R voken runs of a batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.data.types import INPUT_PICTURE

IGNORE_INDEX = -100


def voken_tokens(count: int) -> tuple[str, ...]:
    """Return ``[IMG0]`` … ``[IMG<count-1>]`` (paper section 3.2)."""
    return tuple(f"[IMG{index}]" for index in range(count))


def voken_text(count: int) -> str:
    """Return one run of vokens as it stands in a response."""
    return "".join(voken_tokens(count))


@dataclass(frozen=True)
class VokenIds:
    """Token ids of the vokens and of the input placeholder, once a tokenizer knows them."""

    vokens: tuple[int, ...]
    picture: int

    @classmethod
    def install(cls, tokenizer: LlamaTokenizer, count: int) -> "VokenIds":
        """Append the vokens, then ``<ImageHere>``, to the tokenizer, in the published order.

        Raises:
            InputError: the tokenizer already has one of them.
        """
        *vokens, picture = tokenizer.add_tokens([*voken_tokens(count), INPUT_PICTURE])
        return cls(tuple(vokens), picture)

    @property
    def first(self) -> int:
        """Id of ``[IMG0]``."""
        return self.vokens[0]

    @property
    def count(self) -> int:
        """Vokens a picture."""
        return len(self.vokens)


def mask_inner_vokens(labels_T: Tensor, ids: VokenIds) -> Tensor:
    """Return labels with the inner vokens of every run ignored.

    Published behaviour: of N vokens only the first and the last carry language loss; the inner ones are forced
    while decoding, so there is nothing to learn.
    """
    masked = labels_T.clone()
    for start in (labels_T == ids.first).nonzero().flatten().tolist():
        masked[start + 1 : start + ids.count - 1] = IGNORE_INDEX
    return masked


def voken_starts(labels_BT: Tensor, ids: VokenIds) -> Tensor:
    """Return ``[R, 2]``: sample and position of the state that predicts each run's ``[IMG0]``, in order."""
    starts = (labels_BT == ids.first).nonzero()
    return starts - torch.tensor([0, 1], device=labels_BT.device)


def gather_vokens(hidden_BTH: Tensor, starts_R2: Tensor, count: int) -> Tensor:
    """Return ``[R, N, H]``: for each run the N states that *predict* its vokens (paper section 3.2)."""
    offsets = torch.arange(count, device=hidden_BTH.device)
    return hidden_BTH[starts_R2[:, :1], starts_R2[:, 1:] + offsets]


class VokenRows(nn.Module):
    """Trainable rows for the new tokens beside a frozen embedding and a frozen output head.

    The frozen matrices stay where they are; only the K new rows are parameters, so there is no gradient mask,
    no optimizer state for the vocabulary, and weight decay cannot drift it. Each row starts at the mean of the
    frozen rows, as published.

    Args:
        embedding_VH: frozen input embedding; rows beyond ``base_size`` are not used.
        head_VH: frozen output head.
        base_size: number of tokens the tokenizer had before the new ones.
        new_tokens: number of new tokens K.
    """

    def __init__(self, embedding_VH: Tensor, head_VH: Tensor, base_size: int, new_tokens: int) -> None:
        super().__init__()
        self.base_size = base_size
        self.embedding = nn.Parameter(_mean_rows(embedding_VH[:base_size], new_tokens))
        self.head = nn.Parameter(_mean_rows(head_VH[:base_size], new_tokens))

    def is_new(self, ids_BT: Tensor) -> Tensor:
        """Return which ids are of new tokens."""
        return ids_BT >= self.base_size

    def embed(self, ids_BT: Tensor, embedding_VH: Tensor) -> Tensor:
        """Look up ``ids`` in the frozen embedding and the new rows; returns float32 ``[B, T, H]``."""
        is_new = self.is_new(ids_BT)
        base_BTH = F.embedding(ids_BT.masked_fill(is_new, 0), embedding_VH).to(self.embedding.dtype)
        new_BTH = F.embedding((ids_BT - self.base_size).clamp(min=0), self.embedding)
        return torch.where(is_new[..., None], new_BTH, base_BTH)

    def logits(self, hidden_XH: Tensor, head_VH: Tensor) -> Tensor:
        """Return ``[..., V + K]`` logits over the base vocabulary and the new tokens."""
        base = F.linear(hidden_XH, head_VH[: self.base_size].to(hidden_XH.dtype))
        return torch.cat([base, F.linear(hidden_XH, self.head.to(hidden_XH.dtype))], dim=-1)


def _mean_rows(matrix_VH: Tensor, count: int) -> Tensor:
    if matrix_VH.is_meta:
        return torch.empty(count, matrix_VH.shape[1], device="meta")
    return matrix_VH.float().mean(dim=0, keepdim=True).repeat(count, 1)
