"""One page over several data sets' tiny-world predictions: shares with their floors, and replies to look at."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

from minigpt5 import prompts
from minigpt5.data.types import INPUT_PICTURE
from minigpt5.metrics.relevance import show_vokens
from minigpt5.metrics.report import REPORT_FILE
from minigpt5.predictions import Prediction, read_predictions
from minigpt5.tinyworld.quality import MEANINGS, Share

SHOWN = 12
"""Replies of a data set on the page, spread over its tasks."""
"""Decoded replies begin with it, as published."""
_TITLES = {
    "cc3m": "Captions to pictures (CC3M-like, stage 1)",
    "vist": "Stories that go on in words and pictures (VIST-like, stage 2)",
    "mmdialog": "Conversations with pictures (MMDialog-like, stage 2)",
}
_STYLE = """
:root { --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --tint: #f7f8fa; --accent: #3b5bdb; --good: #2b8a3e;
  --bad: #c92a2a; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: var(--ink); background: var(--tint); }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0; } h2 { font-size: 20px; margin: 44px 0 12px; }
.soft { color: var(--soft); } a { color: var(--accent); }
.shares { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 10px 18px; }
.share { display: grid; grid-template-columns: 1fr 260px 64px 150px; gap: 14px; align-items: center;
  padding: 5px 0; }
.bar { position: relative; height: 10px; background: var(--line); border-radius: 5px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); border-radius: 5px; }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
.share strong { text-align: right; font-variant-numeric: tabular-nums; }
.met { color: var(--good); } .missed { color: var(--bad); }
.replies { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 14px;
  margin-top: 14px; }
article { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.prompt { font-size: 13px; color: var(--soft); max-height: 190px; overflow-y: auto; margin: 0 0 10px; }
.prompt img { width: 40px; height: 40px; vertical-align: middle; border-radius: 4px; margin: 1px 3px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.pair h4 { margin: 0 0 4px; font-size: 12px; text-transform: uppercase; color: var(--soft); }
.pair p { margin: 0 0 6px; } .pair img { width: 100%; max-width: 150px; border-radius: 8px; display: block;
  image-rendering: pixelated; }
@media (max-width: 720px) { .share { grid-template-columns: 1fr 64px; }
  .bar, .share span:last-child { display: none; } }
"""


@dataclass(frozen=True)
class Section:
    """One data set's predictions and how good they are."""

    folder: Path
    predictions: Sequence[Prediction]
    shares: Sequence[Share]


def write_overview(path: Path, scored: Mapping[Path, Sequence[Share]]) -> None:
    """Write the page; pictures and reports are linked relative to it.

    Args:
        path: HTML file to write.
        scored: prediction store over tiny-world data → its shares
            (:func:`~minigpt5.tinyworld.quality.score_folder`).
    """
    sections = [Section(folder, read_predictions(folder), shares) for folder, shares in scored.items()]
    body = "".join(_section(section, path.parent) for section in sections)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MiniGPT-5 on the tiny world</title><style>{_STYLE}</style></head><body><main>"
        "<h1>MiniGPT-5 on the tiny world</h1>"
        '<p class="soft">Everything below was answered on held-out combinations of shape, colour, size, position '
        "and background. What a picture shows is read back by image processing; the black mark is the share that "
        f"must be reached.</p>{body}</main></body></html>\n",
        encoding="utf-8",
    )


def spread(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return the first predictions of each task, as equally as there are, ``count`` in all."""
    tasks: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        tasks.setdefault(prediction.task, []).append(prediction)
    chosen: list[Prediction] = []
    for rank in range(max(map(len, tasks.values()), default=0)):
        chosen += [of_task[rank] for of_task in tasks.values() if rank < len(of_task)]
    return chosen[:count]


def _section(section: Section, page: Path) -> str:
    dataset = section.predictions[0].dataset
    title = escape(_TITLES.get(dataset, dataset))
    report = section.folder / REPORT_FILE
    link = f'<a href="{_link(report, page)}">all scores and replies</a>' if report.is_file() else ""
    rows = "".join(_share(share) for share in section.shares)
    replies = "".join(_reply(one, section.folder, page) for one in spread(section.predictions, SHOWN))
    return (
        f'<h2>{title}</h2><p class="soft">{len(section.predictions)} replies. {link}</p>'
        f'<div class="shares">{rows}</div><div class="replies">{replies}</div>'
    )


def _share(share: Share) -> str:
    mark, verdict = "", ""
    if not share.total:
        return f'<div class="share"><span>{escape(MEANINGS[share.name])}</span><i>nothing to measure</i></div>'
    if share.floor is not None:
        mark = f'<b style="left:{share.floor:.1%}"></b>'
        kind, word = ("met", "reached") if share.met else ("missed", "not reached")
        verdict = f'<span class="{kind}">{share.floor:.0%} {word}</span>'
    return (
        f'<div class="share"><span>{escape(MEANINGS[share.name])} '
        f'<span class="soft">({share.right} of {share.total})</span></span>'
        f'<div class="bar"><i style="width:{share.value:.1%}"></i>{mark}</div>'
        f"<strong>{share.value:.1%}</strong>{verdict or '<span></span>'}</div>"
    )


def _reply(prediction: Prediction, folder: Path, page: Path) -> str:
    sides = (
        ("answered", prediction.text, prediction.images),
        ("wanted", prediction.target, prediction.target_images),
    )
    columns = "".join(
        f"<div><h4>{title}</h4>{_words(text)}{''.join(_picture(folder / name, page) for name in names)}</div>"
        for title, text, names in sides
    )
    return (
        f'<article><p class="prompt">{_prompt(prediction, folder, page)}</p><div class="pair">{columns}</div>'
        "</article>"
    )


def _words(text: str) -> str:
    words = show_vokens(text)
    return f"<p>{escape(words)}</p>" if words else ""


def _prompt(prediction: Prediction, folder: Path, page: Path) -> str:
    """Return the prompt with its pictures where they stand in it."""
    pictures = iter(prediction.input_images)
    pieces = [escape(piece) for piece in re.split(re.escape(prompts.PICTURE), prediction.prompt)]
    text = pieces[0]
    for piece in pieces[1:]:
        name = next(pictures, None)
        text += (_picture(folder / name, page) if name else escape(INPUT_PICTURE)) + piece
    return text.replace(prompts.HUMAN, "<br><b>Human:</b>").replace(prompts.ASSISTANT, "<br><b>Assistant:</b>")


def _picture(path: Path, page: Path) -> str:
    return f'<img loading="lazy" src="{_link(path, page)}" alt="{escape(path.stem)}">'


def _link(path: Path, page: Path) -> str:
    return escape(quote(Path(relpath(path, page)).as_posix()))
