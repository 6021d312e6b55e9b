"""Work side by side on the CPU's cores: two halves of them, each on a task of its own, take less
time than all of them on one small task after the other, whose parts wait for each other."""
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def side_by_side(function: Callable, items: Sequence, device: torch.device) -> Iterator:
    """The values of a function of each item, in order. On the CPU as many items go side by side as
    there are threads to share among them, on a GPU one after the other."""
    threads = torch.get_num_threads()
    while len(items):
        workers = min(threads, len(items)) if device.type == "cpu" else 1
        even = len(items) // workers * workers  # those left over share the threads anew
        some, items = items[:even], items[even:]
        if workers == 1:
            yield from map(function, some)
            continue
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                                    initargs=(threads // workers,)) as pool:
                yield from pool.map(function, some)
        finally:
            torch.set_num_threads(threads)  # new threads take what was set last, wherever that was
