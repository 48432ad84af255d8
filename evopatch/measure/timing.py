"""Speed of patched models against unpatched ones, alternating in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..alternating import alternate
from ..config import EvoConfig
from ..patching.handle import Patched
from .accuracy import logits_of
from .profiling import UNPATCHED
from .two_heads import heads_apart, switches


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds."""

    patched: float
    """Images per second."""
    unpatched: float
    """Images per second."""
    ratio: float
    """Median of the rounds' ratios, patched over unpatched: above 1 is faster."""


@torch.no_grad()
def compare_speed(model: nn.Module, batch: Tensor, rounds: int = 5, warm_up: int = 1) -> Speed:
    """Forwards of a patched model against those of itself at `keep_ratio=1`, which are the unpatched ones.

    Args:
        model: A patched model; timed in eval mode, with its first host's configuration.
        batch: Images `(B, 3, height, width)` on the model's device.
        rounds: Timed forwards of each side.
        warm_up: Forwards of each side before.
    """
    patched = Patched(model)
    own, unpatched = patched.at(patched.config), patched.at(UNPATCHED)
    return compare(partial(own, batch), partial(unpatched, batch), batch, rounds, warm_up)


def compare_training_speed(model: nn.Module, batch: Tensor, rounds: int = 5, warm_up: int = 1) -> Speed:
    """The same for forward and backward in train mode, on copies of a classifier.

    Args:
        model: A patched classifier of timm or transformers.
        batch: Images `(B, 3, height, width)` on the model's device.
        rounds: Timed steps of each side.
        warm_up: Steps of each side before.
    """
    patched = Patched(model)

    def side(config: EvoConfig) -> Callable[[], None]:
        trained = patched.copy(requires_grad=True).train()
        Patched(trained).set_config(config)
        return forward_and_backward(trained, batch)

    return compare(side(patched.config), side(UNPATCHED), batch, rounds, warm_up)


def forward_and_backward(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    """A call that runs a classifier forward and backward, and drops the gradients.

    Args:
        model: Of timm or transformers, compiled or not.
        batch: Images `(B, 3, height, width)`.
    """
    module: nn.Module = getattr(model, "_orig_mod", model)
    modules = switches(module)

    def step() -> None:
        with heads_apart(modules, False):
            logits_of(model(batch)).float().logsumexp(1).sum().backward()
        module.zero_grad()

    return step


def compare(
    patched: Callable[[], object], unpatched: Callable[[], object], batch: Tensor, rounds: int, warm_up: int
) -> Speed:
    """Two calls on the same images, in turn.

    Args:
        patched: The one whose speed is asked for.
        unpatched: The other.
        batch: Images `(B, 3, height, width)` that both run.
        rounds: Timed calls of each.
        warm_up: Calls of each before.
    """
    seconds = alternate({"patched": patched, "unpatched": unpatched}, batch.device, rounds, warm_up)
    pairs = zip(seconds["unpatched"], seconds["patched"], strict=True)
    return Speed(
        patched=len(batch) / statistics.median(seconds["patched"]),
        unpatched=len(batch) / statistics.median(seconds["unpatched"]),
        ratio=statistics.median(slow / fast for slow, fast in pairs),
    )
