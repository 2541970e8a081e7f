"""Several parts of pretraining, at once where they do not need each other."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from minigpt5.tinyworld.pretraining.loop import Place
from minigpt5.tinyworld.pretraining.parts import PARTS, check_needs, check_settings, prepare_folder, run_part
from minigpt5.tinyworld.workers import worker_pool


def pretrain(parts: Sequence[str], place: Place, scale: float, pool_size: int, jobs: int) -> None:
    """Train parts in an order that gives each what it needs; the first that fails ends all.

    Args:
        parts: keys of :data:`~minigpt5.tinyworld.pretraining.parts.PARTS`.
        place: where.
        scale: every recipe's steps are multiplied by it.
        pool_size: pictures rendered for training.
        jobs: parts at once; the processor's cores are shared among them.

    Raises:
        InputError: a part needs one that is neither done nor among ``parts``, or one is done with another seed or
            pool; nothing was trained then.
    """
    check_settings(parts, place, pool_size)
    check_needs(parts, place, scale)
    prepare_folder(place)
    waiting = [name for name in PARTS if name in parts]
    if jobs == 1:
        for name in waiting:
            run_part(name, place, scale, pool_size)
        return
    rows = list(range(jobs))
    running: dict[Future[None], tuple[str, int]] = {}
    with worker_pool(jobs) as pool:
        while waiting or running:
            busy = {name for name, _ in running.values()}
            ready = [name for name in waiting if not (busy | set(waiting)) & set(PARTS[name].needs)]
            for name in ready[: len(rows)]:
                waiting.remove(name)
                row = rows.pop(0)
                here = Place(place.folder, place.seed, place.device, place.save_seconds, row)
                running[pool.submit(run_part, name, here, scale, pool_size)] = name, row
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                rows.append(running.pop(done)[1])
                done.result()
