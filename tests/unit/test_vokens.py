"""Voken ids, labels, positions and rows."""

from pathlib import Path

import pytest
import torch

from minigpt4.errors import InputError
from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.vokens import (
    VokenIds,
    VokenRows,
    gather_vokens,
    mask_inner_vokens,
    voken_starts,
    voken_text,
)

TOKENIZER = Path(__file__).parents[1] / "parity" / "fixtures" / "model" / "llama" / "tokenizer.model"


def installed(count: int) -> tuple[LlamaTokenizer, VokenIds]:
    tokenizer = LlamaTokenizer(TOKENIZER)
    return tokenizer, VokenIds.install(tokenizer, count)


def test_ids_follow_the_base_vocabulary_in_the_published_order():
    tokenizer, ids = installed(8)
    assert ids.vokens == tuple(range(600, 608))
    assert ids.picture == 608
    assert tokenizer.encode(voken_text(8)) == list(ids.vokens)


def test_a_tokenizer_that_has_vokens_already_is_refused():
    tokenizer, _ = installed(8)
    with pytest.raises(InputError, match=r"already has \[IMG0\]"):
        VokenIds.install(tokenizer, 8)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_only_first_and_last_voken_of_every_run_are_labelled(count):
    _, ids = installed(count)
    run = torch.tensor(ids.vokens)
    labels = torch.cat([torch.tensor([5]), run, torch.tensor([6]), run])
    masked = mask_inner_vokens(labels, ids)
    kept = (masked != -100).sum().item()
    assert kept == 2 + 2 * min(count, 2)
    assert (masked == ids.first).sum() == 2
    assert labels[1] == ids.first


def test_states_that_predict_vokens_begin_one_before_the_first():
    _, ids = installed(4)
    labels = torch.full((2, 12), -100)
    labels[0, 3], labels[1, 2], labels[1, 7] = ids.first, ids.first, ids.first
    starts = voken_starts(labels, ids)
    assert starts.tolist() == [[0, 2], [1, 1], [1, 6]]
    hidden = torch.arange(24.0).reshape(2, 12, 1)
    vokens = gather_vokens(hidden, starts, 4)
    assert vokens[..., 0].tolist() == [[2, 3, 4, 5], [13, 14, 15, 16], [18, 19, 20, 21]]


def test_rows_start_at_the_mean_and_leave_frozen_rows_alone():
    embedding, head = torch.randn(12, 6), torch.randn(12, 6)
    rows = VokenRows(embedding, head, base_size=10, new_tokens=3)
    torch.testing.assert_close(rows.embedding[1], embedding[:10].mean(0))
    ids = torch.tensor([[0, 9, 10, 12]])
    embedded = rows.embed(ids, embedding)
    assert torch.equal(embedded[0, :2], embedding[[0, 9]])
    assert torch.equal(embedded[0, 2:], rows.embedding[[0, 2]])
    assert rows.logits(torch.randn(5, 6), head).shape == (5, 13)
    embedded.sum().backward()
    assert rows.embedding.grad is not None
    assert rows.embedding.grad[1].abs().sum() == 0
