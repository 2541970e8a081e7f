"""A step of decoding: the language model reads positions behind those that it has read.

Shapes: B prompts, T prompt positions, P prefix positions, W positions of a step, R room of a cache, H language
width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from minigpt5.adapters import Prefix
from minigpt5.compilation import allow_many_graphs
from minigpt5.kv_cache import as_argument, fixed_room, new_cache


class DecodingSteps(ABC):
    """Reads a batch of prompts and then, step by step, what follows them.

    Args:
        language_model: LLaMA; only its decoder stack is called.
        prefix: trained keys and values in front of every prompt, also of its padding.
    """

    def __init__(self, language_model: LlamaForCausalLM, prefix: Prefix | None = None) -> None:
        self._model, self._prefix = language_model.model, prefix

    def _run(self, hidden_BWH: Tensor, mask: Tensor, positions_BW: Tensor, cache: Cache) -> Tensor:
        """Run the decoder stack; returns its last hidden states."""
        return self._model(
            inputs_embeds=hidden_BWH,
            attention_mask=mask,
            position_ids=positions_BW,
            **as_argument(cache),
            use_cache=True,
        ).last_hidden_state

    def _run_as_it_is(self, *inputs: Any) -> Tensor:
        """Run it without graphs, those of ``training.compile`` too: each length would add one to them."""
        with torch.compiler.set_stance("force_eager"):
            return self._run(*inputs)

    @abstractmethod
    def begin(self, hidden_BTH: Tensor, mask_BT: Tensor, new_positions: int) -> Tensor:
        """Read prompts.

        Args:
            hidden_BTH: their embeddings, padded on the left.
            mask_BT: 0 at padding.
            new_positions: how many positions are expected to follow; more may.

        Returns:
            Their last hidden states ``[B, T, H]``; those of padding mean nothing.
        """

    @abstractmethod
    def go_on(self, hidden_BWH: Tensor) -> Tensor:
        """Read W more positions of every prompt; returns their last hidden states ``[B, W, H]``."""


class GrowingSteps(DecodingSteps):
    """Attends to what has been read and to nothing else; needs no preparation."""

    def begin(self, hidden_BTH: Tensor, mask_BT: Tensor, new_positions: int) -> Tensor:
        """Read prompts; see the base class."""
        self._cache = new_cache(self._model.config)
        if self._prefix is not None:
            self._prefix.fill(self._cache, len(hidden_BTH), hidden_BTH.dtype)
        self._ahead = self._cache.get_seq_length()
        self._mask_BX = F.pad(mask_BT, (self._ahead, 0), value=1)
        return self._read(hidden_BTH)

    def go_on(self, hidden_BWH: Tensor) -> Tensor:
        """Read W more positions; see the base class."""
        self._mask_BX = F.pad(self._mask_BX, (0, hidden_BWH.shape[1]), value=1)
        return self._read(hidden_BWH)

    def _read(self, hidden_BWH: Tensor) -> Tensor:
        positions_BX = (self._mask_BX.cumsum(1) - self._ahead - 1).clamp(min=0)
        return self._run_as_it_is(hidden_BWH, self._mask_BX, positions_BX[:, -hidden_BWH.shape[1] :], self._cache)


class CompiledSteps(DecodingSteps):
    """Steps of one position run as one compiled graph, on a GPU as one launch (``torch.compile``, CUDA graphs).

    For that, all shapes and addresses stay what they are: a step attends to the whole room of its cache, masked
    where nothing has been read, and a cache serves every further batch of its size. There is one graph for each
    batch size and room; a room that gets full is doubled, and none shrinks. Prompts and steps of several positions
    run as they are.

    Args:
        backend: what compiles instead of torch's own compiler.
    """

    def __init__(
        self,
        language_model: LlamaForCausalLM,
        prefix: Prefix | None = None,
        backend: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(language_model, prefix)
        allow_many_graphs()
        how = {"mode": "reduce-overhead"} if backend is None else {"backend": backend}
        self._compiled: Callable[..., Tensor] = torch.compile(self._run, dynamic=False, **how)
        self._cache: StaticCache | None = None
        self._kind: tuple[object, ...] = ()
        self._room = self._held = 0

    def begin(self, hidden_BTH: Tensor, mask_BT: Tensor, new_positions: int) -> Tensor:
        """Read prompts; see the base class."""
        samples, length = mask_BT.shape
        self._held = 0 if self._prefix is None else self._prefix.keys_KAPD.shape[2]
        self._cache = self._empty_cache(hidden_BTH, fixed_room(self._held + length + new_positions))
        if self._prefix is not None:
            self._prefix.fill(self._cache, samples, hidden_BTH.dtype)
        seen_BX = F.pad(mask_BT.bool(), (self._held, 0), value=True)
        self._seen_BR = F.pad(seen_BX, (0, self._room - seen_BX.shape[1]), value=True)
        self._next_B1 = mask_BT.sum(1, keepdim=True)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        return self._run_as_it_is(*self._inputs(hidden_BTH, positions_BT), self._cache)

    def go_on(self, hidden_BWH: Tensor) -> Tensor:
        """Read W more positions; see the base class."""
        width = hidden_BWH.shape[1]
        if self._held + width > self._room:
            self._grow(hidden_BWH)
        positions_BW = self._next_B1 + torch.arange(width, device=hidden_BWH.device)
        self._next_B1 = self._next_B1 + width
        inputs = self._inputs(hidden_BWH, positions_BW)
        if width > 1:
            return self._run_as_it_is(*inputs, self._cache)
        torch.compiler.cudagraph_mark_step_begin()
        # The next step of a CUDA graph writes over the output of this one.
        return self._compiled(*inputs, self._cache).clone()

    def _inputs(self, hidden_BWH: Tensor, positions_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a step's inputs with its additive mask, and count its positions as held."""
        width, device = hidden_BWH.shape[1], hidden_BWH.device
        ends_W1 = self._held + torch.arange(width, device=device)[:, None]
        past_WR = torch.arange(self._room, device=device) <= ends_W1
        seen_BWR = self._seen_BR[:, None] & past_WR
        mask_BWR = torch.zeros(seen_BWR.shape, dtype=hidden_BWH.dtype, device=device)
        mask_BWR = mask_BWR.masked_fill(~seen_BWR, torch.finfo(hidden_BWH.dtype).min)
        self._held += width
        return hidden_BWH, mask_BWR[:, None], positions_BW

    def _empty_cache(self, like_BTH: Tensor, room: int) -> StaticCache:
        """Return a cache of this room at least: the last batch's, if it serves."""
        device = like_BTH.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        kind = (len(like_BTH), like_BTH.dtype, device, autocast, torch.is_inference_mode_enabled())
        if self._cache is not None and kind == self._kind and room <= self._room:
            self._cache.reset()
            return self._cache
        self._cache = None  # its memory is free before the new one takes some
        self._kind, self._room = kind, room
        return StaticCache(config=self._model.config, max_cache_len=room)

    def _grow(self, like_BWH: Tensor) -> None:
        """Move what is held into a cache of twice the room."""
        assert self._cache is not None, "positions are read before a prompt"
        held = [(layer.keys[:, :, : self._held], layer.values[:, :, : self._held]) for layer in self._cache.layers]
        self._seen_BR = F.pad(self._seen_BR, (0, self._room), value=True)
        self._cache = self._empty_cache(like_BWH, 2 * self._room)
        for layer, (keys, values) in enumerate(held):
            self._cache.update(keys, values, layer)
