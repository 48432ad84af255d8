"""Random numbers as a function of a place in a run, so that a resumed run repeats them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_everything(*parts: int) -> None:
    """Seed Python's, NumPy's and torch's generators with one number made of all parts."""
    import numpy as np

    # Python's generator takes a string of any length and mixes it well; the others get theirs from it.
    random.seed(" ".join(map(str, parts)))
    np.random.seed(random.getrandbits(32))
    seed = random.getrandbits(63)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def preserved() -> Iterator[None]:
    """On leaving, all generators are where they were."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
