"""Full-parameter training in an online-learned activation subspace (arXiv 2604.09406)."""

from oasis_jax.dense import projected_dense
from oasis_jax.gradient.side import galore, ldadam, osd
from oasis_jax.lift import lift
from oasis_jax.lora import Lora
from oasis_jax.losses import chunked_cross_entropy
from oasis_jax.methods import METHODS, method
from oasis_jax.optimizer import oasis_adam, scale_by_oasis_adam
from oasis_jax.select import Rule, select
from oasis_jax.state import Diagnostics, Gradients, OasisTrainState
from oasis_jax.subspace import COLLECTION, Declaration, Place, Probe, Projection
from oasis_jax.trackers import (
    BlockMean,
    Complement,
    Fixed,
    Oja,
    Random,
    Svd,
    Tracker,
)
from oasis_jax.transport import carry, keep, reset

__all__ = [
    "COLLECTION",
    "METHODS",
    "BlockMean",
    "Complement",
    "Declaration",
    "Diagnostics",
    "Fixed",
    "Gradients",
    "Lora",
    "OasisTrainState",
    "Oja",
    "Place",
    "Probe",
    "Projection",
    "Random",
    "Rule",
    "Svd",
    "Tracker",
    "carry",
    "chunked_cross_entropy",
    "galore",
    "keep",
    "ldadam",
    "lift",
    "method",
    "oasis_adam",
    "osd",
    "projected_dense",
    "reset",
    "scale_by_oasis_adam",
    "select",
]
