"""What a fine-tuned model is asked for: the labels, a teacher's predictions, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..measure.kinds import Kind, divergence
from .settings import FinetuneConfig
from .student import Outputs


class Objective:
    """The weighted terms of the loss.

    With labels `y`, a teacher's logits `t`, and the student's logits of class head `s` and distillation head `d` (the
    same where it has one head, or only one of the two targets is used):

    - label loss: `CE(s, y)` with label smoothing, or with the mixed targets of Mixup and CutMix.
    - distillation loss, soft: `T^2 KL(softmax(t / T) || softmax(d / T))` (Hinton et al., arXiv 1503.02531; DeiT,
      arXiv 2012.12877, equation 2); hard: `CE(d, argmax t)` (DeiT, equation 3). Of models with other outputs than
      classes: of labels, several an image, the same KL of each one's sigmoid, summed over them; of a regression's
      numbers the mean squared difference; of features one minus the cosine.
    - both: `w * label loss + (1 - w) * distillation loss`, `w` the configuration's `label_weight`.
    - assisted loss: the same with the logits of the second head on the class token; the sum is
      `(1 - a) * loss + a * assisted loss`, `a` the configuration's `assisted_weight` (Evo-ViT, arXiv 2108.01390,
      section 3.4).

    Args:
        config: Weights, temperature, kind of distillation.
        distils: Whether there is a teacher.
    """

    def __init__(self, config: FinetuneConfig, distils: bool) -> None:
        self._config = config
        self.uses_labels = not distils or config.label_weight > 0
        self.distils = distils
        self._kind: Kind = "classes"

    def learn(self, kind: Kind, name: str) -> None:
        """Say what the student's outputs are.

        Args:
            kind: Theirs, and the teacher's.
            name: The student's, for messages.

        Raises:
            ConfigError: If they are no classes, and the settings ask for some.
        """
        self._kind = kind
        if kind == "classes":
            return
        if self.uses_labels:
            raise ConfigError(
                f"{name} gives {kind}, no classes, and labels are learned as classes here: expected "
                "objective='distillation' with label_weight=0. Train with labels in your own loop"
            )
        if self._config.distillation == "hard":
            raise ConfigError(f"distillation='hard': {name} gives {kind}, and decides for no class; use 'soft'")

    def terms(self, outputs: Outputs, targets: Tensor | None, teacher: Tensor | None) -> dict[str, Tensor]:
        """By name, each times its weight: their sum is the loss.

        Args:
            outputs: The student's.
            targets: Labels `(B,)`, or mixed targets `(B, classes)`.
            teacher: The teacher's logits `(B, classes)`.
        """
        share = self._config.assisted_weight
        terms = self._terms(outputs.logits, outputs.distillation, targets, teacher)
        if outputs.assisted is None:
            return terms
        assisted = self._terms(outputs.assisted, outputs.assisted, targets, teacher)
        return {name: (1 - share) * term for name, term in terms.items()} | {
            f"assisted {name}": share * term for name, term in assisted.items()
        }

    def _terms(
        self, logits: Tensor, distillation: Tensor, targets: Tensor | None, teacher: Tensor | None
    ) -> dict[str, Tensor]:
        terms = {}
        if self.uses_labels:
            assert targets is not None
            weight = self._config.label_weight if self.distils else 1.0
            smoothing = 0.0 if targets.is_floating_point() else self._config.label_smoothing
            terms["label loss"] = weight * F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if self.distils:
            assert teacher is not None
            terms["distillation loss"] = (1 - self._config.label_weight) * self._distil(distillation.float(), teacher)
        return terms

    def _distil(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if self._config.distillation == "hard":
            return F.cross_entropy(logits, teacher.argmax(1))
        t = self._config.temperature if self._kind in ("classes", "labels") else 1.0
        return t * t * divergence(self._kind, logits / t, teacher.float() / t).mean()


@torch.no_grad()
def hits(outputs: Outputs, targets: Tensor | None, teacher: Tensor | None) -> Tensor:
    """How many of the images get their label, or without labels the teacher's decision; a scalar."""
    logits = outputs.logits if outputs.distillation is outputs.logits else (outputs.logits + outputs.distillation) / 2
    if targets is None:
        assert teacher is not None
        wanted = teacher.argmax(1)
    else:
        wanted = targets.argmax(1) if targets.is_floating_point() else targets
    return (logits.argmax(1) == wanted).sum()
