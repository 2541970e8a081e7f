"""Conversations of two speakers about pictures, with pictures from both.

The published prompts keep about one exchange (two turns) of history, so each exchange here needs no more than the
exchange before it: a question or a change refers to a picture of the last exchange or of its own. Whether a turn
shows a picture, and which, follows from the turns before it; only the first turn shows one of its own accord.
Changes are asked of pictures of one thing only: to tell two apart by their words, and to change just one, is more
than so small a language model learns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from minigpt5.tinyworld.captions import (
    BACKGROUND_PHRASES,
    POSITION_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
    article,
    noun_phrase,
)
from minigpt5.tinyworld.events import Event, random_event
from minigpt5.tinyworld.scenes import COLOURS, SHAPES, Scene, random_scene, seeded

MAX_TURN_WORDS = 20
"""The published reader ends a training conversation at the first longer turn."""
_WISH_SHARE = 0.25
"""Answers that end with a wish, which the next turn fulfils."""
_QUESTION_SHARE = 0.33
_REQUESTS = ("can you show me {} ?", "please draw {} .", "i would like to see {} .", "show me {} .")
_HANDOVERS = ("here it is .", "here you are .", "sure .", "of course .", "like this ?")
_SHOWING = ("look at this .", "this is my picture .", "see what i have .", "here is a picture .")
_BEHIND = {
    "sky": "the day sky",
    "night": "the night sky",
    "grass": "the grass",
    "sand": "the sand",
    "snow": "the snow",
}


@dataclass(frozen=True)
class Turn:
    """What one speaker says, and the scene of the picture they show, if any."""

    text: str
    scene: Scene | None = None


@dataclass(frozen=True)
class Exchange:
    """A turn and its answer, and the scene that the next exchange may refer to."""

    turns: tuple[Turn, Turn]
    visible: Scene | None

    def with_wish(self, wish: str) -> "Exchange":
        """Return the exchange with a wish at the end of its answer."""
        turn, answer = self.turns
        return replace(self, turns=(turn, replace(answer, text=f"{answer.text} {wish}")))


def make_dialogue(seed: int, split: str, index: int) -> tuple[Turn, ...]:
    """Return four to eight turns, alternating speakers; every pictured scene belongs to the split."""
    rng = seeded(seed, split, "dialogue", index)
    exchanges = [rng.choice(_OPENINGS)(split, rng)]
    for _ in range(rng.randint(1, 3)):
        visible = exchanges[-1].visible
        if visible and len(visible.things) == 1 and rng.random() < _WISH_SHARE:
            exchanges[-1:] = _wish(exchanges[-1], visible, split, rng)
        else:
            following = _continue(visible, split, rng) if visible else None
            exchanges.append(following or _request_picture(split, rng))
    return tuple(turn for exchange in exchanges for turn in exchange.turns)


def _wish(exchange: Exchange, visible: Scene, split: str, rng: Random) -> list[Exchange]:
    """Return the exchange with a wish at its end and the one that fulfils it, or the exchange alone."""
    event = random_event(visible, split, rng)
    if event is None:
        return [exchange]
    wishing = exchange.with_wish(_request_change(event, rng))
    if len(wishing.turns[1].text.split()) > MAX_TURN_WORDS:
        return [exchange]
    fulfilled = Turn(rng.choice(_HANDOVERS), event.after)
    return [wishing, Exchange((fulfilled, Turn(_praise(event.after, rng))), event.after)]


def _continue(visible: Scene, split: str, rng: Random) -> Exchange | None:
    if len(visible.things) == 2 or rng.random() < _QUESTION_SHARE:
        question, answer = ask(visible, rng)
        return Exchange((Turn(question), Turn(answer)), None)
    event = random_event(visible, split, rng)
    if event is None:
        return None
    turns = Turn(_request_change(event, rng)), Turn(rng.choice(_HANDOVERS), event.after)
    return Exchange(turns, event.after)


def _request_picture(split: str, rng: Random) -> Exchange:
    scene = random_scene(rng, split)
    wish = " ".join(
        (
            noun_phrase(scene.main, rng),
            rng.choice(POSITION_PHRASES[scene.main.position]),
            rng.choice(BACKGROUND_PHRASES[scene.background]),
        )
    )
    return Exchange((Turn(rng.choice(_REQUESTS).format(wish)), Turn(rng.choice(_HANDOVERS), scene)), scene)


def _show_picture(split: str, rng: Random) -> Exchange:
    scene = random_scene(rng, split, things=rng.choice((1, 1, 2)))
    return Exchange((Turn(rng.choice(_SHOWING), scene), Turn(_praise(scene, rng))), scene)


def _show_and_ask(split: str, rng: Random) -> Exchange:
    scene = random_scene(rng, split, things=rng.choice((1, 1, 2)))
    question, answer = ask(scene, rng)
    return Exchange((Turn(f"{rng.choice(_SHOWING)} {question}", scene), Turn(answer)), scene)


def _show_and_change(split: str, rng: Random) -> Exchange:
    scene = random_scene(rng, split)
    event = random_event(scene, split, rng)
    while event is None:
        scene = random_scene(rng, split)
        event = random_event(scene, split, rng)
    request = _request_change(event, rng)
    answer = Turn(rng.choice(_HANDOVERS), event.after)
    return Exchange((Turn(f"{rng.choice(_SHOWING)} {request}", scene), answer), event.after)


_OPENINGS: tuple[Callable[[str, Random], Exchange], ...] = (
    _request_picture,
    _show_picture,
    _show_and_ask,
    _show_and_change,
)


def ask(scene: Scene, rng: Random) -> tuple[str, str]:
    """Return a question about a picture and its answer.

    Where two things are shown the question names the main thing's colour and shape, or counts.
    """
    main = scene.main
    if len(scene.things) == 2 and rng.random() < 0.5:
        other = scene.things[1]
        both = f"{article(f'{main.colour} {main.shape}')} and {article(f'{other.colour} {other.shape}')}"
        return rng.choice(
            (
                ("how many things do you see ?", "two ."),
                ("what do you see ?", f"i see {both} ."),
            )
        )
    it = mention(scene)
    guess_colour, guess_shape = rng.choice((main.colour, rng.choice(COLOURS))), rng.choice(SHAPES)
    shape = rng.choice(SHAPE_WORDS[main.shape])
    questions = [
        (f"what colour is {it} ?", f"it is {main.colour} ."),
        (f"where is {it} ?", f"it is {rng.choice(POSITION_PHRASES[main.position])} ."),
        (f"is {it} big or small ?", f"it is {rng.choice(SIZE_WORDS[main.size])} ."),
        (f"is {it} {guess_colour} ?", _confirm(guess_colour == main.colour, main.colour)),
        (f"what is behind {it} ?", f"{_BEHIND[scene.background]} ."),
    ]
    if len(scene.things) == 1:
        questions += [
            ("what is it ?", f"it is {noun_phrase(main, rng)} ."),
            (f"is it {article(guess_shape)} ?", _confirm(guess_shape == main.shape, article(shape))),
            ("how many things do you see ?", "one ."),
        ]
    return rng.choice(questions)


def mention(scene: Scene) -> str:
    """Return how the main thing is called: "it", or by its shape where another thing is shown too."""
    return "it" if len(scene.things) == 1 else f"the {scene.main.shape}"


def _confirm(agrees: bool, value: str) -> str:
    return f"yes , it is {value} ." if agrees else f"no , it is {value} ."


def _praise(scene: Scene, rng: Random) -> str:
    main = scene.main
    shape = rng.choice(SHAPE_WORDS[main.shape])
    return rng.choice(
        (
            f"what a nice {main.colour} {shape} !",
            f"i like your {main.colour} {shape} .",
            f"i see {noun_phrase(main, rng)} .",
            f"that is {article(f'{main.colour} {shape}')} {rng.choice(BACKGROUND_PHRASES[scene.background])} .",
        )
    )


def _request_change(event: Event, rng: Random) -> str:
    """Return a wish for what happens to one thing."""
    main = event.after.main
    if event.kind == "move":
        return rng.choice((f"can you move it to the {main.position} ?", f"now move it to the {main.position} ."))
    if event.kind == "resize":
        size = rng.choice(SIZE_WORDS[main.size])
        return rng.choice((f"can you make it {size} ?", f"now make it {size} ."))
    if event.kind == "recolour":
        colour = main.colour
        wishes = (f"can you make it {colour} ?", f"now make it {colour} .", f"what if it were {colour} ?")
        return rng.choice(wishes)
    if event.kind == "meet":
        other = event.after.things[1]
        thing, place = noun_phrase(other, rng), rng.choice(POSITION_PHRASES[other.position])
        return rng.choice((f"can you add {thing} {place} ?", f"now add {thing} {place} ."))
    background = event.after.background
    if background in ("sky", "night"):
        return f"can you make it {'day' if background == 'sky' else 'night'} ?"
    ground = rng.choice(BACKGROUND_PHRASES[background])
    return rng.choice((f"can you put it {ground} ?", f"now show it {ground} ."))
