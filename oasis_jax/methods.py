"""The table of methods: every one is a row of shared parts.

What is saved, what the basis follows, what happens to the moments. A new method is a new
row, and at most one new part.
"""

from dataclasses import dataclass
from typing import Any

import optax

from oasis_jax.optimizer import oasis_adam
from oasis_jax.select import Rule
from oasis_jax.trackers import Fixed, Oja, Random, Tracker


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
      about: What distinguishes it, in a few words.
      tracker: What the basis follows; None projects nothing.
      transport: What happens to the moments when the basis moves.
      scale: Multiplies the updates of projected kernels.
    """

    about: str
    tracker: Tracker | None = None
    transport: str = "carry"
    scale: float = 1.0

    @property
    def projected(self) -> bool:
        return self.tracker is not None

    def rules(
        self, pattern: str, rank: float | int, stride: int = 1
    ) -> tuple[Rule, ...]:
        """The rules that project what `pattern` matches; none for a full method."""
        if self.tracker is None:
            return ()
        return (Rule(pattern, rank, self.tracker, stride),)

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, **adam: Any
    ) -> optax.GradientTransformationExtraArgs:
        """`oasis_adam` with this row's parts; `adam` are its other arguments."""
        return oasis_adam(
            learning_rate, scale=self.scale, transport=self.transport, **adam
        )


METHODS: dict[str, Method] = {
    "adamw": Method("AdamW, nothing projected"),
    "oasis": Method("tracked axes of the activations, moments carried", Oja()),
    # One part changed at a time, so that each part's effect can be told.
    "oasis-frozen": Method("basis of the first batch, never moved", Fixed()),
    "oasis-random": Method(
        "a random basis every 50 steps, moments reset", Random(50), "reset"
    ),
    "oasis-unaligned": Method(
        "tracked, columns left where they were", Oja(axes="none")
    ),
    "oasis-gradient": Method(
        "tracked, columns on the gradient's axes", Oja(axes="gradient")
    ),
    "oasis-keep": Method("tracked, moments kept as they are", Oja(), "keep"),
    "oasis-reset": Method("tracked, moments reset at every move", Oja(), "reset"),
}


def method(name: str) -> Method:
    """The row of that name.

    Raises:
      ValueError: if there is none; lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]
