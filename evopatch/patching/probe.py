"""Whether a block does what a slow-fast block must: mix patch tokens in its attention, and nowhere else."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import EvoPatchError, UnsupportedModelError
from ..rewrite.classes import is_bound_forward
from ..rewrite.fast_paths import forward_of
from ..rewrite.written import lend

_PATCHES = 9


def width_of(block: nn.Module) -> int | None:
    """`C`: the number of channels of the tokens that a block takes, by its first layer that says so."""
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[-1])
        for name in ("embed_dim", "in_features"):
            size = getattr(module, name, None)
            if isinstance(size, int):
                return size
    return None


def required_inputs(block: nn.Module) -> tuple[str, ...]:
    """Names of what a block has to be given beside its tokens."""
    _, *others = list(inspect.signature(forward_of(block)).parameters.values())[1:]
    return tuple(p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)


@torch.no_grad()
def takes_tokens_first(
    block: nn.Module,
    name: str,
    channels: int,
    prefix: int,
    absent: Iterable[str] = (),
    tables: Mapping[str, Any] | None = None,
) -> bool:
    """Run a block's forward on random tokens, with random weights.

    Args:
        block: Left as it is.
        name: Fully qualified, for errors.
        channels: `C`.
        prefix: `P`.
        absent: Names of its other inputs that are given as None.
        tables: Those that have one entry per patch token, with values: `(..., N, D)`, or tuples of such.

    Returns:
        Whether it takes `(T, B, C)`; else `(B, T, C)`.

    Raises:
        UnsupportedModelError: If it does neither, or what it makes of patch tokens depends on their order.
    """
    tables = tables or {}
    _check_averaged(tables, name, block)
    runner = Runner(block, name, absent)
    # Without tables either of the first two axes may be that of the tokens.
    patches = next((_first(table).shape[-2] for table in tables.values()), _PATCHES)
    x = runner.random(2 if tables else prefix + _PATCHES + 1, prefix + patches, channels)
    tables = {given: _single(table) for given, table in tables.items()}
    out = runner(x, tables)
    mixes = [_reaches_others(runner, x, tables, out, axis) for axis in (0, 1)]
    if mixes not in ([True, False], [False, True]):
        what = "what one token gives doesn't depend on others" if not any(mixes) else "images are mixed, too"
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}): run on random tokens, {what}; expected a block that attends among the "
            "tokens of one image. Give another container, see evopatch.inspect(model)"
        )
    axis = mixes.index(True)
    order = torch.randperm(x.shape[axis] - prefix, generator=torch.Generator().manual_seed(0)).to(x.device)
    moved = {given: _reordered(table, order) for given, table in tables.items()}
    order = torch.cat([torch.arange(prefix, device=x.device), order + prefix])
    if not runner.equal(runner(x.index_select(axis, order), moved), out.index_select(axis, order)):
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) gives other results when its patch tokens come in another order: it "
            "mixes them outside of its attention (such as by a convolution), or knows their places (such as by a "
            "position bias). Slow tokens would meet the wrong neighbours: write an adapter (docs/adapters.md), or "
            "leave the model unpatched"
        )
    return axis == 0


def _check_averaged(tables: Mapping[str, Any], name: str, block: nn.Module) -> None:
    for given, table in tables.items():
        for part in tree_leaves(table):
            if not part.is_floating_point():
                raise UnsupportedModelError(
                    f"{name} ({type(block).__name__}) is given {given} of {part.dtype}: expected numbers of floating "
                    "point, as those of a group of tokens are averaged. Give blocks what is made of these, such as "
                    "sines and cosines"
                )


def _first(table: Any) -> Tensor:
    tensor: Tensor = table[0] if isinstance(table, (tuple, list)) else table
    return tensor


def _single(table: Any) -> Any:
    return type(table)(map(_single, table)) if isinstance(table, (tuple, list)) else table.float()


def _reordered(table: Any, order: Tensor) -> Any:
    if isinstance(table, (tuple, list)):
        return type(table)(_reordered(part, order) for part in table)
    return table.index_select(-2, order)


def _reaches_others(runner: Runner, x: Tensor, tables: Mapping[str, Any], out: Tensor, axis: int) -> bool:
    """Whether a change of the first entry of an axis changes what others give."""
    changed = x.clone()
    changed.select(axis, 0).copy_(-changed.select(axis, 0))
    others = torch.arange(1, x.shape[axis], device=x.device)
    return not runner.equal(runner(changed, tables).index_select(axis, others), out.index_select(axis, others))


@contextmanager
def trying(module: nn.Module, name: str, x: Tensor, expected: str) -> Iterator[None]:
    """Run somebody's module inside, in single precision also where the caller casts automatically.

    Args:
        module: What is run.
        name: Its, fully qualified.
        x: What on.
        expected: What is, and what to do otherwise.

    Raises:
        UnsupportedModelError: In place of whatever the module raises.
    """
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    except EvoPatchError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) can't be run on random tokens {tuple(x.shape)}: "
            f"{type(error).__name__}: {error}. {expected}"
        ) from error


class Runner:
    """A block's forward in eval mode and single precision, with random weights and without hooks; of one on the meta
    device on the CPU."""

    def __init__(self, block: nn.Module, name: str, absent: Iterable[str]) -> None:
        self.name = name
        self.absent = dict.fromkeys(absent)
        own = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
        self.device = torch.device("cpu") if own.is_meta else own.device
        self._made: dict[int, nn.Parameter] = {}
        self._lent: dict[int, Any] = {}
        self.block = self._twin(block)

    def _twin(self, module: Any) -> Any:
        """Shares with the module what isn't weights, hooks or modules, and can't be changed in place."""
        twin = copy.copy(module)
        if is_bound_forward(module):  # to the module, not to the twin
            del twin.__dict__["forward"]
        lend(twin.__dict__, self._lent)
        twin.__dict__.update(
            training=False,
            _parameters={name: self._random_twin(p) for name, p in module._parameters.items()},
            _buffers={name: None if b is None else self._filled(b) for name, b in module._buffers.items()},
            _modules={name: None if child is None else self._twin(child) for name, child in module._modules.items()},
            _forward_hooks=OrderedDict(),
            _forward_pre_hooks=OrderedDict(),
        )
        return twin

    def _random_twin(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not parameter.is_floating_point():
            return parameter
        if id(parameter) not in self._made:
            # Random also for models that aren't trained yet, whose layers may be zeros.
            values = self.random(*parameter.shape) * 0.2 + (0.1 if parameter.dim() < 2 else 0.0)
            self._made[id(parameter)] = nn.Parameter(values, requires_grad=False)
        return self._made[id(parameter)]

    def _filled(self, buffer: Tensor) -> Tensor:
        buffer = torch.ones_like(buffer, device=self.device) if buffer.is_meta else buffer.clone()
        return buffer.float() if buffer.is_floating_point() else buffer

    def random(self, *shape: int) -> Tensor:
        # Of its own generator: nobody's random numbers change.
        generator = torch.Generator().manual_seed(len(shape) + sum(shape))
        # A parameter may have no axes, which `torch.randn` takes as a tuple only.
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(self.device)

    def __call__(self, x: Tensor, tables: Mapping[str, Any]) -> Tensor:
        """`(B, T, C)`, or `(T, B, C)`, to the same.

        Raises:
            UnsupportedModelError: If the block can't be run on these, or gives something else.
        """
        expected = (
            "Expected blocks that take (B, T, C) and give the same; other inputs with one entry per patch token, such "
            "as a rotary table, are named in token_inputs, and need images=. See evopatch.inspect(model)"
        )
        with trying(self.block, self.name, x, expected):
            # Somebody's code may write to what it is given.
            out = self.block(x.clone(), **self.absent | tree_map(torch.clone, dict(tables)))
        if isinstance(out, (tuple, list)) and out:
            out = out[0]
        if not isinstance(out, Tensor) or out.shape != x.shape:
            found = f"{tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise UnsupportedModelError(
                f"{self.name} ({type(self.block).__name__}) gives {found} for tokens {tuple(x.shape)}: expected a "
                "tensor of the same shape, or a tuple that begins with one. See evopatch.inspect(model) for containers "
                "that would do"
            )
        return out

    def equal(self, a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= 1e-4 * b.abs().max())
