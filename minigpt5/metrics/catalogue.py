"""What each score means, for the report and ``results.json``; docs/metrics.md has the formulas."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Meaning:
    """One score, explained in a line."""

    title: str
    better: Literal["higher", "lower"]
    text: str
    network: str | None = None
    """Key of ``Scores.networks``: what its features come from."""
    is_published: bool = False
    """Whether the published code's figure, kept for comparison."""


_BASELINE = "baseline_"

_MEANINGS = {
    "clip_similarity": Meaning(
        "CLIP image similarity", "higher", "cosine of generated and wanted picture, -1 to 1", "clip"
    ),
    "clip_text_similarity": Meaning(
        "CLIP text similarity",
        "higher",
        "cosine of generated picture and caption or wanted text, -1 to 1",
        "clip",
    ),
    "fid": Meaning("FID", "lower", "distance between all generated and all real pictures, 0 at best", "fid"),
    "inception_score": Meaning(
        "Inception Score", "higher", "how clear and how varied the pictures are, from 1 upwards", "inception"
    ),
    "bleu_1": Meaning("BLEU-1", "higher", "shared words, 0 to 1"),
    "bleu_2": Meaning("BLEU-2", "higher", "shared words and word pairs, 0 to 1"),
    "rouge_l": Meaning("ROUGE-L", "higher", "longest common word sequences (F1), 0 to 1"),
    "meteor": Meaning("METEOR", "higher", "aligned words with their order, 0 to 1", "meteor"),
    "sentence_similarity": Meaning(
        "Sentence similarity", "higher", "cosine of the sentence vectors, -1 to 1", "sentence_encoder"
    ),
    "mm_relevance": Meaning(
        "MM-Relevance", "higher", "soft F1 of texts and pictures in order, per response (MMDialog paper)", "clip"
    ),
    "published_inception_score": Meaning(
        "Inception Score, published",
        "higher",
        "mean over ten shuffled parts; depends on order and seed",
        "inception",
    ),
    "published_story_fid": Meaning(
        "FID per story, published",
        "lower",
        "FID within each story of about five pictures, averaged",
        "fid",
    ),
    "published_rouge_l": Meaning(
        "ROUGE-L, published",
        "higher",
        "text before the first picture, per conversation",
    ),
    "published_sentence_similarity": Meaning(
        "Sentence similarity, published",
        "higher",
        "text before the first picture, per conversation",
        "sentence_encoder",
    ),
    "published_clip_f1": Meaning(
        "MM-Relevance, published", "higher", "soft F1 over all turns of a conversation, averaged", "clip"
    ),
    "bleu_1_char": Meaning("BLEU-1 on characters", "higher", "the published figure: shared characters, 0 to 1"),
    "bleu_2_char": Meaning(
        "BLEU-2 on characters",
        "higher",
        "the published figure: shared character pairs, 0 to 1",
    ),
}


def explain(name: str) -> Meaning:
    """Return what a score means; ``baseline_`` scores are those of Stable Diffusion's picture of the caption."""
    base = name.replace(_BASELINE, "", 1)
    meaning = _MEANINGS[base]
    meaning = replace(meaning, is_published=name.startswith("published_") or name.endswith("_char"))
    if base == name:
        return meaning
    text = f"Stable Diffusion's own picture: {meaning.text}"
    return replace(meaning, title=f"{meaning.title}, baseline", text=text)
