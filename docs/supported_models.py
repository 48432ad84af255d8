"""Makes supported-models.md, beside this file, and the names that `evopatch list` knows, by trying every model: so they
can't say what isn't so.

    python docs/supported_models.py

Models are built on the meta device, at their own size but without memory for weights.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import evopatch
from evopatch.patching.registry import unserved
from evopatch.progress import progress_bar
from evopatch.sources import patched_names

PAGE = Path(__file__).with_name("supported-models.md")

PATCHED = "patched"
APPLIED = "patched, not run"
NO_ADAPTER = "no adapter"
NOT_BUILT = "not built"
"""Any other outcome is the reason why `apply` refused a model."""

_TASKS = (
    "BACKBONE", "DEPTH_ESTIMATION", "IMAGE_CLASSIFICATION", "IMAGE_SEGMENTATION", "IMAGE_TO_IMAGE",
    "INSTANCE_SEGMENTATION", "KEYPOINT_DETECTION", "MASKED_IMAGE_MODELING", "MASK_GENERATION", "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "VIDEO_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
)  # fmt: skip


class Found(NamedTuple):
    """What became of one model."""

    library: str
    family: str
    """timm's module, or transformers' model type."""
    name: str
    outcome: str
    attends: bool
    """Whether it holds a module that is called an attention."""


def timm_names() -> list[str]:
    """Every architecture of timm."""
    return list(timm.list_models())


def try_timm(name: str) -> Found:
    """Build a model of timm at its own settings, and patch it."""
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    model: Any = timm.create_model(name, device="meta").eval()
    image = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    return Found("timm", family, name, _outcome(model, image), _attends(model))


def transformers_names() -> list[tuple[str, str]]:
    """Model type and class of every vision model in transformers' auto mappings."""
    names: dict[tuple[str, str], None] = {}
    for task in _TASKS:
        names |= dict.fromkeys(_classes(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")))
    takes_images = (entry for entry in _classes(modeling_auto.MODEL_MAPPING_NAMES) if _takes_images(entry[1]))
    names |= dict.fromkeys(takes_images)
    return sorted(names)


def _classes(mapping: Any) -> Iterator[tuple[str, str]]:
    for family, classes in mapping.items():
        for name in (classes,) if isinstance(classes, str) else classes:
            if name:
                yield family, name


def _takes_images(name: str) -> bool:
    try:
        return bool(getattr(transformers, name).main_input_name == "pixel_values")
    except (AttributeError, ImportError):  # of a library that isn't installed
        return False


def try_transformers(family: str, name: str) -> Found:
    """Build a class of transformers from its default configuration, and patch it."""
    try:
        config: Any = CONFIG_MAPPING[family]()
        with torch.device("meta"):
            model = getattr(transformers, name)(config).eval()
    except Exception:  # wants a backbone from the hub, another library, or settings without a default
        return Found("transformers", family, name, NOT_BUILT, False)
    own = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size, channels = getattr(own, "image_size", 224), getattr(own, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.empty(1, channels, height, width, device="meta")
    return Found("transformers", family, name, _outcome(model, image), _attends(model))


def _attends(model: nn.Module) -> bool:
    return any(re.search("attention|attn", type(module).__name__.lower()) for module in model.modules())


@torch.no_grad()
def _outcome(model: nn.Module, image: torch.Tensor) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", evopatch.SpeedWarning)
            evopatch.apply(model)
    except evopatch.EvoPatchError as error:
        known = unserved(model)
        if str(error).startswith("found nothing to patch") and not known:
            return NO_ADAPTER
        return "; ".join(sorted(set(known.values()))) or " ".join(str(error).split())
    evopatch.set_keep_ratio(model, 1.0)
    try:
        expected = _shapes(model(image))
    except Exception:  # takes more than images, or its own code doesn't run without values
        return APPLIED
    evopatch.set_keep_ratio(model, 0.5)
    if _shapes(model(image)) != expected:
        raise AssertionError(f"{type(model).__name__}: other shapes than unpatched")
    return PATCHED


def _shapes(output: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(dict(output) if hasattr(output, "keys") else output)]


def render(found: Iterable[Found]) -> str:
    """The page."""
    found = list(found)
    parts = [_HEAD.format(evopatch=evopatch.__version__)]
    for library, version, intro in (
        ("timm", timm.__version__, _TIMM), ("transformers", transformers.__version__, _TRANSFORMERS)
    ):  # fmt: skip
        own = [entry for entry in found if entry.library == library]
        taken = sum(entry.outcome in (PATCHED, APPLIED) for entry in own)
        parts.append(f"## {library} {version}\n\n" + intro.format(total=len(own), taken=taken))
        parts += _tables(own)
    return "\n\n".join(parts) + "\n"


def _tables(found: list[Found]) -> Iterator[str]:
    for title, outcome in (("Patched", PATCHED), ("Patched, not run", APPLIED)):
        if rows := _by_family(found, lambda entry, outcome=outcome: entry.outcome == outcome):
            yield f"### {title}\n\n| family | | names |\n|---|---|---|\n" + "\n".join(
                f"| `{family}` | {len(names)} | {', '.join(f'`{name}`' for name in names)} |"
                for family, names in rows.items()
            )
    plain = (PATCHED, APPLIED, NO_ADAPTER, NOT_BUILT)
    if refused := [entry for entry in found if entry.outcome not in plain]:
        rows = sorted({(entry.family, entry.outcome) for entry in refused})
        names = {row: [f"`{e.name}`" for e in sorted(refused) if (e.family, e.outcome) == row] for row in rows}
        yield "### Refused\n\n| family | | names | reason |\n|---|---|---|---|\n" + "\n".join(
            f"| `{family}` | {len(names[family, reason])} | {', '.join(names[family, reason])} | "
            f"{reason.replace('|', '/')} |"
            for family, reason in rows
        )
    for title, outcome, attends in (
        ("No adapter", NO_ADAPTER, True),
        ("No adapter, and no module called attention", NO_ADAPTER, False),
        ("Not tried", NOT_BUILT, False),
    ):
        if rows := _by_family(found, lambda e, o=outcome, a=attends: e.outcome == o and e.attends == a):
            count = sum(map(len, rows.values()))
            yield f"### {title}\n\n{_WHY[title]} {count} in all, by family:\n\n" + ", ".join(
                f"`{family}` {len(names)}" for family, names in rows.items()
            )


def _by_family(found: list[Found], chosen: Callable[[Found], bool]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for entry in sorted(filter(chosen, found)):
        rows.setdefault(entry.family, []).append(entry.name)
    return rows


_HEAD = """# Supported models

Made by `python docs/supported_models.py`, which builds every model on the meta device and gives it to `evopatch.apply`
of evopatch {evopatch} with the default settings. *Patched* means that a forward ran after it and gave the shapes that
it gives unpatched; *patched, not run* that the class takes more than images, or doesn't run without values.

Models that hold one of these are patched through it: feature extractors, encoder-decoders, detectors, vision-language
models, your own. What is refused at run time, such as attention masks, is under
[Compatibility](compatibility.md#refused-with-an-error-that-says-why); how to add an architecture under
[Writing an adapter](adapters.md)."""
_TIMM = """Of the {total} names of `timm.list_models()` {taken} are patched. Families are timm's modules."""
_TRANSFORMERS = """Of the {total} vision classes in transformers' auto mappings {taken} are patched, each built from its
default configuration. Families are transformers' model types. DPT, UperNet, Mask2Former and others take several
backbones, and are patched where theirs is listed as patched, whatever their default is."""
_WHY = {
    "No adapter": "They hold attention, but no module that an adapter serves, and `evopatch.apply` says so.",
    "No adapter, and no module called attention": "Most are convolutional networks, MLPs and the like.",
    "Not tried": "Their default configuration can't be built without network, other libraries or more settings.",
}


class Page(NamedTuple):
    """What a page says."""

    outcomes: dict[str, str]
    """Of the names that it lists one by one."""
    unserved: dict[str, int]
    """Names without an adapter, by family."""


def read(page: str) -> Page:
    """The inverse of `render`, as far as the page says it."""
    outcomes: dict[str, str] = {}
    unserved: Counter[str] = Counter()
    for section in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        body = body.partition("\n## ")[0]
        rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", body, re.MULTILINE)
        if title == "Refused":
            for _, rest in rows:
                _, names, reason = rest.split(" | ", 2)
                outcomes |= dict.fromkeys(re.findall(r"`([^`]+)`", names), reason)
        elif title in ("Patched", "Patched, not run"):
            outcomes |= dict.fromkeys((n for _, rest in rows for n in re.findall(r"`([^`]+)`", rest)), title.lower())
        elif title.startswith("No adapter"):
            for family, count in re.findall(r"`([^`]+)` (\d+)", body):
                unserved[family] += int(count)
    return Page(outcomes, dict(unserved))


def contradictions(page: str, found: Iterable[Found]) -> list[str]:
    """Where a page says something else than a run did."""
    said = read(page)
    wrong = []
    for entry in found:
        listed = said.outcomes.get(entry.name)
        if listed is None and entry.outcome == NO_ADAPTER and entry.family in said.unserved:
            continue
        if listed != entry.outcome.replace("|", "/"):
            wrong.append(f"{entry.name}: {entry.outcome}, but the page says {listed or 'nothing'}")
    return wrong


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    start = time.process_time()
    names, classes = timm_names(), transformers_names()
    found = []
    with progress_bar("trying", len(names) + len(classes)) as advance:
        for name in names:
            found.append(try_timm(name))
            advance()
        for family, name in classes:
            found.append(try_transformers(family, name))
            advance()
    PAGE.write_text(render(found))
    patched_names.write(
        entry.name for entry in found if entry.library == "timm" and entry.outcome in (PATCHED, APPLIED)
    )
    print(f"{PAGE.name}: {(time.process_time() - start) / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    main()
