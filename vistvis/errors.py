"""The errors and the warning of this package.

Every error is a `VistvisError` and also the builtin that a caller would expect, so that
`except ValueError` written before this package was known still works. Texts say what must hold,
the values that were seen, and one fix.
"""

from __future__ import annotations


class VistvisError(Exception):
    """Anything this package refuses to do."""


class InputError(VistvisError, ValueError):
    """An argument that cannot be: wrong value, shape or combination."""


class LayoutError(VistvisError, ValueError):
    """A token, frame, patch or pixel that the token layout does not have."""


class IndexOutOfRange(VistvisError, IndexError):  # noqa: N818 - reads as the builtin it extends
    """A batch, head, query or key index outside the attention."""


class SiteError(VistvisError, LookupError):
    """A site (attention module) that is not there, or not under that name."""


class CaptureError(VistvisError, RuntimeError):
    """Attention could not be taken exactly: a site never ran, ran twice, or is not understood."""


class DenseLimitError(VistvisError, MemoryError):
    """A dense matrix larger than the limit was asked for."""


class CheckpointError(VistvisError, ValueError):
    """Weights that are missing, damaged, or do not fit the model."""


class StoreError(VistvisError, OSError):
    """A run or file on disk that cannot be written, read or trusted."""


class DisplayError(VistvisError, RuntimeError):
    """A window was asked for where none can be shown."""


class VistvisWarning(UserWarning):
    """Something was adjusted; the text says what was asked for and what was used."""
