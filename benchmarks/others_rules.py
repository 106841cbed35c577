"""`check_vjp` on rules that nobody here wrote: optax, JAX and equinox.

python -m benchmarks.others_rules
"""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.ode import odeint

from fcfunc.testing import check_vjp


def decay(w, y0):
    """The solution at time 1 of y' = -w y, by JAX's own adjoint rule."""
    return odeint(lambda y, t, w: -w * y, y0, jnp.array([0.0, 1.0], y0.dtype), w, rtol=1e-10, atol=1e-10)[-1]


def main() -> None:
    """Prints the reports."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    print(check_vjp(lambda x: optax.scale_gradient(x, 0.5), (x,), fast=True), "\n")
    print(
        check_vjp(
            lambda x: optax.scale_gradient(x, 0.5),
            (x,),
            reference=lambda x: 0.5 * x + jax.lax.stop_gradient(0.5 * x),
            fast=True,
        ),
        "\n",
    )
    print(
        check_vjp(
            decay, (np.float64([0.7, 1.3]), np.float64([1.0, 2.0])), reference=lambda w, y0: y0 * jnp.exp(-w), fast=True
        ),
        "\n",
    )
    if importlib.util.find_spec("equinox") is not None:
        import equinox  # pyright: ignore[reportMissingImports]

        print(check_vjp(equinox.debug.backward_nan, (x,), fast=True))


if __name__ == "__main__":
    main()
