"""Five-picture stories: one event a step, told in one sentence; the rest persists from picture to picture.

In some stories the first sentence keeps quiet about what the first picture shows, so a later picture can only be
drawn from the earlier ones.
"""

from dataclasses import dataclass
from random import Random

from minigpt5.tinyworld.captions import SHAPE_WORDS, article, caption
from minigpt5.tinyworld.events import describe_event, random_event
from minigpt5.tinyworld.scenes import Scene, random_scene, seeded

STORY_LENGTH = 5
_MAX_TRIES = 1000


@dataclass(frozen=True)
class Step:
    """One sentence and the scene of its picture; ``event`` is None in the first step."""

    text: str
    scene: Scene
    event: str | None = None


@dataclass(frozen=True)
class Story:
    """:data:`STORY_LENGTH` steps. ``told`` says how much the first sentence tells: all, some or nothing."""

    steps: tuple[Step, ...]
    told: str


def make_story(seed: int, split: str, index: int) -> Story:
    """Return the story of this seed, split and index; every scene belongs to the split."""
    rng = seeded(seed, split, "story", index)
    for _ in range(_MAX_TRIES):
        first = random_scene(rng, split)
        told = rng.choice(("all", "all", "some", "nothing"))
        steps = [Step(_opening(first, told, rng), first)]
        while len(steps) < STORY_LENGTH:
            last = steps[-1]
            event = random_event(last.scene, split, rng, exclude=(last.event,) if last.event else ())
            if event is None:
                break
            steps.append(Step(describe_event(last.scene, event, rng), event.after, event.kind))
        else:
            return Story(tuple(steps), told)
    raise AssertionError(f"no story of split {split} found")


def _opening(scene: Scene, told: str, rng: Random) -> str:
    if told == "all":
        return caption(scene, rng)
    if told == "nothing":
        return rng.choice(("look at this .", "this is where it begins .", "here it is ."))
    shape = rng.choice(SHAPE_WORDS[scene.main.shape])
    thing = rng.choice((article(shape), article(f"{scene.main.colour} {shape}")))
    return rng.choice(("this is {} .", "this story is about {} .", "once there was {} .")).format(thing)
