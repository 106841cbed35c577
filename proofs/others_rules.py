"""`check_vjp` on rules that nobody here wrote: optax, JAX and equinox.

python -m proofs.others_rules
"""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.ode import odeint

from fcfunc.testing import check_vjp

ODE_CHECKS = (
    "repeatable",
    "oracle",
    "projected_differences",
    "cotangent_types",
    "zero_cotangent",
    "compiled_equals_eager",
)


def decay(w, y0):
    """The solution at time 1 of y' = -w y, by JAX's own adjoint rule, to a tolerance of 1e-8."""
    return odeint(lambda y, t, w: -w * y, y0, jnp.array([0.0, 1.0], y0.dtype), w, rtol=1e-8, atol=1e-8)[-1]


def halved(x):
    """A gradient scaled by a half: optax's own rule, a surrogate on purpose."""
    return optax.scale_gradient(x, 0.5)


def half_of_it(x):
    """What `halved` stands for: the value of x, the gradient of x / 2."""
    return 0.5 * x + jax.lax.stop_gradient(0.5 * x)


def main() -> None:
    """Prints the reports."""
    warnings.simplefilter("ignore")
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    print(check_vjp(halved, (x,)), "\n")
    print(check_vjp(halved, (x,), reference=half_of_it), "\n")
    points = (np.array([0.7, 1.3]), np.array([1.0, 2.0]))
    print(check_vjp(decay, points, reference=lambda w, y0: y0 * jnp.exp(-w), only=ODE_CHECKS, dtypes=()), "\n")
    if importlib.util.find_spec("equinox") is not None:
        import equinox  # pyright: ignore[reportMissingImports]

        print(check_vjp(equinox.debug.backward_nan, (x,)))


if __name__ == "__main__":
    main()
