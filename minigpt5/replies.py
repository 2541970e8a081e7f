"""Decoded tokens and rendered pictures → a reply: text and pictures in the order they came."""

from collections.abc import Sequence

from PIL import Image

from minigpt4.tokenizer import LlamaTokenizer
from minigpt5 import prompts
from minigpt5.data.types import Prompt, Reply
from minigpt5.generation import Decoded
from minigpt5.vokens import VokenIds


def make_reply(
    request: Prompt,
    decoded: Decoded,
    pictures: Sequence[Image.Image],
    tokenizer: LlamaTokenizer,
    ids: VokenIds,
) -> Reply:
    """Put a reply together.

    Args:
        request: what was asked.
        decoded: the tokens, with one ``[IMG0]`` a picture.
        pictures: as many as there are ``[IMG0]``, in order.
        tokenizer: knows the vokens.
        ids: their ids.
    """
    parts: list[str | Image.Image] = []
    start = 0
    remaining = iter(pictures)
    for end, token in enumerate([*decoded.token_ids, ids.first]):
        if token != ids.first:
            continue
        text = tokenizer.decode(decoded.token_ids[start:end], skip_special=True)
        text = text.replace(prompts.STOP, "").strip()
        if text:
            parts.append(text)
        if end < len(decoded.token_ids):
            parts.append(next(remaining))
        start = end + 1
    return Reply(request.id, tuple(parts), tokenizer.decode(decoded.token_ids), tuple(decoded.token_ids))
