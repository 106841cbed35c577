"""`check_vjp` on the rules of published packages; prints docs/background/published-rules.md.

    python -m proofs.wild > docs/background/published-rules.md

An entry is code as a user would write it: a setup that imports the rule, and a call. Each runs in a separate process.
`--only NAME` prints the reports of the entries whose package or rule contains NAME, instead of the page.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import subprocess
import sys
import time
import types
import warnings
from statistics import median
from typing import Any, NamedTuple

LIMIT = 180
"""Time limit for one entry in seconds, including imports."""

COUNTED = {
    "ok": "ok: nothing found",
    "bug": "a bug in the package, reproduced below without `check_vjp`",
    "intended": "intended or documented by the package",
    "false alarm": "a false alarm of `check_vjp`, or an unexplained finding",
    "inconclusive": "inconclusive: nothing found, but nothing to compare with",
    "no end": f"not finished within {LIMIT} s",
}
"""The verdicts that the page counts, and what they mean."""

ALWAYS = ("ok", "bug", "intended", "false alarm")

INTRODUCTION = """\
# Rules of published packages

This page shows what `check_vjp` finds in `custom_vjp` and `custom_jvp` rules of packages outside this project.
Written by `python -m proofs.wild` with Python {python} and jax {jax} on two CPU cores that had other work.

There is one call per rule, as its maintainer might write it: with `reference=` where the rule is a deliberate
surrogate, `rtol=` for a solver, a range for a restricted domain, and no `skip=`. Each call runs in a process of its
own. Functions that do not belong to the package, such as `decay`, are defined in `proofs/wild.py`. A false alarm is
a defect of fcfunc.

To repeat the run, install the packages of the table (with `pip install --no-deps` if they require an older JAX) and
run

    python -m proofs.wild > docs/background/published-rules.md
"""

SHOWN = """\
Each block was run after `import jax, jax.numpy as jnp, numpy as np`, in the same run as the table. ringattention and
snnax were imported without their `__init__.py`, which fails with this JAX."""


class Wild(NamedTuple):
    """One rule of a package.

    Attributes:
      package: its name on the Python package index.
      rule: the path of the rule.
      call: the call of `check_vjp`.
      setup: code to run before the call; `jax`, `jnp`, `np` and `check_vjp` are already imported.
      kind: the verdict on its findings: a "bug" of the package, or "intended" by it; "" if none is expected.
      finds: words in the findings that `kind` applies to, such as the name of a check.
      remark: a line for the table.
      shown: code without `check_vjp` that prints the wrong results.
    """

    package: str
    rule: str
    call: str
    setup: str = ""
    kind: str = ""
    finds: tuple[str, ...] = ()
    remark: str = ""
    shown: str = ""


NAN = "the rule is finite where automatic differentiation of the function gives NaN"

EVERYTHING = ("oracle", "differences", "multiprecision", "precision_of_dtypes", "kinks", "adjoint", "forward_mode",
              "shape_sweep")  # fmt: skip

NEURAL_TANGENTS = """
bare("neural_tangents", "neural_tangents._src", "neural_tangents._src.stax", "neural_tangents._src.utils")
"""

SOLVER = "the solver of the backward pass squares a cotangent of 2⁻¹⁰⁰, which underflows"
NONE = "the backward pass returns an array for an argument that is None, which JAX allows"
DAWSN = "1 - 2 x dawsn(x) cancels: at x = 10⁴ the gradient is 0"
RAISES_LOW = "the gradient raises an error for float16 and bfloat16, but the function does not"

WILD = (
    Wild("jax", "jax.nn.relu", 'check_vjp(jax.nn.relu, "n d", at_kink={0.0: 0.0})'),
    Wild("jax", "jax.nn.relu6", 'check_vjp(jax.nn.relu6, "n d", at_kink={0.0: 0.0, 6.0: 0.0})'),
    Wild("jax", "jax.nn.softmax", 'check_vjp(jax.nn.softmax, "n d")',
         "jax.config.update('jax_softmax_custom_jvp', True)"),
    Wild("jax", "jax.nn.log1mexp", 'check_vjp(jax.nn.log1mexp, "n d:positive")'),
    Wild("jax", "jax.scipy.special.logit", 'check_vjp(logit, "n:0..1")', "from jax.scipy.special import logit"),
    Wild("jax", "jax.scipy.special.xlogy", 'check_vjp(xlogy, "n, n:positive")', "from jax.scipy.special import xlogy"),
    Wild(
        "jax", "jax.scipy.special.xlog1py", 'check_vjp(xlog1py, "n, n:positive")',
        "from jax.scipy.special import xlog1py",
    ),
    Wild("jax", "jax.scipy.special.entr", 'check_vjp(entr, "n:positive")', "from jax.scipy.special import entr"),
    Wild("jax", "jax.scipy.special.log_ndtr", 'check_vjp(log_ndtr, "n")', "from jax.scipy.special import log_ndtr"),
    Wild("jax", "jax.scipy.special.expi", 'check_vjp(expi, "n:positive")', "from jax.scipy.special import expi"),
    Wild(
        "jax", "jax.scipy.special.fresnel", 'check_vjp(fresnel, "n")', "from jax.scipy.special import fresnel",
        remark=NAN,
    ),
    Wild(
        "jax", "jax.scipy.special.sici", 'check_vjp(sici, "n:positive")', "from jax.scipy.special import sici",
        remark=NAN,
    ),
    Wild(
        "jax", "jax.scipy.special.erfcx", 'check_vjp(erfcx, "n")', "from jax.scipy.special import erfcx",
        "bug", ("multiprecision",), "2 x erfcx(x) - 2/√π cancels: at x = 10⁴ the gradient is 21 times too large",
        """
from jax.scipy.special import erfcx
print("jax.grad:", jax.grad(erfcx)(1e4))
print("a central difference:", (erfcx(10100.0) - erfcx(9900.0)) / 200)
""",
    ),
    Wild(
        "jax", "jax.scipy.special.dawsn", 'check_vjp(dawsn, "n")', "from jax.scipy.special import dawsn",
        "bug", ("multiprecision",), "accurate to 16 digits, like the coefficients of the function; " + DAWSN,
        """
from jax.scipy.special import dawsn
print("jax.grad:", jax.grad(dawsn)(1e4))
print("a central difference:", (dawsn(10100.0) - dawsn(9900.0)) / 200)
""",
    ),
    Wild("jax", "jax.numpy.i0", 'check_vjp(jnp.i0, "n")'),
    Wild("jax", "jax.numpy.sinc", 'check_vjp(jnp.sinc, "n")'),
    Wild("jax", "jax.numpy.logaddexp", 'check_vjp(jnp.logaddexp, "n d, n d")'),
    Wild("jax", "jax.numpy.logaddexp2", 'check_vjp(jnp.logaddexp2, "n d, n d")'),
    Wild("jax", "jax.numpy.linalg.det", 'check_vjp(jnp.linalg.det, "4 4")'),
    Wild("jax", "jax.numpy.linalg.slogdet", 'check_vjp(lambda a: jnp.linalg.slogdet(a)[1], "n n")'),
    Wild("jax", "jax.numpy.linalg.pinv", 'check_vjp(jnp.linalg.pinv, "5 3")'),
    Wild(
        "jax", "jax.experimental.ode.odeint",
        'check_vjp(decay, "2:0.5..2, 2", reference=lambda w, y0: y0 * jnp.exp(-w), rtol=1e-4, dtypes=("float32",))',
        """
from jax.experimental.ode import odeint

def decay(w, y0):
    return odeint(lambda y, t, w: -w * y, y0, jnp.array([0.0, 1.0], y0.dtype), w, rtol=1e-6, atol=1e-6)[-1]
""",
        remark="the adaptive solver of the backward pass overflows for a cotangent of 2⁶⁰",
    ),
    Wild(
        "jax", "pallas.ops.tpu.flash_attention.mha_reference",
        'check_vjp(mha_reference, "b h n d, b h m d, b h m d, b h n m", float64=False)',
        "from jax.experimental.pallas.ops.tpu.flash_attention import mha_reference",
        "bug", ("cotangent_types", "precision_of_dtypes"), "the gradient with respect to a bfloat16 `ab` is float32",
        """
from jax.experimental.pallas.ops.tpu.flash_attention import mha_reference
q, ab = jnp.ones((1, 1, 2, 4), jnp.bfloat16), jnp.ones((1, 1, 2, 2), jnp.bfloat16)
print(jax.grad(lambda ab: mha_reference(q, q, q, ab).sum().astype(jnp.float32))(ab).dtype)
""",
    ),
    Wild(
        "optax", "optax.scale_gradient",
        "check_vjp(lambda x: scale_gradient(x, 0.5), 'n d', "
        "reference=lambda x: 0.5 * x + jax.lax.stop_gradient(0.5 * x))",
        "from optax import scale_gradient", remark="a surrogate, compared with the function it stands for",
    ),
    Wild(
        "optax", "optax.projections.projection_simplex", 'check_vjp(projection_simplex, "d")',
        "from optax.projections import projection_simplex", "bug", ("precision_of_dtypes",), RAISES_LOW,
        """
from optax.projections import projection_simplex
x = jnp.array([0.3, 1.0], jnp.bfloat16)
print(projection_simplex(x))
print(jax.grad(lambda x: projection_simplex(x)[0])(x))
""",
    ),
    Wild(
        "optax", "optax.losses.weighted_logsoftmax", 'check_vjp(weighted_logsoftmax, "n d, n d")',
        "from optax.losses._classification import weighted_logsoftmax",
    ),
    Wild(
        "equinox", "equinox.debug.backward_nan", 'check_vjp(backward_nan, "n d")',
        "from equinox.debug import backward_nan",
    ),
    Wild("lineax", "lineax.internal.two_norm", 'check_vjp(two_norm, "n d")', "from lineax.internal import two_norm"),
    Wild("lineax", "lineax.internal.rms_norm", 'check_vjp(rms_norm, "n d")', "from lineax.internal import rms_norm"),
    Wild("lineax", "lineax.internal.max_norm", 'check_vjp(max_norm, "n d")', "from lineax.internal import max_norm"),
    Wild(
        "distrax", "distrax.multiply_no_nan", 'check_vjp(multiply_no_nan, "n d, n d")',
        "from distrax._src.utils.math import multiply_no_nan",
    ),
    Wild(
        "distrax", "distrax.power_no_nan", 'check_vjp(power_no_nan, "n d:positive, n d")',
        "from distrax._src.utils.math import power_no_nan",
    ),
    Wild(
        "distrax", "distrax VonMises cdf", 'check_vjp(lambda x, c: _von_mises_cdf(x, c, x.dtype), "n, n:positive")',
        "from distrax._src.distributions.von_mises import _von_mises_cdf",
    ),
    Wild(
        "jaxopt", "jaxopt.projection.projection_simplex", 'check_vjp(projection_simplex, "d")',
        "from jaxopt.projection import projection_simplex",
    ),
    Wild(
        "jaxopt", "jaxopt.projection.projection_sparse_simplex",
        'check_vjp(lambda x: projection_sparse_simplex(x, 3), "d", sizes={"d": 7})',
        "from jaxopt.projection import projection_sparse_simplex", "bug", ("precision_of_dtypes",), RAISES_LOW,
        """
from jaxopt.projection import projection_sparse_simplex
x = jnp.array([0.3, 1.0, 0.5], jnp.bfloat16)
print(projection_sparse_simplex(x, 2))
print(jax.grad(lambda x: projection_sparse_simplex(x, 2)[0])(x))
""",
    ),
    Wild(
        "jaxopt", "jaxopt.projection.projection_box_section (implicit)",
        'check_vjp(project, "5, 5:positive", reference=exact, rtol=1e-3)',
        """
from jaxopt.projection import projection_box_section

def project(x, w):
    return projection_box_section(x, (0.0, 1.0, w, 1.0))

def exact(x, w):  # the multiplier of the active set, which the bisection finds
    inside = jax.lax.stop_gradient(project(x, w))
    free, upper = (inside > 0) & (inside < 1), inside >= 1
    tau = (jnp.sum(w * x * free) + jnp.sum(w * upper) - 1) / jnp.sum(w * w * free)
    return jnp.where(free, x - tau * w, jnp.where(upper, 1.0, 0.0))
""",
        "bug", ("scan_and_checkpoint", "compiled_equals_eager"),
        "the gradient of the compiled function raises an error; " + SOLVER,
        """
from jaxopt.projection import projection_box_section
x, w = jnp.array([0.3, 1.0]), jnp.ones(2)
print(jax.grad(lambda x: projection_box_section(x, (0.0, 1.0, w, 1.0))[0])(x))
print(jax.grad(jax.jit(lambda x: projection_box_section(x, (0.0, 1.0, w, 1.0))[0]))(x))
""",
    ),
    Wild(
        "jaxopt", "jaxopt.GradientDescent.run (implicit)",
        'check_vjp(ridge, "n d, n, :positive", rtol=1e-3, reference=closed_form, sizes={"n": 8, "d": 3})',
        """
from jaxopt import GradientDescent

def loss(w, x, y, l2):
    return jnp.mean((x @ w - y) ** 2) + l2 * jnp.sum(w**2)

def ridge(x, y, l2):
    solver = GradientDescent(loss, maxiter=500, tol=1e-8)
    return solver.run(jnp.zeros(x.shape[1], x.dtype), x, y, l2).params

def closed_form(x, y, l2):
    return jnp.linalg.solve(x.T @ x / len(y) + l2 * jnp.eye(x.shape[1], dtype=x.dtype), x.T @ y / len(y))
""",
        remark=SOLVER,
    ),
    Wild(
        "jaxopt", "jaxopt.isotonic.isotonic_l2_pav", 'check_vjp(isotonic_l2_pav, "d")',
        "import os\nos.environ['NUMBA_DISABLE_JIT'] = '1'\nfrom jaxopt.isotonic import isotonic_l2_pav",
        "bug", ("precision_of_dtypes",),
        "the gradient raises an error for float16, but the function does not (numba off)",
        """
from jaxopt.isotonic import isotonic_l2_pav
x = jnp.array([0.3, 1.0, 0.5], jnp.float16)
print(isotonic_l2_pav(x))
print(jax.grad(lambda x: isotonic_l2_pav(x)[0])(x))
""",
    ),
    Wild("ott-jax", "ott.math.utils.norm", 'check_vjp(norm, "d")', "from ott.math.utils import norm"),
    Wild("ott-jax", "ott.math.utils.logsumexp", 'check_vjp(logsumexp, "n d")', "from ott.math.utils import logsumexp"),
    Wild(
        "ott-jax", "ott.math.utils.softmin", 'check_vjp(softmin, "n d, :positive")',
        "from ott.math.utils import softmin", "bug", ("oracle", "differences", "adjoint", "kinks", "shape_sweep"),
        "the gradient with respect to `gamma` is 0, which is not documented",
        """
from ott.math.utils import softmin
x = jnp.array([1.0, 2.0, 3.0])
print("jax.grad:", jax.grad(softmin, 1)(x, 1.0))
print("a central difference:", (softmin(x, 1.01) - softmin(x, 0.99)) / 0.02)
""",
    ),
    Wild("ott-jax", "ott.math.utils.lambertw", 'check_vjp(lambertw, "n:positive", rtol=1e-5)',
         "from ott.math.utils import lambertw"),
    Wild(
        "ott-jax", "ott.math.matrix_square_root.sqrtm_only",
        'check_vjp(root, "n n", rtol=1e-4)',
        """
from ott.math.matrix_square_root import sqrtm_only

def root(a):
    return sqrtm_only(a @ a.T + jnp.eye(len(a), dtype=a.dtype))
""",
    ),
    Wild(
        "ott-jax", "ott.geometry.costs.RegTICost.h_legendre", 'check_vjp(cost.h_legendre, "d")',
        """
from ott.geometry import costs, regularizers

cost = costs.RegTICost(regularizers.L1(), lam=0.5)
""",
    ),
    Wild(
        "flash-attention-jax", "flash_attention_jax.flash_attention",
        'check_vjp(flash_attention, "b h n d, b h n d, b h n d, b n:bool", argnums=(0, 1, 2), atol=1e-8)',
        "from flash_attention_jax import flash_attention",
        "bug", ("precision_of_dtypes", "multiprecision"),
        RAISES_LOW + "; its epsilon of 1e-10 is visible at inputs of 10⁶",
        """
from flash_attention_jax import flash_attention
q = jnp.ones((1, 1, 2, 4), jnp.bfloat16)
print(jax.grad(lambda q: flash_attention(q, q, q, jnp.ones((1, 2), bool)).sum().astype(jnp.float32))(q).dtype)
""",
    ),
    Wild(
        "flash-attention-jax", "flash_attention_jax.causal_flash_attention",
        'check_vjp(causal_flash_attention, "b h n d, b h n d, b h n d", atol=1e-8)',
        "from flash_attention_jax import causal_flash_attention",
        "bug", ("precision_of_dtypes", "multiprecision"),
        RAISES_LOW + "; its epsilon of 1e-10 is visible at inputs of 10⁶",
        """
from flash_attention_jax import causal_flash_attention
q = jnp.ones((1, 1, 2, 4), jnp.bfloat16)
print(jax.grad(lambda q: causal_flash_attention(q, q, q).sum().astype(jnp.float32))(q).dtype)
""",
    ),
    Wild(
        "flash-attention-jax", "flash_attention_jax.cosine_sim_flash_attention",
        'check_vjp(cosine_sim_flash_attention, "n d, n d, n d, n:bool", argnums=(0, 1, 2))',
        "from flash_attention_jax import cosine_sim_flash_attention",
        "bug", ("precision_of_dtypes",), RAISES_LOW,
        """
from flash_attention_jax import cosine_sim_flash_attention
q = jnp.ones((2, 4), jnp.bfloat16)
print(jax.grad(lambda q: cosine_sim_flash_attention(q, q, q, jnp.ones(2, bool)).sum().astype(jnp.float32))(q).dtype)
""",
    ),
    Wild(
        "jax-cce", "jax_cce.linear_cross_entropy", 'check_vjp(linear_cross_entropy, "n d, v d, n:int<v")',
        "from jax_cce import linear_cross_entropy",
        remark="with one class the true gradient is 0: the rule returns 0, and automatic differentiation 1e-9",
    ),
    Wild(
        "qpax", "qpax.solve_qp_primal",
        'check_vjp(project, "4", reference=lambda q: jnp.maximum(-q, 0), float64=False, rtol=1e-2, atol=1e-2)',
        """
import qpax

def project(q):
    eye, none = jnp.eye(4, dtype=q.dtype), jnp.zeros((0, 4), q.dtype)
    return qpax.solve_qp_primal(eye, q, none, jnp.zeros(0, q.dtype), -eye, jnp.zeros(4, q.dtype))
""",
    ),
    Wild(
        "jaxoplanet", "jaxoplanet.core.kepler", 'check_vjp(kepler, "n:0.1..3, n:0..0.9")',
        "from jaxoplanet.core import kepler",
    ),
    Wild(
        "jaxoplanet", "jaxoplanet.utils.zero_safe_sqrt", 'check_vjp(zero_safe_sqrt, "n:positive")',
        "from jaxoplanet.utils import zero_safe_sqrt",
    ),
    Wild(
        "jaxoplanet", "jaxoplanet.core.limb_dark light_curve",
        'check_vjp(lambda u, b, r: light_curve(u, b, r), ":0..0.5, :0.1..0.6, :0.05..0.3")',
        """
from jaxoplanet.core.limb_dark import light_curve as flux

def light_curve(u, b, r):
    return flux(jnp.stack([u, 0.5 * u]), b, r)
""",
    ),
    Wild("brax", "brax.math.safe_arccos", 'check_vjp(safe_arccos, "n:-1..1")', "from brax.math import safe_arccos"),
    Wild("brax", "brax.math.safe_arcsin", 'check_vjp(safe_arcsin, "n:-1..1")', "from brax.math import safe_arcsin"),
    Wild("brainpy", "brainpy.math.relu", 'check_vjp(relu, "n d", at_kink={0.0: 0.0})',
         "from brainpy.math import relu"),
    Wild(
        "brainstate", "brainstate.nn.Embedding lookup", 'check_vjp(lookup, "v d, n:int<v")',
        """
from brainstate.nn._embedding import _embedding_lookup_fn

lookup = _embedding_lookup_fn(None, False)
""",
    ),
    Wild(
        "brainstate", "brainstate.nn.Embedding lookup, scale_grad_by_freq", 'check_vjp(lookup, "v d, n:int<v")',
        """
from brainstate.nn._embedding import _embedding_lookup_fn

lookup = _embedding_lookup_fn(None, True)
""",
        "intended", EVERYTHING, "documented: the gradient is divided by the number of lookups of the row",
    ),
    Wild("numpyro", "numpyro.distributions.util.log1mexp", 'check_vjp(log1mexp, "n", ranges={0: (-np.inf, 0)})',
         "from numpyro.distributions.util import log1mexp"),
    Wild(
        "numpyro", "numpyro DoublyTruncatedPowerLaw.log_prob",
        'check_vjp(log_prob, "n:1..2, n:-3..3")',
        """
from numpyro.distributions import DoublyTruncatedPowerLaw

def log_prob(x, alpha):
    return DoublyTruncatedPowerLaw(alpha, 1.0, 2.0).log_prob(x)
""",
    ),
    Wild(
        "numpyro", "numpyro DoublyTruncatedPowerLaw.cdf",
        'check_vjp(cdf, "n:1..2, n:-3..3")',
        """
from numpyro.distributions import DoublyTruncatedPowerLaw

def cdf(x, alpha):
    return DoublyTruncatedPowerLaw(alpha, 1.0, 2.0).cdf(x)
""",
    ),
    Wild(
        "jax-md", "jax_md.space.transform", 'check_vjp(transform, "d d, n d")', "from jax_md.space import transform",
        "intended", EVERYTHING, "documented: the gradient with respect to the positions is left in real space",
    ),
    Wild(
        "jax-md", "jax_md.rigid_body quaternion_rotate",
        "check_vjp(_quaternion_rotate, draw)",
        """
from jax_md.rigid_body import _quaternion_rotate

def draw(rng):
    q = rng.standard_normal(4)
    return q / np.linalg.norm(q), rng.standard_normal(3)
""",
        "intended", EVERYTHING, "documented: the gradient is projected onto the tangent space of unit quaternions",
    ),
    Wild(
        "jax-md", "jax_md reaxff safe_sqrt", 'check_vjp(safe_sqrt, "n:positive")',
        "from jax_md.mm_forcefields.reaxff.reaxff_helper import safe_sqrt",
    ),
    Wild("jax-md", "jax_md uma safe_acos", 'check_vjp(safe_acos, "n:-1..1")',
         "from jax_md._nn.uma.common.rotation import safe_acos"),
    Wild("jax-md", "jax_md uma safe_atan2", 'check_vjp(safe_atan2, "n, n")',
         "from jax_md._nn.uma.common.rotation import safe_atan2"),
    Wild(
        "jax-md", "jax_md uma segment_mm", 'check_vjp(lambda x, w: _segment_mm_2d(x, w, sizes), "5 d, 2 o d")',
        """
from jax_md._nn.uma.kernels import _segment_mm_2d

sizes = jnp.array([3, 2])
""",
    ),
    Wild(
        "e3nn-jax", "e3nn_jax.spherical_harmonics",
        """check_vjp(lambda x: spherical_harmonics(x), "n 3")""",
        """
import e3nn_jax as e3nn

def spherical_harmonics(x):
    x = e3nn.IrrepsArray("1o", x)
    return e3nn.spherical_harmonics([1, 2], x, normalize=False, algorithm=("recursive", "dense", "custom_jvp")).array
""",
    ),
    Wild(
        "e3nn-jax", "e3nn_jax einsum", 'check_vjp(lambda a, b: einsum("ij,jk->ik", a, b), "n d, d m")',
        "from e3nn_jax._src.utils.einsum import einsum",
    ),
    Wild(
        "kfac-jax", "kfac_jax.utils.stable_sqrt", 'check_vjp(stable_sqrt, "n:positive")',
        "from kfac_jax._src.utils.math import stable_sqrt",
    ),
    Wild(
        "mujoco-mjx", "mujoco.mjx collision_sdf _cylinder",
        "check_vjp(_cylinder, lambda rng: (rng.standard_normal(3), rng.uniform(0.5, 1, 2)), argnums=0)",
        "from mujoco.mjx._src.collision_sdf import _cylinder", remark=NAN,
    ),
    Wild(
        "flowjax", "flowjax NumericalInverse",
        'check_vjp(inverse, ":-2..2, :0.5..2", reference=lambda y, a: y / a, atol=1e-4, dtypes=("float32",))',
        """
import functools
from flowjax.bijections import Affine, NumericalInverse
from flowjax.root_finding import bisection_search, root_finder_to_inverter

def inverse(y, scale):
    bijection = Affine(0.0, scale)
    inverter = root_finder_to_inverter(functools.partial(bisection_search, lower=-10.0, upper=10.0))
    return NumericalInverse(bijection, inverter).inverse(y)
""",
    ),
    Wild("neural-tangents", "neural_tangents _sqrt", 'check_vjp(_sqrt, "n:positive")',
         NEURAL_TANGENTS + "from neural_tangents._src.stax.elementwise import _sqrt"),
    Wild("neural-tangents", "neural_tangents _arctan2", 'check_vjp(_arctan2, "n, n")',
         NEURAL_TANGENTS + "from neural_tangents._src.stax.elementwise import _arctan2"),
    Wild(
        "spyx", "spyx.experimental.compress.packed_spike_dense",
        "check_vjp(packed_spike_dense, lambda rng, n, d, m: ((rng.standard_normal((n, d)) > 0) * 1.0, "
        "rng.standard_normal((d, m))), argnums=1)",
        "from spyx.experimental.compress import packed_spike_dense",
        "bug", ("shape_sweep",), "the gradient raises ZeroDivisionError for an empty batch, but the function does not",
        """
from spyx.experimental.compress import packed_spike_dense
spikes, weight = jnp.zeros((0, 3)), jnp.ones((3, 2))
print(packed_spike_dense(spikes, weight).shape)
print(jax.grad(lambda weight: packed_spike_dense(spikes, weight).sum())(weight).shape)
""",
    ),
    Wild(
        "snnax", "snnax.functional.surrogate.superspike_surrogate", 'check_vjp(spike, "n d")',
        """
bare("snnax", "snnax.functional")
from snnax.functional.surrogate import superspike_surrogate

spike = superspike_surrogate()
""",
        "intended", EVERYTHING, "documented: a surrogate gradient of a step function",
    ),
    Wild(
        "snnax", "snnax.functional.surrogate.sigmoid_surrogate", 'check_vjp(spike, "n d")',
        """
bare("snnax", "snnax.functional")
from snnax.functional.surrogate import sigmoid_surrogate

spike = sigmoid_surrogate()
""",
        "bug", ("the rule raises",), "the gradient raises an error: `jax.nn.sigmoid` takes one argument and gets two",
        """
from snnax.functional.surrogate import sigmoid_surrogate
print(sigmoid_surrogate()(jnp.ones(2)))
print(jax.grad(lambda x: sigmoid_surrogate()(x).sum())(jnp.ones(2)))
""",
    ),
    Wild(
        "tensorcircuit-ng", "tensorcircuit adaware_svd", 'check_vjp(lambda a: adaware_svd(a)[1], "3 4")',
        "from tensorcircuit.backends.jax_ops import adaware_svd",
        "bug", ("precision_of_dtypes",),
        "`jnp.eye(n)` has no dtype: with x64 enabled, a float32 input gets a float64 gradient",
        """
from tensorcircuit.backends.jax_ops import adaware_svd
jax.config.update("jax_enable_x64", True)
a = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) % 5
print(jax.grad(lambda a: adaware_svd(a)[1].sum())(a).dtype)
""",
    ),
    Wild("tensorcircuit-ng", "tensorcircuit adaware_qr", 'check_vjp(adaware_qr, "4 3")',
         "from tensorcircuit.backends.jax_ops import adaware_qr"),
    Wild("tensorcircuit-ng", "tensorcircuit adaware_eigh", 'check_vjp(lambda a: adaware_eigh(a + a.T)[0], "4 4")',
         "from tensorcircuit.backends.jax_ops import adaware_eigh"),
    Wild("tensorcircuit-ng", "tensorcircuit bessel_jv_jax_rescaled",
         'check_vjp(lambda x: bessel_jv_jax_rescaled(4, x, 30), ":0..5")',
         "from tensorcircuit.backends.jax_ops import bessel_jv_jax_rescaled",
         remark=f"{NAN}; above 7 the function itself is wrong"),
    Wild("tensorcircuit-ng", "tensorcircuit modified_bessel_ive_jax",
         'check_vjp(lambda x: modified_bessel_ive_jax(4, x, 30), ":positive")',
         "from tensorcircuit.backends.jax_ops import modified_bessel_ive_jax",
         remark=NAN),
    Wild(
        "netket", "netket.jax.expect", 'check_vjp(mean_of_local, "d, n d", argnums=0)',
        """
from netket.jax import expect

def mean_of_local(w, x):
    return expect(lambda w, x: jnp.tanh(x @ w), lambda w, x: jnp.sin(x @ w), w, x)[0]
""",
        "intended", EVERYTHING, "documented: the gradient of the sampling density is added",
    ),
    Wild(
        "netket", "netket.jax.apply_packed",
        'check_vjp(lambda w, x: packed(w, x), "3, 4 3", argnums=0)',
        """
from netket.jax._apply_packed import apply_packed

def packed(w, x):
    mask = jnp.array([True, False, True, True])
    return apply_packed(lambda w, x: jnp.tanh(x @ w), w, x, mask, 0.0, chunk_size=2, axis_0_is_sharded=False)
""",
    ),
    Wild(
        "pennylane", "pennylane.math.fidelity", 'check_vjp(fidelity, "2 2, 2 2", rtol=1e-5)',
        """
import pennylane as qml

def state(a):
    rho = a @ a.T + jnp.eye(2, dtype=a.dtype)
    return rho / jnp.trace(rho)

def fidelity(a, b):
    return qml.math.fidelity(state(a), state(b))
""",
    ),
    Wild(
        "pennylane", "pennylane QNode, adjoint differentiation",
        'check_vjp(circuit, ":-3..3, :-3..3", dtypes=("float32",))',
        """
import pennylane as qml

@qml.qnode(qml.device("default.qubit", wires=2), interface="jax", diff_method="adjoint")
def circuit(x, y):
    qml.RX(x, wires=0)
    qml.CNOT(wires=[0, 1])
    qml.RY(y, wires=1)
    return qml.expval(qml.PauliZ(1))
""",
    ),
    Wild(
        "dynamiqs", "dynamiqs _qr_solve_cached", 'check_vjp(solve, "4 3, 4", reference=lstsq)',
        """
from dynamiqs.integrators.core.low_rank_integrator import _qr_solve_cached

def solve(a, b):
    return _qr_solve_cached(a, jax.lax.stop_gradient(jnp.linalg.qr(a)), b[:, None])

def lstsq(a, b):
    return jnp.linalg.solve(a.T @ a, a.T @ b[:, None])
""",
    ),
    Wild("tfp-nightly", "tfp.math.log_cosh", 'check_vjp(tfp.math.log_cosh, "n")',
         "import tensorflow_probability.substrates.jax as tfp"),
    Wild(
        "tfp-nightly", "tfp.math.dawsn", 'check_vjp(tfp.math.dawsn, "n")',
        "import tensorflow_probability.substrates.jax as tfp",
        "bug", ("multiprecision",), "accurate to 16 digits, like the coefficients of the function; " + DAWSN,
        """
from tensorflow_probability.substrates.jax.math import dawsn
print("jax.grad:", jax.grad(dawsn)(1e4))
print("a central difference:", (dawsn(10100.0) - dawsn(9900.0)) / 200)
""",
    ),
    Wild(
        "tfp-nightly", "tfp.math.erfcx", 'check_vjp(tfp.math.erfcx, "n")',
        "import tensorflow_probability.substrates.jax as tfp",
        "bug", ("multiprecision",), "2 x erfcx(x) - 2/√π cancels: at x = 10⁴ the gradient is 0",
        """
from tensorflow_probability.substrates.jax.math import erfcx
print("jax.grad:", jax.grad(erfcx)(1e4))
print("a central difference:", (erfcx(10100.0) - erfcx(9900.0)) / 200)
""",
    ),
    Wild("tfp-nightly", "tfp.math.bessel_ive", 'check_vjp(lambda z: tfp.math.bessel_ive(1.5, z), "n:0.5..5")',
         "import tensorflow_probability.substrates.jax as tfp"),
    Wild("tfp-nightly", "tfp.math.betainc",
         'check_vjp(tfp.math.betainc, "n:1..3, n:1..3, n:0.1..0.9")',
         "import tensorflow_probability.substrates.jax as tfp"),
    Wild("tfp-nightly", "tfp.math.igammainv",
         'check_vjp(tfp.math.igammainv, "n:1..3, n:0.1..0.9", rtol=1e-5)',
         "import tensorflow_probability.substrates.jax as tfp"),
    Wild(
        "tfp-nightly", "tfp sqrt_with_finite_grads", 'check_vjp(sqrt_with_finite_grads, "n:positive")',
        "from tensorflow_probability.substrates.jax.math.psd_kernels.internal.util import sqrt_with_finite_grads",
        "bug", ("precision_of_dtypes",), "the gradient raises an error for bfloat16, but the function does not",
        """
from tensorflow_probability.substrates.jax.math.psd_kernels.internal.util import sqrt_with_finite_grads
x = jnp.array(2, jnp.bfloat16)
print(sqrt_with_finite_grads(x))
print(jax.grad(sqrt_with_finite_grads)(x))
""",
    ),
    Wild(
        "tokamax", "tokamax.linear_softmax_cross_entropy_loss",
        'check_vjp(lambda x, labels, w: loss(x, labels, w), "n d, n:int<v, d v", argnums=(0, 2))',
        """
import tokamax

def loss(x, labels, w):
    return tokamax.linear_softmax_cross_entropy_loss(x, labels, w, implementation="xla")
""",
        "bug", ("precision_of_dtypes", "integer_arguments"),
        "bfloat16 and float16 arguments get float32 gradients, and the labels an int32 gradient",
        """
import tokamax
x, w, labels = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16), jnp.array([0, 1])
f = lambda x: tokamax.linear_softmax_cross_entropy_loss(x, labels, w, implementation="xla").astype(jnp.float32)
print(jax.grad(f)(x).dtype)
""",
    ),
    Wild("tokamax", "tokamax attention softmax", 'check_vjp(lambda x: _softmax(x, True)[0], "n d")',
         "from tokamax._src.ops.attention.base import _softmax"),
    Wild("tokamax", "tokamax.layer_norm",
         'check_vjp(lambda x, s, b: tokamax.layer_norm(x, s, b, implementation="xla"), "n d, d, d")',
         "import tokamax"),
    Wild(
        "ringattention", "ringattention.ring_attention_inference",
        'check_vjp(attention, "b n h d, b n h d, b n h d", float64=False)',
        """
bare("ringattention")
from ringattention.ringattention_inference import ring_attention_inference

def attention(q, k, v):
    def one(q, k, v):
        return ring_attention_inference(q, k, v, jnp.ones((1, 1, 1, q.shape[1]), bool), "ring")
    whole = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((1,), ("ring",))
    return jax.shard_map(one, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)(q, k, v)
""",
        "bug", ("precision_of_dtypes",), "bfloat16 and float16 q and k get float32 gradients",
        """
from ringattention.ringattention_inference import ring_attention_inference
k, mesh, spec = jnp.ones((1, 2, 1, 4), jnp.bfloat16), jax.make_mesh((1,), ("i",)), jax.sharding.PartitionSpec()
f = lambda q: ring_attention_inference(q, k, k, jnp.ones((1, 1, 1, 2), bool), "i").sum().astype(jnp.float32)
print(jax.grad(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(k).dtype)
""",
    ),
    Wild("ejkernel", "ejkernel xla mean_pooling", 'check_vjp(mean_pooling, "b n d")',
         "from ejkernel.kernels._xla.mean_pooling import mean_pooling"),
    Wild("ejkernel", "ejkernel xla fused cross entropy",
         'check_vjp(lambda x, t, w: _fused_ce_core(x, t, w, -100), "n v, n:int<v, n")',
         "from ejkernel.kernels._xla.fused_cross_entropy._xla_impl_fwd import _fused_ce_core",
         "bug", EVERYTHING, "the gradient with respect to the weights is 0, which is not documented",
         """
from ejkernel.kernels._xla.fused_cross_entropy._xla_impl_fwd import _fused_ce_core
x, labels, f = jnp.array([[1.0, 2.0]]), jnp.array([0]), lambda w: _fused_ce_core(x, labels, w, -100)[0]
print("jax.grad:", jax.grad(f)(jnp.ones(1)))
print("a difference:", f(jnp.array([2.0])) - f(jnp.array([1.0])))
"""),
    Wild("ejkernel", "ejkernel xla fused KL divergence", 'check_vjp(_fused_kl_core, "n v, n v, n")',
         "from ejkernel.kernels._xla.fused_kl_divergence._xla_impl_fwd import _fused_kl_core",
         "bug", EVERYTHING, "the gradients with respect to the teacher and the weights are 0, which is not documented",
         """
from ejkernel.kernels._xla.fused_kl_divergence._xla_impl_fwd import _fused_kl_core
x, f = jnp.array([[1.0, 2.0]]), lambda w: _fused_kl_core(x, 2 * x, w)[0]
print("jax.grad:", jax.grad(f)(jnp.ones(1)))
print("a difference:", f(jnp.array([2.0])) - f(jnp.array([1.0])))
"""),
    Wild("ejkernel", "ejkernel xla recurrent",
         'check_vjp(lambda q, k, v: recurrent(q, k, v)[0], "b n h d, b n h d, b n h d")',
         "from ejkernel.kernels._xla.recurrent import recurrent",
         "bug", ("TracerBoolConversionError", *EVERYTHING), "the gradient of the compiled function raises an error",
         """
from ejkernel.kernels._xla.recurrent import recurrent
q, f = jnp.ones((1, 2, 1, 3)), lambda q: recurrent(q, q, q)[0].sum()
print(jax.grad(f)(q).shape)
print(jax.jit(jax.grad(f))(q).shape)
"""),
    Wild("ejkernel", "ejkernel xla state_space_v1",
         'check_vjp(lambda *a: _ssm1_core(*a, None, False), "b n i, i s, b n s, b n s, i, b n i:positive")',
         "from ejkernel.kernels._xla.state_space_v1._interface import _ssm1_core",
         remark=NONE),
    Wild("ejkernel", "ejkernel xla state_space_v2",
         'check_vjp(lambda *a: _ssm2_core(*a, None, 1, False), "b n h d, h, b n h s, b n h s, h, b n h:positive")',
         "from ejkernel.kernels._xla.state_space_v2._interface import _ssm2_core",
         "bug", ("precision_of_dtypes",), "float16 and bfloat16 arguments get float32 gradients; " + NONE,
         """
from ejkernel.kernels._xla.state_space_v2._interface import _ssm2_core
x, a, b = (jnp.ones(shape, jnp.bfloat16) for shape in [(1, 2, 1, 3), (1,), (1, 2, 1, 4)])
f = lambda a: _ssm2_core(x, a, b, b, a, x[..., 0], None, 1, False)[0].sum().astype(jnp.float32)
print(jax.grad(f)(a).dtype)
"""),
    Wild(
        "ejkernel", "ejkernel xla grouped_matmulv3",
        'check_vjp(lambda a, b: grouped_matmulv3(a, b, sizes), "5 d, 2 d m")',
        "from ejkernel.kernels._xla.grouped_matmulv3 import grouped_matmulv3\nsizes = jnp.array([3, 2])",
        remark="`jax.lax.ragged_dot` itself, without the rule, cannot be batched",
    ),
    Wild(
        "diffrax", "diffrax.BacksolveAdjoint",
        'check_vjp(decay, "d:positive, d", reference=lambda w, y: y * jnp.exp(-w), rtol=1e-4, '
        'dtypes=("float32",))',
        """
import diffrax

def decay(w, y):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, w: -w * y), diffrax.Tsit5(), 0.0, 1.0, 0.1, y, w,
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6), adjoint=diffrax.BacksolveAdjoint(),
    ).ys[-1]
""",
    ),
    Wild(
        "optimistix", "optimistix.root_find (implicit)", 'check_vjp(cube_root, "n:0.5..3", rtol=1e-4)',
        """
import optimistix

def cube_root(a):
    return optimistix.root_find(lambda y, a: y**3 - a, optimistix.Newton(1e-6, 1e-6), jnp.ones_like(a), a).value
""",
    ),
    Wild("lineax", "lineax.linear_solve", 'check_vjp(solve, "n n, n")', """
import lineax

def solve(a, b):
    return lineax.linear_solve(lineax.MatrixLinearOperator(a), b).value
"""),
    Wild(
        "quadax", "quadax.quadgk", 'check_vjp(jax.jit(integral), ":0..1, :0.5..2", rtol=1e-5, dtypes=("float32",))',
        """
import quadax

def integral(a, w):
    return quadax.quadgk(lambda x, w: jnp.exp(-w * x**2), jnp.array([0.0, 2.0]) + a, args=(w,))[0]
""",
    ),
    Wild("equinox", "equinox.internal.nextafter", 'check_vjp(nextafter, "n")',
         "from equinox.internal import nextafter"),
    Wild(
        "equinox", "equinox.internal.while_loop, kind='checkpointed'", 'check_vjp(iterate, "d d, d")',
        """
import equinox.internal as eqxi

def iterate(a, x):
    def body(c):
        return c[0] + 1, jnp.tanh(a @ c[1])
    return eqxi.while_loop(lambda c: c[0] < 4, body, (0, x), kind="checkpointed", checkpoints=2, max_steps=8)[1]
""",
    ),
    Wild(
        "flax", "flax.nnx.custom_vjp (documented example)", 'check_vjp(f, "n, n")',
        """
from flax import nnx

@nnx.custom_vjp(graph_updates=False)
def f(x, y):
    return jnp.sin(x) * y

def fwd(x, y):
    return f(x, y), (jnp.cos(x), jnp.sin(x), y)

def bwd(res, g):
    cos_x, sin_x, y = res
    return cos_x * g * y, sin_x * g

f.defvjp(fwd, bwd)
""",
    ),
    Wild(
        "jax", "pallas.ops.tpu.splash_attention attention_reference",
        'check_vjp(attention, "n d, m d, m d", float64=False)',
        """
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import attention_reference_custom

def attention(q, k, v):
    return attention_reference_custom(jnp.ones((q.shape[0], k.shape[0]), bool), q, k, v, None)
""",
    ),
    Wild("jax", "pallas.ops.gpu.rms_norm",
         'check_vjp(rms_norm, "2 n d, d, d", reference=rms_norm_reference, kwargs=options, dtypes=("float32",))',
         "from jax.experimental.pallas.ops.gpu.rms_norm import rms_norm, rms_norm_reference as of_rows\n"
         "options = dict(interpret=True, backward_pass_impl='xla')\n"
         "rms_norm_reference = lambda *args, **options: of_rows(*args)"),
    Wild("jax", "pallas.ops.gpu.layer_norm",
         'check_vjp(layer_norm, "2 n d, d, d", reference=layer_norm_reference, kwargs=options, dtypes=("float32",))',
         "from jax.experimental.pallas.ops.gpu.layer_norm import layer_norm, layer_norm_reference as of_rows\n"
         "options = dict(interpret=True, backward_pass_impl='xla')\n"
         "layer_norm_reference = lambda *args, **options: of_rows(*args)"),
)  # fmt: skip


def bare(*packages: str) -> None:
    """Makes the modules of packages importable without their `__init__.py`, which fails with this JAX."""
    for name in packages:
        parent, _, last = name.rpartition(".")
        module = types.ModuleType(name)
        spec = None if parent else importlib.util.find_spec(name)
        if parent:
            module.__path__ = [f"{folder}/{last}" for folder in sys.modules[parent].__path__]
        elif spec is None:
            raise ImportError(f"No module named {name!r}")
        else:
            module.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[name] = module


def run(entry: Wild) -> dict[str, Any]:
    """Runs one entry here: the status of the report, the checks that found something, and the printed report."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fcfunc.testing import check_vjp

    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "np": np, "check_vjp": check_vjp, "bare": bare}
    try:
        exec(entry.setup, names)
    except ImportError as error:
        return {"status": "not installed", "error": first_line(error)}
    start = time.perf_counter()
    try:
        report = eval(entry.call, names)
    except Exception as error:
        return {"status": "error", "error": first_line(error)}
    seconds = time.perf_counter() - start
    shown = io.StringIO()
    if entry.shown:
        with contextlib.redirect_stdout(shown):
            try:
                exec(entry.shown, {"jax": jax, "jnp": jnp, "np": np})
            except Exception as error:
                print(first_line(error))
    return {
        "status": report.status,
        "first": [one.check for one in report.findings],
        "found": [f"{one.check}: {one.message}, expected {one.expected}" for one in report.findings],
        "seconds": seconds,
        "report": str(report),
        "shown": shown.getvalue().strip(),
    }


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main(argv: list[str] | None = None) -> None:
    """Prints the page, or the reports of some entries."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="print the reports of these entries instead of the page")
    parser.add_argument("--entry", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.entry is not None:
        warnings.simplefilter("ignore")
        del sys.argv[1:]  # some packages parse it
        print(json.dumps(run(Wild(*json.loads(options.entry)))))
        return
    if options.only:
        for entry in WILD:
            if options.only in f"{entry.package} {entry.rule}":
                result = apart(entry)
                print(f"{entry.package}, {entry.rule}: {verdict(entry, result)}", result.get("report", ""), sep="\n")
        return
    results = []
    for entry in WILD:
        results.append(apart(entry))
        print(f"{entry.package}, {entry.rule}: {verdict(entry, results[-1])}", file=sys.stderr)
    print(page(results))


def apart(entry: Wild) -> dict[str, Any]:
    """Runs one entry in a separate process."""
    command = [sys.executable, "-W", "ignore", "-m", "proofs.wild", "--entry", json.dumps(entry)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"status": "no end", "error": ""}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"status": "error", "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def verdict(entry: Wild, result: dict[str, Any]) -> str:
    """The verdict on a report: its status, or for findings "bug", "intended" or "false alarm"."""
    if result["status"] != "FAILED":
        return result["status"]
    explained = all(any(word in found for word in entry.finds) for found in result["found"])
    return entry.kind if explained and entry.kind else "false alarm"


def page(results: list[dict[str, Any]]) -> str:
    """The page in Markdown."""
    verdicts = [verdict(entry, result) for entry, result in zip(WILD, results, strict=True)]
    called = [(e, r, v) for e, r, v in zip(WILD, results, verdicts, strict=True) if "seconds" in r]
    seconds = [result["seconds"] for _, result, _ in called]
    slowest = max(called, key=lambda one: one[1]["seconds"])[0]
    counts = {name: verdicts.count(name) for name in COUNTED}
    lines = [
        INTRODUCTION.format(python=platform.python_version(), jax=version("jax")),
        f"The results for {sum(v != 'not installed' for v in verdicts)} rules of "
        f"{len({e.package for e, _, _ in called})} packages:",
        "",
        "| verdict | rules |",
        "|---|---|",
        *(f"| {meaning} | {counts[name]} |" for name, meaning in COUNTED.items() if counts[name] or name in ALWAYS),
        "",
        f"A call took {median(seconds):.1f} s in the median and {max(seconds):.0f} s at most (`{slowest.rule}`), "
        "without the import of the package.",
        "",
        "| package | rule | call | verdict | seconds | remark |",
        "|---|---|---|---|---|---|",
    ]
    for entry, result, what in zip(WILD, results, verdicts, strict=True):
        took = f"{result['seconds']:.1f}" if "seconds" in result else ""
        remark = entry.remark if result["status"] in ("ok", "FAILED", "inconclusive") else result["error"]
        if result["status"] == "FAILED":
            what = f"{what}: {', '.join(f'`{check}`' for check in dict.fromkeys(result['first']))}"
        name = f"{entry.package} {version(entry.package)}"
        cells = (name, f"`{entry.rule}`", f"`{entry.call}`", what, took, remark)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += ["", "## Reproducing the bugs without `check_vjp`", "", SHOWN]
    for entry, result, what in zip(WILD, results, verdicts, strict=True):
        if what in ("bug", "false alarm") and entry.shown:
            title = f"### {entry.package} {version(entry.package)}: `{entry.rule}`"
            lines += ["", title, "", f"{entry.remark[:1].upper()}{entry.remark[1:]}.", "", "```python"]
            lines += [spaced(entry.shown.strip()), "```", "", "Output:", "", "```text", result["shown"], "```"]
    return "\n".join(lines)


def spaced(code: str) -> str:
    """Code with an empty line below its imports, as the formatter requires."""
    lines = code.splitlines()
    imports = sum(line.startswith(("from ", "import ")) for line in lines)
    return "\n".join([*lines[:imports], *([""] if imports else []), *lines[imports:]])


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
