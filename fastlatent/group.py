"""The processes of a run, as the loop sees them: here of a run of one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from fastlatent.checkpoint import Checkpoints
from fastlatent.models import LatentModel, Losses


class Alone:
    """What a run asks of the processes that it consists of, for a run of one process."""

    rank = 0
    world = 1

    def own(self, count: int) -> range:
        """Those of the table's `count` rows that this rank trains."""
        return range(count)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a float64 vector."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """The maximum over all ranks of each value."""
        return values

    def agree(self, decisions: list[bool]) -> list[bool]:
        """The decisions of rank 0, for all."""
        return decisions

    def wrap(self, model: LatentModel) -> Callable[[Tensor, Tensor], Losses]:
        """The loss of a batch; index counts the samples of all ranks."""
        return model.loss

    def codes(self, model: LatentModel, index: Tensor) -> Tensor:
        """Codes of samples of any rank, float32 [B, latent_dim]; all ranks ask for the same."""
        return model.codes[index].float()

    def whole(self, model: LatentModel) -> AbstractContextManager[None]:
        """On rank 0 the model has the codes of all ranks meanwhile."""
        return nullcontext()

    def checkpoints(self, folder: Path) -> Checkpoints:
        return Checkpoints(folder)
