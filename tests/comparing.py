"""What tests compare: tensors, gradients, and a model with what it was."""

import copy
import pickle

import torch
from torch import nn
from variants import WINDOWED, call


def moved(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two tensors."""
    return (a - b).abs().max().item()


def twins(model: nn.Module, name: str) -> list[nn.Module]:
    """Copies of a model of `variants`, by copy and by pickle."""
    # transformers' hooks that record hidden states don't pickle, unpatched either.
    pickled = [] if name.endswith(("backbone", "dense")) else [pickle.loads(pickle.dumps(model))]
    return [copy.deepcopy(model), *pickled]


class Snapshot:
    """Classes, attributes and parameters of a model's modules, to compare the model with later."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._classes = self._classes_of(model)
        self._attributes = [dict(vars(module)) for module in model.modules()]

    @staticmethod
    def _classes_of(model: nn.Module) -> list[type]:
        return [type(module) for module in model.modules()]

    def assert_classes_differ(self, model: nn.Module) -> None:
        """The control: `assert_same_modules` would find a change."""
        assert self._classes_of(model) != self._classes

    def assert_same_modules(self, model: nn.Module) -> None:
        """The same classes, names of attributes and `Parameter` objects, and no hooks: what is left after `remove`."""
        assert self._classes_of(model) == self._classes
        assert [set(vars(module)) for module in model.modules()] == [set(names) for names in self._attributes]
        assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())
        found = dict(model.named_parameters())
        assert found.keys() == self._parameters.keys()
        assert all(found[name] is parameter for name, parameter in self._parameters.items())

    def assert_untouched(self, model: nn.Module) -> None:
        """Also every attribute's value is the same: nothing was changed, not even for a while."""
        self.assert_same_modules(model)
        assert [dict(vars(module)) for module in model.modules()] == self._attributes


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the sum of squares of what the model gives, by parameter; the same random numbers at every call."""
    model.zero_grad()
    torch.manual_seed(0)
    call(model, x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding, which is relative to a parameter's largest gradient.

    Args:
        name: The model's in `variants`.
        found: By parameter.
        expected: By parameter.
    """
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = gradient.abs().max().item() + _rounding(name, parameter)
        torch.testing.assert_close(found[parameter], gradient, atol=2e-4 * scale, rtol=1e-3)


def _rounding(name: str, parameter: str) -> float:
    """A gradient below it is rounding. Some biases shift all logits of a query alike: their true gradient is zero."""
    if name in WINDOWED:
        return 5e-2
    if name == "hf_x_clip":  # whose gradients are forty times as large as those of others
        return 2e-1
    return 1e-2 if parameter.endswith(("k_proj.bias", "k_norm.bias", "key.bias", "rel_pos.mlp.fc2.bias")) else 1e-3


def checkpoint(model: nn.Module, reentrant: bool = False) -> None:
    """Switch the library's own gradient checkpointing on; timm's kind is a global setting of timm."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
