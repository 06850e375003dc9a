"""Flax linen layers that can be projected: drop-in for `nn.Dense`.

A layer declares itself in the collection `subspace` when it is initialised and knows
nothing about ranks: `select` decides. Without a subspace (inference, evaluation, another
optimizer) it is `nn.Dense`, with the same parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array

from oasis_jax.subspace import COLLECTION, Declaration, Place, Probe, Site

_SITE = "projection"
_kernel_init = nn.initializers.lecun_normal()
_bias_init = nn.initializers.zeros_init()


def _site(module: nn.Module, name: str, declare: Callable[[], Declaration]) -> Site:
    """Declares an input when initialising; what stands there now."""
    if module.is_initializing():
        module.variable(COLLECTION, name, declare)
    if module.has_variable(COLLECTION, name):
        return module.get_variable(COLLECTION, name)
    return Declaration()


def input_projection(module: nn.Module, site: str, features: int) -> Probe | None:
    """Declares the input of a norm or an activation function.

    Args:
      module: The calling module, in a compact method.
      site: Name of the input, such as 'input'.
      features: Of the input.

    Returns:
      Where the input is projected, the `Probe`: apply a function of
      `oasis_jax.nonlinear` with its `basis`, `energy` and `stride`. Where it is not, or
      nothing is differentiated, None: apply the plain function.
    """
    standing = _site(module, site, lambda: Declaration(token=jnp.zeros(features)))
    return standing if isinstance(standing, Probe) else None


def _project(
    module: nn.Module,
    site: str,
    x: Array,
    weights: Mapping[str, tuple[Array, Array | None]],
    dtype: Dtype | None,
    precision: PrecisionLike,
    mask: Array | None,
) -> tuple[Array, ...]:
    """Applies the weights, keyed by kernel path relative to `module`, to one input."""
    projection = _site(module, site, lambda: Declaration(Place(tuple(weights))))
    if mask is not None and isinstance(projection, Probe):
        x = jnp.where(mask[..., None], x, 0)
    arrays = [a for pair in weights.values() for a in pair if a is not None]
    dtype = canonicalize_dtype(x, *arrays, dtype=dtype)
    # The kernel is cast inside the operation, so that no cast copy of it is saved.
    outputs = projection(
        x.astype(dtype),
        {name: kernel for name, (kernel, _) in weights.items()},
        precision,
    )
    return tuple(
        y if bias is None else y + bias.astype(dtype)
        for y, (_, bias) in zip(outputs, weights.values(), strict=True)
    )


class _Weights(nn.Module):
    """The parameters of an `nn.Dense`, without the product."""

    features: int
    use_bias: bool = True
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _kernel_init
    bias_init: Initializer = _bias_init

    @nn.compact
    def __call__(self, n_in: int) -> tuple[Array, Array | None]:
        kernel = self.param(
            "kernel", self.kernel_init, (n_in, self.features), self.param_dtype
        )
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        return kernel, bias


class OasisDense(nn.Module):
    """`nn.Dense` whose kernel can be projected.

    Attributes are those of `nn.Dense`: `features`, `use_bias`, `dtype`, `param_dtype`,
    `precision`, `kernel_init`, `bias_init`.

    Example:
      >>> layer = OasisDense(5)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> sorted(variables['params'])
      ['bias', 'kernel']
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = _kernel_init
    bias_init: Initializer = _bias_init

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps (..., n_in) to (..., features).

        Args:
          x: Input, (..., n_in).
          mask: (...) bool, False where a token counts for nothing, such as padding.
            Where the kernel is projected its input is taken as zero, lest the basis
            follow it.
        """
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        weights = {"kernel": (kernel, bias)}
        options = (self.dtype, self.precision, mask)
        return _project(self, _SITE, x, weights, *options)[0]


class DenseWeights(nn.Module):
    """What an `OasisDense` without bias would apply, for who applies it otherwise.

    A head whose loss is taken without its logits, say: `chunked_cross_entropy` takes
    both results. Parameters and place are those of `OasisDense(features, name=name)`.

    Example:
      >>> head = DenseWeights(5)
      >>> variables = head.init(jax.random.key(0), 3)
      >>> kernel, place = head.apply(variables, 3)
      >>> kernel.shape, place.active
      ((3, 5), False)
    """

    features: int
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _kernel_init

    @nn.compact
    def __call__(self, n_in: int) -> tuple[Array, Site]:
        """The kernel, (n_in, features), and what stands in its place."""
        shape = (n_in, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return kernel, _site(self, _SITE, lambda: Declaration(Place(("kernel",))))


def shared_dense(
    module: nn.Module,
    site: str,
    x: Array,
    features: Mapping[str, int],
    *,
    use_bias: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    kernel_init: Initializer = _kernel_init,
    bias_init: Initializer = _bias_init,
    mask: Array | None = None,
) -> tuple[Array, ...]:
    """Several dense layers on one input, which is projected, and saved, once.

    Call it in a compact method. The parameters are those of `nn.Dense(n, name=name)`
    for each entry of `features`.

    Args:
      module: The calling module.
      site: Name of the shared projection, such as 'qkv'.
      x: Input, (..., n_in).
      features: n_out by layer name, such as {'q_proj': 64, 'k_proj': 16, 'v_proj': 16}.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: As in `nn.Dense`.
      mask: As in `OasisDense`.

    Returns:
      One output per layer, (..., n_out) each.
    """
    weights: dict[str, Any] = {
        f"{name}/kernel": _Weights(
            n_out, use_bias, param_dtype, kernel_init, bias_init, name=name
        )(x.shape[-1])
        for name, n_out in features.items()
    }
    return _project(module, site, x, weights, dtype, precision, mask)
