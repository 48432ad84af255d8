"""Several options of the command line as one argument of a command: typer takes them from a signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_type_hints

Command = Callable[..., None]


class Option(NamedTuple):
    """One option of the command line."""

    annotation: Any
    """`Annotated[type, typer.Option(...)]`."""
    default: Any = None


def expanded(name: str, options: Mapping[str, Option], build: Callable[..., Any]) -> Callable[[Command], Command]:
    """Give a command several options in the place of one of its parameters, and hand it what is built of them.

    Args:
        name: Of the parameter; the options stand where it stands.
        options: By their names.
        build: Gets their values by name; the command gets what it returns.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def expanded_command(**values: Any) -> None:
            own = {option: values.pop(option) for option in options}
            command(**values, **{name: build(**own)})

        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == name:
                parameters += [_parameter(key, option) for key, option in options.items()]
            else:
                annotation = hints[parameter.name]
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
        wrapper: Any = expanded_command
        wrapper.__signature__ = inspect.Signature(parameters)
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return expanded_command

    return decorate


def _parameter(name: str, option: Option) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.annotation)
