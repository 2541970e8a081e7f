"""Fixtures of the data tests."""

import pytest
from data_helpers import FIXTURES

from minigpt4.tokenizer import LlamaTokenizer
from minigpt5.vokens import VokenIds


@pytest.fixture
def tokenizer() -> LlamaTokenizer:
    return LlamaTokenizer(FIXTURES / "tokenizer" / "tokenizer.model", 2048)


@pytest.fixture
def vokens(tokenizer) -> VokenIds:
    return VokenIds.install(tokenizer, 8)
