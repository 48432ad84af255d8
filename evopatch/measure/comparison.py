"""How much faster a patched model is, against what its FLOPs promise: all sides alternate in one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..alternating import alternate
from ..config import EvoConfig
from ..errors import ConfigError
from ..patching.given_images import check_images, run_on
from ..patching.handle import Patched, shared_copy, unpatch
from .kernels import attention_kernels
from .memory import peak_memory
from .profiling import count_flops
from .timing import forward_and_backward


@dataclass(frozen=True)
class Side:
    """One of the models in a benchmark."""

    name: str
    config: EvoConfig | None
    """None where it isn't a patched model."""
    images_per_second: float
    """By the median time of a round."""
    speed_up: float
    """Against unpatched: the median of the rounds' ratios."""
    speed_up_spread: tuple[float, float]
    """First and third quartile of the rounds' ratios."""
    flops: float
    """Relative to unpatched, counted on the real forward, and backward in training."""
    memory: int
    """Peak bytes beyond weights and input; see `measure.memory.peak_memory`. On the CPU that of the
    model before compilation."""
    attention: str
    """The attention kernels of an eager forward, see `measure.kernels`."""
    seconds: tuple[float, ...]
    """Of every round."""

    @property
    def efficiency(self) -> float:
        """The measured speed-up relative to the one that the FLOPs promise."""
        return self.speed_up * self.flops


@dataclass(frozen=True)
class Benchmark:
    """The sides of one benchmark, the unpatched model first."""

    sides: tuple[Side, ...]
    batch_size: int
    input_size: tuple[int, ...]
    device: str
    dtype: str
    compiled: bool
    train: bool
    rounds: int
    threads: int
    """Of torch on the CPU."""
    torch: str
    """Its version."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        for entry, side in zip(values["sides"], self.sides, strict=True):
            entry |= {"config": side.config and side.config.to_dict(), "efficiency": side.efficiency}
        return values

    def __str__(self) -> str:
        width = max(len(side.name) for side in self.sides)
        rows = [f"{'':{width}}{'images/s':>10}{'FLOPs':>8}{'speed-up':>10}{'efficiency':>12}{'peak MB':>9}"]
        for side in self.sides:
            figures = f"{side.images_per_second:10.1f}{side.flops:8.3f}{side.speed_up:10.3f}{side.efficiency:12.3f}"
            rows.append(f"{side.name:{width}}{figures}{side.memory / 1e6:9.1f}")
        how = f"{'compiled' if self.compiled else 'eager'}, {'forward and backward' if self.train else 'forward'}"
        return "\n".join(
            (
                *rows,
                f"{self.device}, {self.threads} threads, {self.dtype}, {how}, batch {self.batch_size}, "
                f"{self.rounds} rounds, torch {self.torch}",
            )
        )


@torch.inference_mode(False)  # nothing that was made in it can be trained
def benchmark(
    model: nn.Module,
    batch: Tensor,
    configs: Sequence[EvoConfig] | None = None,
    *,
    peers: Mapping[str, nn.Module] | None = None,
    rounds: int = 20,
    warm_up: int = 3,
    compile: bool | str = False,
    train: bool = False,
    on_round: Callable[[], object] = lambda: None,
) -> Benchmark:
    """Time a patched model against the unpatched one.

    Args:
        model: A patched model; it stays as it is, copies that share its weights are timed.
        batch: Images `(B, 3, height, width)` on the model's device, in its type.
        configs: Settings to time. None: the model's own.
        peers: Other models for the same images, by name, to time beside them; no name of another side.
        rounds: Timed forwards of each side.
        warm_up: Forwards of each side before.
        compile: Compile every side, the unpatched one too, with `torch.compile(fullgraph=True, dynamic=False)`; a
            string is its `mode`, such as `"reduce-overhead"` for CUDA graphs.
        train: Time forward and backward in train mode, of classifiers of timm or transformers, instead of forwards.
        on_round: Called after each round, the warm-up's included.

    Raises:
        DataError: If `batch` is no such tensor, or a model doesn't run on it.
        NotPatchedError: If nothing in the model is patched.
        ConfigError: If a configuration doesn't fit the model's depth, a peer is named as another side, or there are no
            rounds.
    """
    check_images(batch, "batch is")
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: expected at least 1")
    # One that was made in inference mode couldn't be kept for the backward pass.
    batch = batch.clone() if batch.is_inference() else batch
    patched = Patched(model)
    configs = [patched.config] if configs is None else list(configs)
    names = side_names(configs)
    if taken := [name for name in peers or {} if name in {"unpatched", *names}]:
        raise ConfigError(
            f"a peer is named {taken[0]!r}, as one of the sides that are timed anyway, {['unpatched', *names]}: "
            "expected another name"
        )
    models: dict[str, tuple[EvoConfig | None, nn.Module]] = {"unpatched": (None, unpatch(patched.copy(train)))}
    for name, setting in zip(names, configs, strict=True):
        own = patched.copy(train)
        Patched(own).set_config(setting)
        models[name] = (setting, own)
    models |= {name: (None, shared_copy(peer, train)) for name, peer in (peers or {}).items()}
    kernels = {name: attention_kernels(partial(run_on, own.eval(), batch)) for name, (_, own) in models.items()}
    for _, own in models.values():
        own.train(train)
    steps = {name: _step(own, batch, train) for name, (_, own) in models.items()}
    with torch.enable_grad() if train else torch.no_grad():
        flops = {name: count_flops(step)[0] for name, step in steps.items()}
        memory = {} if compile and batch.is_cuda else _memory(steps, batch.device)
        if compile:
            steps = {name: _step(_compiled(own, compile), batch, train) for name, (_, own) in models.items()}
        seconds = alternate(steps, batch.device, rounds, warm_up, on_round)
        memory = memory or _memory(steps, batch.device)
    whole = seconds["unpatched"]
    sides = []
    for name, (config, _) in models.items():
        ratios = [slow / fast for slow, fast in zip(whole, seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else (ratios[0],) * 3
        per_second = len(batch) / statistics.median(seconds[name])
        relative = flops[name] / flops["unpatched"]
        sides.append(
            Side(
                name, config, per_second, middle, (low, high), relative, memory[name], kernels[name],
                tuple(seconds[name]),
            )
        )  # fmt: skip
    return Benchmark(
        sides=tuple(sides),
        batch_size=len(batch),
        input_size=tuple(batch.shape[1:]),
        device=torch.cuda.get_device_name(batch.device) if batch.is_cuda else str(batch.device),
        dtype=str(batch.dtype).removeprefix("torch."),
        compiled=bool(compile),
        train=train,
        rounds=rounds,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def side_names(configs: Sequence[EvoConfig]) -> list[str]:
    """What tells configurations apart: the keep ratio, where they differ the representative, else a number."""
    kinds = {config.representative for config in configs}
    names = []
    for config in configs:
        name = f"keep {ratio_text(config)}"
        names.append(f"{config.representative}, {name}" if len(kinds) > 1 else name)
    if len(set(names)) < len(names):
        names = [f"{name} (setting {number})" for number, name in enumerate(names, 1)]
    return names


def ratio_text(config: EvoConfig) -> str:
    """The keep ratio, or one per run."""
    ratio = config.keep_ratio
    return ", ".join(f"{r:.3g}" for r in ratio) if isinstance(ratio, tuple) else f"{ratio:g}"


def _step(model: nn.Module, batch: Tensor, train: bool) -> Callable[[], object]:
    return forward_and_backward(model, batch) if train else partial(model, batch)


def _compiled(model: nn.Module, compile: bool | str) -> nn.Module:
    mode = compile if isinstance(compile, str) else None
    return cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False, mode=mode))


def _memory(steps: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    # Once before, as some operators keep a workspace from their first call on.
    next(iter(steps.values()))()
    return {name: peak_memory(step, device) for name, step in steps.items()}
