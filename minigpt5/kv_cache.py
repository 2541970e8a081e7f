"""Keys and values of decoded positions, in buffers with room for the next ones.

transformers' ``DynamicCache`` copies everything it holds at every step; its ``StaticCache`` does not, but every
step then attends to all of the room, masked or not, which only a compiled step wants. Here a step writes its own
positions and attends to those that are filled.

Shapes: B prompts, A heads, T positions, D head width.
"""

import inspect

from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM = 64
_LEAST_FIXED_ROOM = 256
_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What LLaMA calls its cache: transformers is changing the name."""


class BufferedLayer(DynamicLayer):
    """One layer's keys and values, views of buffers ``[B, A, room, D]`` that double when they are full."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new positions ``[B, A, T, D]`` behind the held ones and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        keys, values = self._with_room(end, key_states)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _with_room(self, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._buffers is not None and self._buffers[0].shape[2] >= end:
            return self._buffers
        samples, heads, _, width = like.shape
        room = room_for(end)
        keys, values = (like.new_empty(samples, heads, room, width) for _ in range(2))
        held = self.get_seq_length()
        if held:
            keys[:, :, :held], values[:, :, :held] = self.keys, self.values
        self._buffers = keys, values
        return self._buffers


def room_for(positions: int) -> int:
    """Return the room of a new buffer that has to hold this many positions."""
    return max(2 * positions, _LEAST_ROOM)


def room_after(prompt: int, longest: int) -> int:
    """Return the room of the buffers once a prompt of this length was decoded to the longest length."""
    room = room_for(prompt)
    while room < longest:
        room = room_for(room + 1)
    return room


def fixed_room(positions: int) -> int:
    """Return the room of a cache whose shape stays: a power of two, so that few shapes are compiled."""
    return max(_LEAST_FIXED_ROOM, 1 << (positions - 1).bit_length())


def as_argument(cache: Cache) -> dict[str, Cache]:
    """Return the keyword argument that hands LLaMA its cache, whatever this transformers calls it."""
    return {_ARGUMENT: cache}


def new_cache(config: LlamaConfig) -> Cache:
    """Return an empty cache for a LLaMA."""
    return Cache(layers=[BufferedLayer() for _ in range(config.num_hidden_layers)])
