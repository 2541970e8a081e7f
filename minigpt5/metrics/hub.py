"""Loading by hub name on a machine without network: from the cache, or a quick error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

_TIMEOUT_SECONDS = 5.0


@contextmanager
def cached_without_network(name: str) -> Iterator[None]:
    """Use only cached files inside the block if the hub cannot be reached; ``name`` may also be a local folder.

    One request decides. Otherwise every missing file is tried six times with growing pauses, most of a minute
    each, before the hub's client gives up.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or Path(name).exists() or not _is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_reachable() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception:  # the client's own kinds differ by release; any failure means: not now
        return False
    return True
