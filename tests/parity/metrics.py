"""Compare the production suites with figures computed by the published evaluation."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from minigpt5.config import MetricsConfig
from minigpt5.metrics.features import Networks
from minigpt5.metrics.image import encode_files
from minigpt5.metrics.scores import Scores, column
from minigpt5.metrics.suites import score
from minigpt5.metrics.text import bleu_characters, rouge_l
from minigpt5.predictions import Prediction, PredictionStore
from tests.parity.rows import Row, compare_exact, compare_tensor

DATASETS = ("cc3m", "vist", "mmdialog")
_SCORE_TOLERANCE = 1e-4
_TEXT_TOLERANCE = 1e-6
_FEATURE_TOLERANCE = 1e-5
_ENCODER_WIDTH = 64


def compare_metrics(folder: Path) -> list[Row]:
    """Score the fixture's predictions and compare; ``folder`` is the fixture's ``metrics`` folder."""
    rows = _compare_text_pairs(folder)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        config = fixture_config(folder, work)
        for dataset in DATASETS:
            rows += _compare_dataset(folder / dataset, dataset, config, work)
    return rows


def fixture_config(folder: Path, work: Path) -> MetricsConfig:
    """Return the fixture's networks as a user's settings; the sentence encoder is written to ``work``."""
    encoder = work / "sentence_encoder"
    if not encoder.is_dir():
        _write_sentence_encoder(encoder, _all_words(folder))
    return MetricsConfig(
        clip_model=str(folder / "models" / "clip_tiny"),
        fid_network=str(folder / "models" / "fid_features.safetensors"),
        inception_network=str(folder / "models" / "is_features.safetensors"),
        sentence_encoder=str(encoder),
        device="cpu",
    )


def read_fixture(folder: Path, dataset: str) -> list[Prediction]:
    """Return the fixture's predictions with picture names relative to ``folder``; ids may repeat there."""
    records = [
        json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        Prediction(
            id=record["task_name"],
            dataset=dataset,
            task="generation",
            prompt=record["input_utterance"],
            text=record["pred_out"],
            target=record["gt_out"],
            images=(record["pred_image"],) if record["pred_image"] else (),
            target_images=(record["gt_image"],) if record["gt_image"] else (),
            baseline_image=record["nl_image"],
        )
        for record in records
    ]


def write_store(folder: Path, dataset: str, target: Path) -> None:
    """Write the fixture's predictions into a prediction store, as the prediction run does."""
    store = PredictionStore(target, {"dataset": dataset})
    for prediction in read_fixture(folder, dataset):
        if prediction.id in store.done:
            continue
        baseline = prediction.baseline_image
        store.append(
            prediction,
            images=[Image.open(folder / name) for name in prediction.images],
            target_images=[Image.open(folder / name) for name in prediction.target_images],
            baseline_image=Image.open(folder / baseline) if baseline else None,
        )


def real_folder(folder: Path, work: Path) -> Path:
    """Return a CC3M folder with the fixture's real pictures under the ``.jpg`` names the published code globs."""
    target = work / "CC3M"
    for source in sorted((folder / "real").glob("val/*/*.png")):
        copy = target / source.relative_to(folder / "real").with_suffix(".jpg")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    return target


def _compare_numbers(group: str, name: str, ours: Any, reference: Any, tolerance: float) -> Row:
    numbers = [torch.as_tensor(value, dtype=torch.float64) for value in (ours, reference)]
    return compare_tensor(group, name, *numbers, tolerance)


def _compare_dataset(folder: Path, dataset: str, config: MetricsConfig, work: Path) -> list[Row]:
    real = real_folder(folder, work) if dataset == "cc3m" else work / "none"
    scores = score(dataset, read_fixture(folder, dataset), folder, config, real)
    reference = json.loads((folder / "results_dict.json").read_text(encoding="utf-8"))
    group = f"metrics/{dataset}"
    rows = [compare_exact(group, "published names", sorted(scores.published), sorted(reference))]
    for name, value in reference.items():
        ours = scores.published[name]
        rows.append(_compare_numbers(group, name, float("nan") if ours is None else ours, value, _SCORE_TOLERANCE))
    details = json.loads((folder / "details.json").read_text(encoding="utf-8"))
    return rows + _compare_details(group, scores, details) + _compare_features(group, folder, dataset, config)


def _compare_details(group: str, scores: Scores, details: dict[str, Any]) -> list[Row]:
    columns = {
        "clip_similarities": "published_clip_similarity",
        "clip_t_similarities": "published_clip_text_similarity",
        "basline_clip_similarities": "published_baseline_clip_similarity",
        "basline_clip_t_similarities": "published_baseline_clip_text_similarity",
    }
    rows = []
    for name, own in columns.items():
        if details.get(name):
            ours = [value for value in column(scores.samples, own) if value is not None]
            rows.append(_compare_numbers(group, f"samples {name}", ours, details[name], _SCORE_TOLERANCE))
    for name, own in (("pred", "inception_score"), ("nl", "baseline_inception_score")):
        reference = details.get(f"{name}_is_one_split")
        if reference is not None:
            ours_score = scores.scores[own]
            rows.append(_compare_numbers(group, own, ours_score.value, reference, _SCORE_TOLERANCE))
            rows.append(compare_exact(group, f"{own} count", ours_score.count, details[f"{name}_is_num_images"]))
    if "mmdialog" in group:
        rows += _compare_turns(group, scores, details["task_dicts"])
    return rows


def _compare_turns(group: str, scores: Scores, conversations: dict[str, Any]) -> list[Row]:
    """Compare the text scores of all turns, sorted: the published record has lost the predictions' order."""
    names = {
        "bleu_score_1": "bleu_1_char",
        "bleu_score_2": "bleu_2_char",
        "rouge_l_score": "published_rouge_l",
        "sbert_score": "published_sentence_similarity",
    }
    turns = [turn for conversation in conversations.values() for turn in conversation.values()]
    rows = []
    for name, own in names.items():
        reference = sorted(turn[name] for turn in turns if name in turn)
        ours = sorted(value for value in column(scores.samples, own) if value is not None)
        # One turn occurs twice and the second overwrites the first, so the published record may be shorter.
        missing = [min((abs(value - other) for other in ours), default=1.0) for value in reference]
        rows.append(_compare_numbers(group, f"turns {name}", missing, [0.0] * len(missing), _TEXT_TOLERANCE))
    return rows


def _compare_features(group: str, folder: Path, dataset: str, config: MetricsConfig) -> list[Row]:
    reference = load_file(folder / "features.safetensors")
    networks = Networks(config, default_clip="ViT-L-14")
    encoders = {"clip": networks.clip.pictures, "fid": networks.fid, "is_logits": networks.inception}
    rows = []
    for kind, encoder in encoders.items():
        keys = sorted(key for key in reference if key.split(".")[-1] == kind)
        paths = [folder / "images" / ("_".join(key.split(".")[:2]) + ".png") for key in keys]
        ours = encode_files(paths, encoder)
        expected = torch.stack([reference[key] for key in keys])
        rows.append(_compare_numbers(group, f"features {kind}", ours, expected, _FEATURE_TOLERANCE))
    keys = sorted(key for key in reference if key.endswith("gt_out.clip_text"))
    if keys and dataset != "mmdialog":
        targets = [prediction.target for prediction in read_fixture(folder, dataset)]
        texts = networks.clip.texts.encode([targets[int(key.split(".")[0])] for key in keys])
        expected = torch.stack([reference[key] for key in keys])
        rows.append(_compare_numbers(group, "features clip_text", texts, expected, _FEATURE_TOLERANCE))
    return rows


def _compare_text_pairs(folder: Path) -> list[Row]:
    pairs = json.loads((folder / "text_pairs.json").read_text(encoding="utf-8"))["direct"]
    bleus = [bleu_characters(pair["pred"], pair["ref"]) for pair in pairs]
    scored = [pair for pair in pairs if "rouge_l_f" in pair]
    rouge = [rouge_l(pair["pred"], pair["ref"]) for pair in scored]
    group = "metrics/text_pairs"
    return [
        _compare_numbers(
            group, "bleu_1", [first for first, _ in bleus], [p["bleu_1"] for p in pairs], _TEXT_TOLERANCE
        ),
        _compare_numbers(
            group, "bleu_2", [second for _, second in bleus], [p["bleu_2"] for p in pairs], _TEXT_TOLERANCE
        ),
        _compare_numbers(group, "rouge_l", rouge, [pair["rouge_l_f"] for pair in scored], _TEXT_TOLERANCE),
    ]


def _all_words(folder: Path) -> list[str]:
    words: set[str] = set()
    for dataset in DATASETS:
        for prediction in read_fixture(folder / dataset, dataset):
            for text in (prediction.text, prediction.target):
                # Voken text and the stop string stand next to words without a space before they are removed.
                for part in text.replace("###", " ").replace("[", " [").replace("]", "] ").split():
                    words.add(part.lower())
                words |= set(text.replace("###", "").lower().split())
    return sorted(words)


def _write_sentence_encoder(folder: Path, words: list[str]) -> None:
    """Write the fixture's hashed bag of words as a real sentence-transformers model.

    ``models/features.json`` gives the rule: each word adds +1 or -1 to one of 64 places, by its SHA-256. A mean of
    such rows points the same way as their sum.
    """
    from hashlib import sha256

    weights = torch.zeros(len(words) + 1, _ENCODER_WIDTH)
    for index, word in enumerate(words, start=1):
        digest = sha256(word.encode()).digest()
        weights[index, int.from_bytes(digest[:4], "big") % _ENCODER_WIDTH] = 1.0 if digest[4] % 2 == 0 else -1.0
    vocabulary = {"[UNK]": 0} | {word: index for index, word in enumerate(words, start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    embedding = StaticEmbedding(tokenizer, embedding_weights=weights.numpy())
    SentenceTransformer(modules=[embedding], device="cpu").save(str(folder))
