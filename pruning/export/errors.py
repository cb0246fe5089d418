"""What goes wrong in an export, in one sentence for the user."""

from __future__ import annotations


class ExportError(ValueError):
    """The model, the plan and the format do not fit together, or the output cannot be written."""
