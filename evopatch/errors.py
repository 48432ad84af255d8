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
    """A patched block was called from outside its model's own forward."""


class CheckpointError(EvoPatchError, ValueError):
    """A checkpoint file is missing, unreadable or doesn't fit the model."""


class TrainingError(EvoPatchError, RuntimeError):
    """Training can't go on, such as after a loss that is no finite number."""


class DataError(EvoPatchError, ValueError):
    """An evaluation data set is missing, empty or of an unknown layout."""
