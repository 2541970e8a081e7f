"""LLaMA's SentencePiece tokenizer with the token ids the published checkpoints were trained on.

MiniGPT-5 was trained with the slow legacy tokenizer of transformers 4.31. Newer releases split text around
added tokens and encode the pieces differently, so the same prompt gives other ids there. The rules kept here:

1. text is cut at added tokens, longest match first;
2. white space next to an added token is dropped on both sides (next to ``<s>``, ``</s>``, ``<unk>`` it stays);
3. each remaining piece is encoded by SentencePiece on its own, which puts a word-boundary mark before it.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from minigpt4.errors import InputError

MODEL_FILE = "tokenizer.model"


class LlamaTokenizer:
    """SentencePiece model plus added tokens, encoding as transformers 4.31's slow legacy tokenizer does.

    Padding uses the end-of-sequence token, as in MiniGPT-4.

    Args:
        model_file: ``tokenizer.model`` of a LLaMA folder.
        max_length: ids are cut to it; None does not cut.

    Raises:
        InputError: ``model_file`` is missing or is no SentencePiece model.
    """

    def __init__(self, model_file: Path, max_length: int | None = None) -> None:
        if not model_file.is_file():
            raise InputError(f"{model_file}: no SentencePiece model; a LLaMA folder holds {MODEL_FILE}")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{model_file}: not a SentencePiece model: {error}") from None
        self.base_size: int = self._pieces.get_piece_size()
        self.max_length = max_length
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.unk_id: int = self._pieces.unk_id()
        self.pad_id: int = self.eos_id
        self._added: dict[str, int] = {}
        # The control tokens are cut out of text like added ones, but keep their own ids.
        self._control = {
            self._pieces.id_to_piece(index): index for index in (self.bos_id, self.eos_id, self.unk_id)
        }
        self._compile()

    def __len__(self) -> int:
        return self.base_size + len(self._added)

    def add_tokens(self, tokens: Iterable[str]) -> list[int]:
        """Append ``tokens`` to the vocabulary and return their ids.

        Raises:
            InputError: the vocabulary already has one of them (the folder is not a plain LLaMA's).
        """
        tokens = list(tokens)
        known = [token for token in tokens if self.token_to_id(token) is not None]
        if known:
            raise InputError(f"the tokenizer already has {', '.join(known)}; give an unmodified LLaMA folder")
        for token in tokens:
            self._added[token] = len(self)
        self._compile()
        return [self._added[token] for token in tokens]

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a whole token, or None if the vocabulary lacks it."""
        if token in self._added:
            return self._added[token]
        index = self._pieces.piece_to_id(token)
        return None if index == self.unk_id and token != self._pieces.id_to_piece(index) else index

    def id_to_token(self, index: int) -> str:
        """Return the token with this id."""
        if index >= self.base_size:
            return list(self._added)[index - self.base_size]
        return str(self._pieces.id_to_piece(index))

    def encode(self, text: str, *, add_bos: bool = False, cut: bool = True) -> list[int]:
        """Return token ids; with ``cut``, on the right to ``max_length`` if that is set."""
        ids = [self.bos_id] if add_bos else []
        parts = self._splitter.split(text)
        specials = self._control | self._added
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(specials[part])
                continue
            if index > 0 and parts[index - 1] in self._added:
                part = part.lstrip()
            if index + 1 < len(parts) and parts[index + 1] in self._added:
                part = part.rstrip()
            if part:
                ids.extend(self._pieces.encode(part))
        return ids[: self.max_length] if cut else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ``ids``; added tokens are set off by spaces, as in transformers 4.31.

        Args:
            ids: token ids.
            skip_special: leave out control and added tokens.
        """
        groups: list[list[int]] = [[]]
        texts: list[str] = []
        for index in ids:
            special = index >= self.base_size or index in self._control.values()
            if skip_special and special:
                continue
            if index >= self.base_size:
                texts.append(self._decode_plain(groups[-1]))
                texts.append(self.id_to_token(index))
                groups.append([])
            else:
                groups[-1].append(index)
        texts.append(self._decode_plain(groups[-1]))
        return " ".join(text for text in texts if text)

    def _decode_plain(self, ids: Sequence[int]) -> str:
        """Decode base-vocabulary ids; a control token after text is set off by one space."""
        text, after_control = "", False
        pending: list[int] = []
        for position, index in enumerate(ids):
            if index in self._control.values():
                if position > 0 and not after_control:
                    text += " "
                text += self._pieces.decode(pending) + self._pieces.id_to_piece(index)
                pending, after_control = [], True
            else:
                pending.append(index)
                after_control = False
        return text + str(self._pieces.decode(pending))

    def _compile(self) -> None:
        tokens = sorted(self._control | self._added, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(re.escape(token) for token in tokens) + ")")
