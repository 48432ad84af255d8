"""Which of a model's classes those of a data set are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .tables import counted

if TYPE_CHECKING:
    from ..sources.dataset import Images


def number_as_model(images: Images, network: Any, data: str, model: str) -> str:
    """Give labels the numbers that the model has for their classes: by name where it knows all the names, or else by
    names that are numbers of its classes. Other labels stay.

    Args:
        images: A data set, with labels or without.
        network: The classifier.
        data: What a message calls the data set.
        model: What a message calls the classifier.

    Returns:
        What to tell the user; `""` where there is nothing.
    """
    from ..measure.kinds import kind_of
    from ..sources.heads import class_names, count_classes
    from ..sources.labels import whole_numbers

    names, classes = images.class_names, count_classes(network)
    if images.labels is None or not names or kind_of(network, classes) != "classes":
        return ""
    own = class_names(network)
    if own is not None and set(names) <= set(own):
        images.number_as(own, data)
        return ""
    found = f"{data} names {counted(len(names), 'class', 'classes')} and {model} has {classes}"
    numbers = whole_numbers(names)
    if numbers is not None and max(numbers) < classes:
        images.number(numbers, [str(number) for number in range(classes)])
        return "" if len(names) == classes else f"{found}: the names, which are numbers, are taken for the model's"
    if own is None and len(names) == classes:
        return ""
    unknown = [] if own is None else [name for name in names if name not in own]
    named = f", none of them named {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}" if unknown else ""
    return f"{found}{named}: top-1 and top-5 mean something only where labels are the model's own numbers of classes"
