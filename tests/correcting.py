"""Corrections of the restored change for tests, without the search that keeps them where they help."""

import torch
from torch import nn

from evopatch.forward.learned import give_correction
from evopatch.patching.correcting import fit_correction, runs_of
from evopatch.patching.fitting import blocks_of
from evopatch.patching.handle import Patched


def correct(model: nn.Module, images: torch.Tensor) -> None:
    """Give every run of a patched flat model what corrects it on these images `(B, 3, height, width)`."""
    patched = Patched(model)
    blocks = blocks_of(patched, patched.host)
    for first, last in runs_of(patched.host.state.plans):
        give_correction(blocks[last], first, fit_correction(model, images, first, last))
