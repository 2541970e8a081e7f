import random

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from minigpt4.errors import InputError
from minigpt5.metrics import text as text_scores
from minigpt5.metrics.text import (
    bleu,
    bleu_characters,
    clean_text,
    load_sentence_encoder,
    meteor,
    meteor_variant,
    published_text,
    rouge_l,
    split_words,
)


@pytest.mark.parametrize(
    ("raw", "clean", "published"),
    [
        ("a dog [IMG0][IMG1] runs ###", "a dog runs", "a dog"),
        ("a dog [IMG0] [IMG1] ###", "a dog", "a dog"),
        ("?!...###", "", ""),
        (". .", "", ". ."),
        ("", "", ""),
        ("Café — naïve ###", "Café — naïve", "Café — naïve"),
        # as decoded: the published evaluation keeps the beginning
        ("<s> a dog [IMG0] ###", "a dog", "<s> a dog"),
        ("<s> [IMG0] ###", "", "<s>"),
        ("<s> a dog </s>", "a dog", "<s> a dog </s>"),
        ("a <s> in the middle", "a <s> in the middle", "a <s> in the middle"),
    ],
)
def test_texts_are_cleaned(raw, clean, published):
    assert clean_text(raw) == clean
    assert published_text(raw) == published


def test_bleu_counts_words_and_bigrams():
    # 3 of 4 words and 1 of 3 bigrams are shared; the lengths are equal, so there is no brevity penalty.
    first, second = bleu("the cat sat down", "the cat lay down")
    assert first == pytest.approx(3 / 4)
    assert second == pytest.approx((3 / 4 * 1 / 3) ** 0.5)


def test_bleu_penalises_short_replies():
    first, _ = bleu("a dog", "a dog runs home")
    assert first == pytest.approx(torch.tensor(1 - 4 / 2).exp().item())


def test_character_bleu_is_not_word_bleu():
    assert bleu_characters("ab", "ba")[0] == 1.0
    assert bleu("ab", "ba")[0] == 0.0


@pytest.mark.parametrize("score", [lambda a, b: bleu(a, b)[0], rouge_l, meteor])
def test_empty_texts_score_zero(score):
    assert score("", "a dog") == 0.0
    assert score("a dog", "") == 0.0


def test_words_are_split_without_downloaded_data():
    assert split_words("Hello, world!") == ["hello", ",", "world", "!"]


def test_rouge_l_equals_the_rouge_package():
    rouge = pytest.importorskip("rouge").Rouge()
    draw = random.Random(3)
    vocabulary = ["the", "a", "cat", "dog", "sat", "on", "mat", "ran.", "home.", "fast"]
    for _ in range(200):
        first, second = (" ".join(draw.choices(vocabulary, k=draw.randint(1, 14))) for _ in range(2))
        expected = rouge.get_scores(first, second)[0]["rouge-l"]["f"]
        assert rouge_l(first, second) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_takes_long_texts():
    words = " ".join(f"w{index}" for index in range(1200))
    assert rouge_l(words, words) == pytest.approx(1.0, abs=1e-6)


def test_meteor_matches_stems_and_penalises_order():
    assert meteor("the cats sat", "the cat sat") == pytest.approx(0.98148, abs=1e-4)
    # Three matches in three chunks: penalty 0.5 · (3/3)³.
    assert meteor("c b a", "a b c") == pytest.approx(0.5)


def test_meteor_says_whether_it_has_synonyms():
    assert "stem" in meteor_variant()
    has_wordnet = not isinstance(text_scores._wordnet()[0], text_scores._NoSynonyms)
    assert ("synonym" in meteor_variant()) is has_wordnet


def test_sentence_encoder_folder(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1, "dog": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())]).save(
        str(tmp_path)
    )
    table = load_sentence_encoder(str(tmp_path), torch.device("cpu")).table(["cat", "cat dog", "cat"])
    assert sorted(table) == ["cat", "cat dog"]
    assert float(table["cat"] @ table["cat dog"]) == pytest.approx(0.5**0.5)


def test_folder_without_a_sentence_encoder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.sentence_encoder.*clip"):
        load_sentence_encoder(str(tmp_path), torch.device("cpu"))
