"""Train the tiny world's two tokenizers: LLaMA-like SentencePiece and CLIP-like byte-pair encoding."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from minigpt4.tokenizer import MODEL_FILE
from minigpt5 import prompts
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.dialogues import make_dialogue
from minigpt5.tinyworld.scenes import random_scene, seeded
from minigpt5.tinyworld.stories import make_story

LANGUAGE_VOCABULARY = 800
LANGUAGE_MAX_LENGTH = 1024
CLIP_LENGTH = 77
_CORPUS_RECORDS = 1500
_PRINTABLE = " ".join(map(chr, range(33, 127)))
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORD_END = "</w>"
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def world_texts(seed: int, records: int = _CORPUS_RECORDS) -> Iterator[str]:
    """Yield training captions, stories and dialogues as plain sentences."""
    for index in range(records):
        rng = seeded(seed, "train", "corpus", index)
        yield caption(random_scene(rng, "train", things=1 + index % 2), rng)
        yield from (step.text for step in make_story(seed, "train", index).steps)
        yield from (turn.text for turn in make_dialogue(seed, "train", index))


def prompt_texts(rng: Random) -> list[str]:
    """Return the published templates with tiny-world text in them, one text of each."""
    scene_text = caption(random_scene(rng, "train"), rng)
    texts = [prompts.cc3m_instruction(command, scene_text) for command in prompts.CC3M_GENERATION]
    templates = (*prompts.VIST_GENERATION, *prompts.VIST_MULTIMODAL, *prompts.VIST_UNDERSTANDING)
    history = prompts.story_history([scene_text])
    texts += [prompts.VIST_SYSTEM + text.format(prompt=history, step_text=scene_text) for text in templates]
    texts.append(prompts.dialogue_history([(scene_text, True), (scene_text, False)]))
    texts.append(f"{scene_text} {prompts.STOP}")
    return [text.replace(prompts.INPUT_PICTURE, "") for text in texts]


def train_language_tokenizer(folder: Path, seed: int, vocabulary: int = LANGUAGE_VOCABULARY) -> None:
    """Write ``tokenizer.model``, trained with LLaMA's options, and its configuration files."""
    texts = list(world_texts(seed))
    rng = seeded(seed, "train", "prompts")
    for _ in range(60):
        texts += prompt_texts(rng)
    texts += [_PRINTABLE] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", {key: _added(text) for key, text in special.items()})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            **{key: _added(text) | {"__type": "AddedToken"} for key, text in special.items()},
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": LANGUAGE_MAX_LENGTH,
            "pad_token": None,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )


def train_clip_tokenizer(folder: Path, seed: int) -> int:
    """Write ``vocab.json``, ``merges.txt`` and configuration files as Stable Diffusion 2.1 has them.

    Ids are laid out as in CLIP: bytes, bytes that end a word, merges, start, end; so ``!``, the padding, is 0.

    Returns:
        The number of tokens.
    """
    alphabet = _byte_characters()
    merges = _learn_merges(world_texts(seed), alphabet)
    tokens = [*alphabet, *(character + _CLIP_WORD_END for character in alphabet)]
    tokens += [first + second for first, second in merges]
    tokens += [_CLIP_START, _CLIP_END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start, end = _added(_CLIP_START), _added(_CLIP_END)
    special = {"bos_token": start, "eos_token": end, "pad_token": "!", "unk_token": end}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": start | {"__type": "AddedToken"},
            "do_lower_case": True,
            "eos_token": end | {"__type": "AddedToken"},
            "errors": "replace",
            "model_max_length": CLIP_LENGTH,
            "pad_token": _CLIP_END,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": end | {"__type": "AddedToken"},
        },
    )
    return len(tokens)


def _learn_merges(texts: Iterable[str], alphabet: list[str]) -> list[tuple[str, str]]:
    """Return the merges that make every word of the texts one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_CLIP_WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix=_CLIP_WORD_END
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]


def _byte_characters() -> list[str]:
    """Return GPT-2's printable stand-ins for the 256 bytes, in CLIP's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _added(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content} | flags


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
