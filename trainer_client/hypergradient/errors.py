"""What goes wrong with a cotangent."""

from __future__ import annotations

from weighting_contract.errors import InvalidArgument


class DegenerateCotangent(InvalidArgument):
    """There is nothing to teach: the cotangent is all zero, equal for all samples, or not finite."""
