"""Whether training has diverged: a loss that is a number, but far above its start."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

START = 10
"""Steps whose mean loss is the start's."""
WINDOW = 20
"""Steps whose median loss is compared with it: one spike, or nine, say nothing."""


@dataclass
class Losses:
    """The losses that decide, as they come; saved with every checkpoint.

    A loss that is not finite is left out: its update was skipped, and is counted there.

    Attributes:
      factor: How far the loss may rise, as a multiple of its start; 0 for any.
      first: Of the first steps.
      last: Of the last steps.
      rollbacks: How often the run has gone back already.

    Example:
      >>> losses = Losses(factor=3.0)
      >>> for loss in [2.0] * 10 + [7.0] * 10:
      ...     losses.add(loss)
      >>> losses.limit, losses.rising(), losses.risen()
      (6.0, True, False)
      >>> losses.add(7.0)
      >>> losses.risen()
      True
    """

    factor: float
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    rollbacks: int = 0

    @classmethod
    def of(cls, factor: float, saved: Mapping[str, Any] | None) -> "Losses":
        """As `as_dict` made `saved`; counted anew if nothing was saved."""
        return cls(factor, **(saved or {}))

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it, without the factor, which is an option."""
        return {
            "first": list(self.first),
            "last": list(self.last),
            "rollbacks": self.rollbacks,
        }

    def add(self, loss: float) -> None:
        """After every step."""
        if not math.isfinite(loss):
            return
        if len(self.first) < START:
            self.first.append(loss)
        self.last = [*self.last, loss][-WINDOW:]

    @property
    def limit(self) -> float:
        """What the loss may reach. A start below 1 counts as 1."""
        if not self.factor or len(self.first) < START:
            return math.inf
        return self.factor * max(1.0, statistics.fmean(self.first))

    @property
    def median(self) -> float:
        """Of the last steps."""
        return statistics.median(self.last)

    def rising(self) -> bool:
        """Whether one of the last steps was above the limit: what is saved now may be
        ruined already."""
        return any(loss > self.limit for loss in self.last)

    def risen(self) -> bool:
        """Whether training has diverged."""
        return len(self.last) == WINDOW and self.median > self.limit
