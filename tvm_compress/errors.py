"""Every error a user can meet. A leaf module: all folders may import it.

The command line prints the message on one line and exits with `exit_status`: 2 for bad input, 1 for
a check that was made and failed.
"""

from __future__ import annotations


class TvmCompressError(Exception):
    """Base class. The message says what is wrong, where, and what to do."""

    exit_status = 2


class ModelError(TvmCompressError):
    """The model cannot be read or has an operator, shape or value that is not supported."""


class RecipeError(TvmCompressError):
    """A recipe has an unknown key, a bad value, or a layer selector that matches nothing."""


class DataError(TvmCompressError):
    """Calibration or evaluation data has the wrong name, shape, dtype or contains NaN."""


class TargetError(TvmCompressError):
    """The target does not exist, lacks its toolchain, or the model does not fit it."""


class ArtefactError(TvmCompressError):
    """An artefact folder is missing, incomplete, damaged or from another version."""


class DatabaseError(TvmCompressError):
    """A tuning database or an exported file of one cannot be read or written."""


class CheckFailed(TvmCompressError):
    """A check ran and failed: accuracy dropped too far or integers differ from the reference."""

    exit_status = 1
