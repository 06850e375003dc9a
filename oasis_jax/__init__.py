"""Full-parameter training in an online-learned activation subspace (arXiv 2604.09406)."""

from oasis_jax.dense import projected_dense
from oasis_jax.lift import lift
from oasis_jax.optimizer import oasis_adam, scale_by_oasis_adam
from oasis_jax.select import Rule, select
from oasis_jax.state import Diagnostics, Gradients, OasisTrainState
from oasis_jax.subspace import COLLECTION, Projection
from oasis_jax.trackers import Fixed, Oja, Random, Tracker
from oasis_jax.transport import carry, keep, reset

__all__ = [
    "COLLECTION",
    "Diagnostics",
    "Fixed",
    "Gradients",
    "OasisTrainState",
    "Oja",
    "Projection",
    "Random",
    "Rule",
    "Tracker",
    "carry",
    "keep",
    "lift",
    "oasis_adam",
    "projected_dense",
    "reset",
    "scale_by_oasis_adam",
    "select",
]
