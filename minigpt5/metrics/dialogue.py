"""MMDialog: per-response MM-Relevance, and the published figures averaged per conversation."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean

from torch import Tensor

from minigpt5.metrics.features import PictureFeatures
from minigpt5.metrics.relevance import conversation_f1, mm_relevance, split_elements
from minigpt5.metrics.scores import SampleValues, Score
from minigpt5.metrics.stories import split_id
from minigpt5.metrics.text import bleu_characters, published_text, rouge_l
from minigpt5.predictions import Prediction

DIALOGUE_NAMES = {
    "overall_bleu_score_1": "bleu_1_char",
    "overall_bleu_score_2": "bleu_2_char",
    "overall_rouge_l_score": "published_rouge_l",
    "overall_sbert_score": "published_sentence_similarity",
    "overall_clip_f1": "published_clip_f1",
}
"""Published name → ours, of the figures averaged over turns, then over conversations."""
_TEXT_SCORES = ("bleu_1_char", "bleu_2_char", "published_rouge_l", "published_sentence_similarity")
_KINDS = ("text", "image")

Turn = dict[str, float | str]
"""One turn's published values: similarities of ``text`` and ``image``, or ``"missing"``, or ``"extra"``."""


def element_texts(predictions: Iterable[Prediction]) -> set[str]:
    """Return every text that MM-Relevance and the published figures encode."""
    responses = [text for prediction in predictions for text in (prediction.text, prediction.target)]
    parts = chain.from_iterable(split_elements(text, ()) for text in responses)
    return ({words for _, words in parts} | {published_text(text) for text in responses}) - {""}


def relevance_values(
    predictions: Sequence[Prediction], features: PictureFeatures, texts: Mapping[str, Tensor]
) -> list[float | None]:
    """Return each response's MM-Relevance over its texts and pictures in order.

    Args:
        predictions: the responses.
        features: CLIP features of their pictures.
        texts: CLIP unit vectors of :func:`element_texts`.
    """

    def vectors(text: str, images: Sequence[str]) -> list[Tensor]:
        elements = split_elements(text, images)
        return [texts[value] if kind == "text" else features.row("clip", value) for kind, value in elements]

    return [
        mm_relevance(
            vectors(prediction.target, prediction.target_images), vectors(prediction.text, prediction.images)
        )
        for prediction in predictions
    ]


def published_turns(
    predictions: Sequence[Prediction],
    features: PictureFeatures,
    clip_texts: Mapping[str, Tensor],
    sentences: Mapping[str, Tensor],
) -> list[Turn]:
    """Return the values the published evaluation keeps of each prediction."""
    turns = []
    for prediction in predictions:
        made, wanted = published_text(prediction.text), published_text(prediction.target)
        turn: Turn = {}
        if made and wanted:
            scores = (
                *bleu_characters(made, wanted),
                rouge_l(made, wanted),
                float(sentences[made] @ sentences[wanted]),
            )
            turn |= dict(zip(_TEXT_SCORES, scores, strict=True))
            turn["text"] = float(clip_texts[made] @ clip_texts[wanted])
        elif wanted:
            turn |= dict.fromkeys(_TEXT_SCORES, 0.0)
            turn["text"] = "missing"
        elif made:
            turn["text"] = "extra"
        if prediction.images and prediction.target_images:
            pictures = [features.row("clip", names[0]) for names in (prediction.images, prediction.target_images)]
            turn["image"] = float(pictures[0] @ pictures[1])
        elif prediction.target_images:
            turn["image"] = "missing"
        elif prediction.images:
            turn["image"] = "extra"
        turns.append(turn)
    return turns


def published_sample_values(turn: Turn) -> SampleValues:
    """Return a turn's text scores as one prediction's values, None where they are not set."""
    values = {name: turn.get(name) for name in _TEXT_SCORES}
    return {name: value if isinstance(value, float) else None for name, value in values.items()}


def published_scores(predictions: Sequence[Prediction], turns: Sequence[Turn]) -> dict[str, Score]:
    """Return the published figures: means over the turns of a conversation, then over conversations.

    A turn that comes twice keeps the later values, and the earlier ones of what the later one lacks.
    """
    conversations: dict[str, dict[int, Turn]] = {}
    for prediction, turn in zip(predictions, turns, strict=True):
        conversation, step, _ = split_id(prediction.id)
        conversations.setdefault(conversation, {}).setdefault(step, {}).update(turn)
    groups = [list(steps.values()) for steps in conversations.values()]
    scores = {name: _conversation_mean(groups, name) for name in _TEXT_SCORES}
    f1 = [conversation_f1(turns_, _KINDS) for turns_ in groups]
    scores["published_clip_f1"] = Score(fmean(f1) if f1 else None, len(f1), len(groups), "conversations")
    return scores


def _conversation_mean(groups: Sequence[Sequence[Turn]], name: str) -> Score:
    values = [[value for turn in turns if isinstance(value := turn.get(name), float)] for turns in groups]
    means = [fmean(each) for each in values if each]
    return Score(fmean(means) if means else None, len(means), len(groups), "conversations")
