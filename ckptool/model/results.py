"""What an operation found out about the values of one tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CastLoss:
    """Count what one cast did to the values of one tensor; ``source`` and ``target`` are dtype names.

    Each count is in elements, and no element is counted twice. ``overflowed``: finite before, infinite or NaN after.
    ``saturated``: beyond the largest value of the target, which stands in its place. ``underflowed``: zero after, and
    not before. ``largest_relative_error`` is ``|after - before| / |before|`` over the other finite values, zeros left
    out.
    """

    key: str
    source: str
    target: str
    elements: int
    overflowed: int = 0
    saturated: int = 0
    underflowed: int = 0
    largest_relative_error: float = 0.0


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Describe the values of one tensor; counts are in elements.

    ``minimum``, ``maximum``, ``mean`` and ``std`` (of the population: divided by the count) are of the finite values
    alone, computed in float64, and None where there are none. The extremes of an integer tensor are exact. A complex
    number counts by its magnitude, a bool as 0 or 1. ``zeros`` counts both zeros.
    """

    elements: int
    nan: int
    infinite: int
    zeros: int
    minimum: float | int | None
    maximum: float | int | None
    mean: float | None
    std: float | None

    @property
    def finite(self) -> int:
        """Count the finite elements."""
        return self.elements - self.nan - self.infinite

    @property
    def finite_share(self) -> float:
        """Give the share of finite elements, between 0 and 1; 1 for an empty tensor."""
        return self.finite / self.elements if self.elements else 1.0
