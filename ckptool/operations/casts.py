"""What a cast loses, told without a second pass over the bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptool.model.dtypes import DType
from ckptool.model.results import CastLoss

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class CastTally:
    """Count what a cast loses while its bytes are streamed; ``loss`` is the account of the last whole pass."""

    key: str
    source: DType
    target: DType
    loss: CastLoss = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was counted: another pass begins."""
        self.loss = CastLoss(self.key, self.source.name, self.target.name, elements=0)

    def add(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        """Count one run of elements, as uint8 arrays before and after the cast."""
        from ckptool.operations.cast_kernels import measure_loss  # NumPy, only once something is cast

        self.loss = measure_loss(self.loss, before, after, self.source, self.target)
