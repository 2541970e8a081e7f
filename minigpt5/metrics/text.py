"""Text scores: BLEU, ROUGE-L, METEOR and sentence similarity.

Every function scores one pair of strings and returns a value in [0, 1] (sentence similarity: [-1, 1]); averaging
is the suites' business. Shapes: N texts, E embedding width.
"""

import re
import string
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nltk
import torch
import torch.nn.functional as F
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.bleu_score import sentence_bleu
from nltk.translate.meteor_score import meteor_score
from torch import Tensor

from minigpt4.errors import InputError
from minigpt5.metrics.hub import cached_without_network

STOP = "###"
FIRST_VOKEN = "[IMG0]"
_VOKEN = re.compile(r"\[IMG\d+\]")
_ENDS = re.compile(r"^\s*<s>|</s>\s*$")
"""Where a decoded reply begins, and where it ended before ``###``."""
_BLEU_WEIGHTS = [(1.0,), (0.5, 0.5)]
_ROUGE_EPSILON = 1e-8


def clean_text(text: str) -> str:
    """Return the words of a response: no vokens, ``###``, ``<s>`` or ``</s>``; "" if only punctuation is left."""
    words = " ".join(_VOKEN.sub(" ", strip_ends(text).replace(STOP, " ")).split())
    return "" if all(char in string.punctuation + " " for char in words) else words


def strip_ends(text: str) -> str:
    """Return a decoded reply without the tokens of its beginning and its end."""
    return _ENDS.sub("", text)


def published_text(text: str) -> str:
    """Return what the published evaluation scores: the text before the first ``[IMG0]``, without ``###``.

    Text of punctuation only counts as missing there, unless it holds white space.
    """
    words = text.replace(STOP, "").split(FIRST_VOKEN)[0].strip()
    return "" if all(char in string.punctuation for char in words) else words


def split_words(text: str) -> list[str]:
    """Return the lower-cased Penn Treebank tokens of ``text`` (nltk's rules, which need no downloaded data)."""
    return NLTKWordTokenizer().tokenize(text.lower())


def bleu(prediction: str, target: str) -> tuple[float, float]:
    """Return sentence-level BLEU-1 and BLEU-2 on words, without smoothing (Papineni et al., ACL 2002)."""
    return _bleu(split_words(prediction), split_words(target))


def bleu_characters(prediction: str, target: str) -> tuple[float, float]:
    """Return BLEU-1 and BLEU-2 on *characters*: the published figures, where nltk was given plain strings."""
    return _bleu(list(prediction), list(target))


def _bleu(prediction: Sequence[str], target: Sequence[str]) -> tuple[float, float]:
    if not prediction or not target:
        return 0.0, 0.0
    with warnings.catch_warnings():
        # nltk warns about every pair without a common bigram; that such a pair scores about 0 is wanted.
        warnings.simplefilter("ignore", UserWarning)
        first, second = sentence_bleu([target], prediction, weights=_BLEU_WEIGHTS)
    return float(first), float(second)


def rouge_l(prediction: str, target: str) -> float:
    """Return summary-level ROUGE-L F1 over *distinct* words, as the package ``rouge`` 1.0.1 defines it.

    Sentences end at full stops. For each wanted sentence the words of its longest common subsequences with the
    predicted sentences are united; the share of distinct words so covered gives precision and recall (Lin, 2004,
    section 3.2, on sets). The package itself recurses once a word and fails on about a thousand; this does not.
    """
    predicted, wanted = _sentences(prediction), _sentences(target)
    predicted_words, wanted_words = set().union(*predicted), set().union(*wanted)
    if not predicted_words or not wanted_words:
        return 0.0
    common: set[str] = set()
    for sentence in wanted:
        for candidate in predicted:
            common |= _common_words(sentence, candidate)
    precision, recall = len(common) / len(predicted_words), len(common) / len(wanted_words)
    return 2 * precision * recall / (precision + recall + _ROUGE_EPSILON)


def _sentences(text: str) -> list[list[str]]:
    # A part of white space only counts as a sentence of one empty word, as in the package.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(wanted: list[str], predicted: list[str]) -> set[str]:
    """Return the words of one longest common subsequence; among equals the package's choice."""
    lengths = [[0] * (len(predicted) + 1) for _ in range(len(wanted) + 1)]
    for i, word in enumerate(wanted, start=1):
        for j, other in enumerate(predicted, start=1):
            if word == other:
                lengths[i][j] = lengths[i - 1][j - 1] + 1
            else:
                lengths[i][j] = max(lengths[i - 1][j], lengths[i][j - 1])
    words: set[str] = set()
    i, j = len(wanted), len(predicted)
    while i and j:
        if wanted[i - 1] == predicted[j - 1]:
            words.add(wanted[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


class _NoSynonyms:
    """Stands where nltk expects WordNet; METEOR then matches equal words and equal stems only."""

    def synsets(self, word: str) -> list[Any]:
        return []


@cache
def _wordnet() -> tuple[Any, str]:
    try:
        nltk.corpus.wordnet.ensure_loaded()
    except LookupError:
        return _NoSynonyms(), "exact and stem matches (nltk's WordNet corpus is not installed)"
    return nltk.corpus.wordnet, "exact, stem and WordNet synonym matches"


def meteor_variant() -> str:
    """Say which matches :func:`meteor` makes here: with nltk's WordNet corpus also synonyms, else not."""
    return _wordnet()[1]


def meteor(prediction: str, target: str) -> float:
    """Return METEOR (Banerjee and Lavie, 2005) as nltk computes it; see :func:`meteor_variant`."""
    predicted, wanted = split_words(prediction), split_words(target)
    if not predicted or not wanted:
        return 0.0
    return float(meteor_score([wanted], predicted, wordnet=_wordnet()[0]))


@dataclass(frozen=True)
class SentenceEncoder:
    """Texts → unit vectors ``[N, E]``; the dot product of two is their similarity."""

    label: str
    encode: Callable[[Sequence[str]], Tensor]

    def table(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Encode each distinct text once; returns text → ``[E]``."""
        distinct = sorted(set(texts))
        return dict(zip(distinct, self.encode(distinct), strict=True)) if distinct else {}


def load_sentence_encoder(name: str, device: torch.device) -> SentenceEncoder:
    """Load a sentence-transformers model by name or folder.

    Raises:
        InputError: the folder is no sentence-transformers model, or the name cannot be had.
    """
    from sentence_transformers import SentenceTransformer

    try:
        with cached_without_network(name):
            model = SentenceTransformer(name, device=str(device), local_files_only=Path(name).is_dir())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"metrics.sentence_encoder: cannot load {name!r} ({_first_line(error)}); give a sentence-transformers "
            "folder, or `clip` for the text tower of the CLIP model in use"
        ) from error

    def encode(texts: Sequence[str]) -> Tensor:
        vectors_NE = model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return F.normalize(vectors_NE.float().cpu(), dim=-1)

    return SentenceEncoder(label=name, encode=encode)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
