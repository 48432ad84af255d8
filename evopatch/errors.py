"""Errors: each message says what was found, where, what was expected and what to do."""


class EvoPatchError(Exception):
    """Base class of every error that evopatch raises on purpose."""


class ConfigError(EvoPatchError, ValueError):
    """A setting is outside its range, or doesn't fit the model's depth."""


class UnsupportedModelError(EvoPatchError, TypeError):
    """No adapter can patch this model, or the adapter refuses this variant of it."""


class AttentionNotFoundError(UnsupportedModelError):
    """A block's graph holds no attention core that evopatch knows how to tap."""


class AlreadyPatchedError(EvoPatchError, RuntimeError):
    """`apply` was called on a model that is already patched."""


class NotPatchedError(EvoPatchError, RuntimeError):
    """A call that needs a patched model got one that is not."""


class UnsupportedInputError(EvoPatchError, ValueError):
    """An input that the slow-fast forward can't honour, such as an attention mask."""


class BypassError(EvoPatchError, RuntimeError):
    """The patch would be passed by.

    A patched block was called from outside its model's own forward; or a patched module, its forward or its class was
    replaced after `apply`, or layers were added or removed.
    """


class CheckpointError(EvoPatchError, ValueError):
    """A checkpoint file is missing, unreadable or doesn't fit the model."""


class ExportError(EvoPatchError, RuntimeError):
    """A model can't be written in a format, or what was written gives something else than the model."""


class SpeedWarning(UserWarning):
    """A patched model may not be faster in some setting that people use."""


class TrainingError(EvoPatchError, RuntimeError):
    """Training can't go on, such as after a loss that is no finite number."""


class TrainingInterruptedError(KeyboardInterrupt):
    """A training run was asked to stop, by Ctrl-C or SIGTERM, and saved what it had."""


class DataError(EvoPatchError, ValueError):
    """A data set is missing, empty, of an unknown layout, or too many of its images can't be read."""


class UnreadableImageError(DataError):
    """One image of a data set is damaged.

    Args:
        name: Which one, such as its path.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: object) -> None:
        super().__init__(f"{name} can't be read as an image: {reason}")
        self.name = name
