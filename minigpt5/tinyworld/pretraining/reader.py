"""Reads a scene from states by cross-attention, as a UNet does: states that can be read so can be drawn from.

Learned queries, one for each cell of the picture and one for the background, attend to the states.
Shapes: B scenes, S states of one, W their width, G cells (and the background), K values of an attribute.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.tinyworld.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene

_VALUES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}
_NOTHING = -100
_HEADS = 4


class SceneReader(nn.Module):
    """One layer of cross-attention that only training needs.

    Args:
        width: of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries_GW = nn.Parameter(torch.randn(len(POSITIONS) + 1, width))
        self.attention = nn.MultiheadAttention(width, _HEADS, batch_first=True)
        self.is_there = nn.Linear(width, 1)
        self.attributes = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in _VALUES.items()})
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, states_BSW: Tensor) -> dict[str, Tensor]:
        """Return logits: ``is_there [B, 9]``, each attribute ``[B, 9, K]``, ``background [B, K]``."""
        queries_BGW = self.queries_GW.expand(len(states_BSW), -1, -1)
        read_BGW = self.attention(queries_BGW, states_BSW, states_BSW, need_weights=False)[0]
        cells_BGW, ground_BW = read_BGW[:, :-1], read_BGW[:, -1]
        found = {name: head(cells_BGW) for name, head in self.attributes.items()}
        return found | {
            "is_there": self.is_there(cells_BGW)[..., 0],
            "background": self.background(ground_BW),
        }


class JointReader(nn.Module):
    """Reads a scene from one vector, by one matrix.

    Args:
        width: of the vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = {"is_there": 1, **{name: len(values) for name, values in _VALUES.items()}}
        self.cells = nn.Linear(width, len(POSITIONS) * sum(self.sizes.values()))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, joint_BW: Tensor) -> dict[str, Tensor]:
        """Return the logits that :class:`SceneReader` returns."""
        cells_BGK = self.cells(joint_BW).unflatten(1, (len(POSITIONS), -1))
        found = dict(zip(self.sizes, cells_BGK.split(list(self.sizes.values()), dim=-1), strict=True))
        return found | {"is_there": found["is_there"][..., 0], "background": self.background(joint_BW)}


def reading_loss(found: Mapping[str, Tensor], scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropies, and whether everything of a scene is read right, ``[B]``."""
    wanted = {name: value.to(found["background"].device) for name, value in targets(scenes).items()}
    is_there_BG = wanted.pop("is_there")
    loss = F.binary_cross_entropy_with_logits(found["is_there"], is_there_BG.float())
    right_B = ((found["is_there"] > 0) == is_there_BG).all(dim=1)
    for name, value in wanted.items():
        loss = loss + F.cross_entropy(found[name].flatten(0, -2), value.flatten(), ignore_index=_NOTHING)
        right = (found[name].argmax(dim=-1) == value) | (value == _NOTHING)
        right_B &= right.reshape(len(right), -1).all(dim=1)
    return loss, right_B


def targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Return whether each cell holds a thing, the thing's attributes, and the background.

    ``is_there [B, 9]``, each attribute ``[B, 9]`` (−100 where nothing is), ``background [B]``.
    """
    shape = (len(scenes), len(POSITIONS))
    wanted = {name: torch.full(shape, _NOTHING) for name in _VALUES}
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            for name, values in _VALUES.items():
                wanted[name][row, POSITIONS.index(thing.position)] = values.index(getattr(thing, name))
    background_B = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    return wanted | {"is_there": wanted["size"] != _NOTHING, "background": background_B}
