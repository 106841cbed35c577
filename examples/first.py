"""The plain network: parameters, a rule compared with jax.grad, and a jitted training step with optax."""

import jax
import jax.numpy as jnp
import optax

import fcfunc
from fcfunc import losses, ops

x = jax.random.normal(jax.random.key(0), (500, 2))  # points, and whether they lie outside a circle
y = (jnp.linalg.norm(x, axis=1) > 1.2).astype(int)

params = fcfunc.init(jax.random.key(1), [2, 32, 2])  # a list of {"w", "b"}, one per layer
out, residuals = ops.relu_fwd(x)
(dx,) = ops.relu_bwd(residuals, jnp.ones_like(out))
print("rule equals jax.grad:", bool((dx == jax.grad(lambda x: jnp.sum(jax.nn.relu(x)))(x)).all()))


def loss_fn(params, x, y):
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, x), y))


optimizer = optax.sgd(0.5)
opt_state = optimizer.init(params)


@jax.jit
def step(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


for _ in range(500):
    params, opt_state, _ = step(params, opt_state, x, y)
accuracy = jnp.mean(jnp.argmax(fcfunc.apply(params, x), axis=1) == y)
print(f"loss {loss_fn(params, x, y):.3f}, accuracy {accuracy:.3f}")
