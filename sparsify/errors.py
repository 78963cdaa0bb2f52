"""Every error that a user can cause. The command line prints its text as one line and exits with code 2.

A message says what was wrong, what was got, what was expected, and what to do.
"""


class SparsifyError(Exception):
    """Base of all errors that `sparsify` raises on purpose."""


class BlockShapeError(SparsifyError, ValueError):
    """A block shape that no kernel supports, or a mask that does not fit its weight."""


class ConfigError(SparsifyError, ValueError):
    """A wrong recipe, option or argument."""


class TargetError(ConfigError):
    """A layer selection that matches nothing, or a model in which nothing can be pruned."""


class PrunerError(SparsifyError, ValueError):
    """An unknown pruner, or one whose scores or weights cannot be used (NaN, wrong shape)."""


class CheckpointError(SparsifyError):
    """A checkpoint that is missing, damaged, unsafe or of an unknown format."""


class OutputError(SparsifyError):
    """An output folder that exists, cannot be written, or does not fit on the disk."""


class DeviceMemoryError(SparsifyError):
    """Work that needs more memory than its device has."""


class DataError(SparsifyError, ValueError):
    """A data file or data set that cannot be read, is empty, or lacks the column asked for."""
