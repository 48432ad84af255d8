"""The patched model as it is trained: its outputs by name, and the heads that only training needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError
from ..forward.spec import qualified
from ..measure.accuracy import logits_of
from ..measure.kinds import kind_of
from ..measure.two_heads import heads_apart, switches
from ..patching.given_images import run_on
from ..patching.handle import Patched


class Outputs(NamedTuple):
    """Of one forward."""

    logits: Tensor
    """`(B, classes)`, what the model decides by. Of the class head alone where the two heads are trained apart."""
    distillation: Tensor
    """`(B, classes)` of the distillation head; `logits` where there is none, or they are not trained apart."""
    assisted: Tensor | None
    """`(B, classes)` of the second head on the class token."""


class Student(nn.Module):
    """A classifier of timm or transformers and, for training only, a second head.

    Args:
        model: The classifier.
        image: `(3, height, width)`, any of the data: one forward tells the number of classes and the width.
        assisted: Have a second head on the class token.
        two_heads: Give the logits of the class head and of the distillation head apart, where the model has both.

    Raises:
        ConfigError: If there is no class token for the second head, or it is what the model reads already.
        DataError: If the model doesn't run on the image.
        UnsupportedModelError: If it gives no logits.
    """

    def __init__(self, model: nn.Module, image: Tensor, assisted: bool = False, two_heads: bool = False) -> None:
        super().__init__()
        self.model = model
        self.two_heads = two_heads
        self._switches = switches(model)
        # Of a part of the model nobody knows what the model does with its logits.
        self._gives_two = hasattr(model, "set_distilled_training")
        patched = Patched(model)
        if assisted:
            _check_class_token(patched)
        self._last_block = patched.host.blocks()[-1][-1]
        logits, tokens = _probe(patched, self._last_block, image)
        self.classes = logits.shape[1]
        self.kind = kind_of(model, self.classes)
        self.assistant: nn.Module | None = None
        if assisted:
            # In float32 as norms and heads are best trained in, whatever the model's own type.
            width = tokens.shape[-1]
            self.assistant = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.classes)).to(logits.device)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, for timm's optimizer factory: what timm's models, and parts of models, name themselves.

        transformers' models name none; as by its Trainer, all of theirs decay but biases and norms.
        """
        found = set()
        for path, module in self.model.named_modules(prefix="model"):
            own = getattr(module, "no_weight_decay", None)
            found |= {qualified(path, name) for name in own()} if callable(own) else set()
        return found

    def forward(self, images: Tensor) -> Outputs:
        """`(B, 3, height, width)`."""
        last: list[Tensor] = []
        hook: RemovableHandle | None = None
        if self.assistant is not None:
            block = self.model.get_submodule(self._last_block)
            hook = block.register_forward_hook(lambda module, args, out: last.append(_tokens(out)))
        try:
            with heads_apart(self._switches, self.two_heads and self._gives_two):
                output = self.model(images.to(next(self.model.parameters()).dtype))
        finally:
            if hook is not None:
                hook.remove()
        logits, distillation = _heads(output) if self.two_heads else (logits_of(output),) * 2
        assisted = None if self.assistant is None else self.assistant(last[0][:, 0].float())
        return Outputs(logits, distillation, assisted)


def _heads(output: Any) -> tuple[Tensor, Tensor]:
    if isinstance(output, tuple):  # timm's
        return output[0], output[1]
    if hasattr(output, "distillation_logits"):  # transformers'
        return output.cls_logits, output.distillation_logits
    logits = logits_of(output)
    return logits, logits


@torch.no_grad()
def _probe(patched: Patched[nn.Module], last_block: str, image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of one forward, and the tokens behind the last block.

    Raises:
        DataError: If the model doesn't run on the image.
        UnsupportedModelError: If it gives no logits.
    """
    last: list[Tensor] = []
    probed = patched.copy().eval()
    probed.get_submodule(last_block).register_forward_hook(lambda module, args, out: last.append(_tokens(out)))
    parameter = next(patched.model.parameters())
    images = image.unsqueeze(0).to(parameter.device, parameter.dtype)
    return logits_of(run_on(probed, images)), last[0]


def _tokens(out: Any) -> Tensor:
    tokens: Tensor = out[0] if isinstance(out, tuple) else out
    return tokens


def _check_class_token(patched: Patched[nn.Module]) -> None:
    host = patched.host
    spec = host.state.spec
    has_class_token = any(path.split(".")[-1] == "cls_token" for path, _ in host.module.named_parameters())
    if not has_class_token or spec.readout > 0:
        found = "reads its class token" if spec.readout > 0 else "has no class token"
        raise ConfigError(
            f"assisted_weight: '{host.name or type(host.module).__name__}' {found}; expected a model that reads pooled "
            "patches beside a class token. Leave assisted_weight at 0"
        )
