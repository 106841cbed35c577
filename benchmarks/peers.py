"""The same training task in each library: `name -> make(task) -> (epochs(k), accuracy())`.

Every peer gets the same data, batch size, optimizer and learning rate, does its own shuffling, and runs the loop from
its documentation, with the data in memory, no loader, and one compiled step if the library has a compiler.
"""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from fcfunc import losses, train


class Task(NamedTuple):
    """A training task with float32 inputs, integer labels, and only whole batches."""

    dims: list[int]
    batch_size: int
    adam: bool
    rate: float
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def params(self) -> list:
        """The initial parameters of every peer that accepts them."""
        return fcfunc.init(jax.random.key(0), self.dims)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax optimizer."""
        return (optax.adam if self.adam else optax.sgd)(self.rate)


def classifier_loss(params, batch, key):
    """The loss of a network of fcfunc."""
    x, y = batch
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, x), y))


def with_fcfunc(task: Task):
    """fcfunc: the epoch as one program."""
    epoch = train.make_train_epoch(classifier_loss, task.optimizer, task.batch_size)
    data = jnp.asarray(task.x), jnp.asarray(task.y)
    box = [train.init_state(task.params, task.optimizer, jax.random.key(1))]

    def epochs(k):
        for _ in range(k):
            box[0], _ = epoch(box[0], data)
        jax.block_until_ready(box[0].params)

    return epochs, lambda: np.mean(np.argmax(fcfunc.apply(box[0].params, jnp.asarray(task.x_test)), -1) == task.y_test)


def plain_loss(params, x, y):
    """The network and its loss in plain JAX."""
    for p in params[:-1]:
        x = jax.nn.relu(x @ p["w"] + p["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)), logits


def with_bare_scan(task: Task):
    """Plain JAX and optax: a scan over the batches in their original order, without a shuffle."""
    optimizer = task.optimizer

    def step(carry, batch):
        params, opt_state = carry
        grads = jax.grad(lambda p: plain_loss(p, *batch)[0])(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def epoch(carry, x, y):
        whole = len(x) - len(x) % task.batch_size
        parts = [a[:whole].reshape(-1, task.batch_size, *a.shape[1:]) for a in (x, y)]
        return jax.lax.scan(step, carry, tuple(parts))[0]

    params = task.params
    box, data = [(params, optimizer.init(params))], (jnp.asarray(task.x), jnp.asarray(task.y))

    def epochs(k):
        for _ in range(k):
            box[0] = epoch(box[0], *data)
        jax.block_until_ready(box[0])

    return epochs, lambda: np.mean(np.argmax(plain_loss(box[0][0], task.x_test, task.y_test)[1], -1) == task.y_test)


def _stepwise(task: Task, carry, step, logits):
    """A loop over a compiled step, which takes the data and the indices of the examples in the batch."""
    box, data, rng = [carry], (jnp.asarray(task.x), jnp.asarray(task.y)), np.random.default_rng(0)

    def epochs(k):
        for _ in range(k):
            order = rng.permutation(len(task.x)).astype(np.int32)
            for start in range(0, len(order) - task.batch_size + 1, task.batch_size):
                box[0] = step(box[0], *data, order[start : start + task.batch_size])
        jax.block_until_ready(jax.tree.leaves(box[0]))

    return epochs, lambda: np.mean(np.argmax(logits(box[0], jnp.asarray(task.x_test)), -1) == task.y_test)


def _scanned(task: Task, carry, step, logits):
    """The same step under `lax.scan`: an epoch with its shuffle is one compiled program."""
    box, data, key = [carry], (jnp.asarray(task.x), jnp.asarray(task.y)), jax.random.key(1)
    whole = len(task.x) - len(task.x) % task.batch_size

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry, x, y, key):
        places = jax.random.permutation(key, len(x))[:whole].reshape(-1, task.batch_size)
        return jax.lax.scan(lambda carry, places: (step(carry, x, y, places), None), carry, places)[0]

    count = itertools.count()

    def epochs(k):
        for _ in range(k):
            box[0] = epoch(box[0], *data, jax.random.fold_in(key, next(count)))
        jax.block_until_ready(jax.tree.leaves(box[0]))

    return epochs, lambda: np.mean(np.argmax(logits(box[0], jnp.asarray(task.x_test)), -1) == task.y_test)


def _plain_jax(task: Task):
    """Plain JAX and optax: `(carry, step, logits)`."""
    optimizer = task.optimizer

    def step(carry, x, y, places):
        params, opt_state = carry
        grads = jax.grad(lambda p: plain_loss(p, x[places], y[places])[0])(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = task.params
    carry = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
    return carry, step, lambda c, x: plain_loss(c[0], x, task.y_test)[1]


def with_plain_jax(task: Task):
    """Plain JAX: a jitted step that donates, in a Python loop."""
    carry, step, logits = _plain_jax(task)
    return _stepwise(task, carry, jax.jit(step, donate_argnums=0), logits)


def with_plain_jax_scan(task: Task):
    """Plain JAX: a scan over the steps."""
    return _scanned(task, *_plain_jax(task))


def with_flax(task: Task):
    """flax.linen: a jitted step on its TrainState, in a Python loop."""
    import flax.linen as nn
    from flax.training.train_state import TrainState

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in task.dims[1:-1]:
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(task.dims[-1])(x)

    network = Network()
    params = {f"Dense_{i}": {"kernel": p["w"], "bias": p["b"]} for i, p in enumerate(task.params)}
    state = TrainState.create(apply_fn=network.apply, params=params, tx=task.optimizer)

    def step(state, x, y, places):
        def loss(params):
            logits = state.apply_fn({"params": params}, x[places])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[places]))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    logits = lambda state, x: network.apply({"params": state.params}, x)  # noqa: E731
    return _stepwise(task, state, jax.jit(step, donate_argnums=0), logits)


def with_flax_nnx_scan(task: Task):
    """flax.nnx: split into a graph definition and a state, and scanned, as its performance guide advises."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(*widths, rngs=rngs) for widths in itertools.pairwise(task.dims)])

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = nnx.relu(layer(x))
            return self.layers[-1](x)

    network = Network()
    for layer, p in zip(network.layers, task.params, strict=True):
        layer.kernel[...], layer.bias[...] = p["w"], p["b"]
    graph, state = nnx.split((network, nnx.Optimizer(network, task.optimizer, wrt=nnx.Param)))

    def step(state, x, y, places):
        network, optimizer = nnx.merge(graph, state)

        def loss(network):
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(network(x[places]), y[places]))

        optimizer.update(network, nnx.grad(loss)(network))
        return nnx.state((network, optimizer))

    return _scanned(task, state, step, lambda state, x: nnx.merge(graph, state)[0](x))


def _equinox(task: Task):
    """Equinox: `(carry, step, logits)`."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), len(task.dims))
    optimizer = task.optimizer

    class Network(eqx.Module):
        layers: list

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    pairs = zip(itertools.pairwise(task.dims), keys, task.params, strict=False)
    layers = [
        eqx.tree_at(lambda layer: (layer.weight, layer.bias), eqx.nn.Linear(*widths, key=key), (p["w"].T, p["b"]))
        for widths, key, p in pairs
    ]
    network = Network(layers)

    def step(carry, x, y, places):
        network, opt_state = carry

        def loss(network):
            logits = jax.vmap(network)(x[places])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[places]))

        updates, opt_state = optimizer.update(eqx.filter_grad(loss)(network), opt_state, network)
        return eqx.apply_updates(network, updates), opt_state

    carry = network, optimizer.init(eqx.filter(network, eqx.is_inexact_array))
    return carry, step, lambda carry, x: jax.vmap(carry[0])(x)


def with_equinox(task: Task):
    """Equinox: `filter_jit` on a step, in a Python loop."""
    import equinox as eqx

    carry, step, logits = _equinox(task)
    compiled = eqx.filter_jit(lambda data, carry, places: step(carry, *data, places), donate="all-except-first")
    run = lambda carry, x, y, places: compiled((x, y), carry, jnp.asarray(places))  # noqa: E731
    return _stepwise(task, carry, run, logits)


def with_equinox_scan(task: Task):
    """Equinox: a scan over the steps."""
    return _scanned(task, *_equinox(task))


def with_keras(task: Task):
    """Keras on JAX: `fit`, with an epoch's steps in as few executions as it allows."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    relu = ["relu"] * (len(task.dims) - 2) + [None]
    network = keras.Sequential([keras.layers.Dense(n, f) for n, f in zip(task.dims[1:], relu, strict=True)])
    network.build((None, task.dims[0]))
    network.set_weights([np.asarray(p[name]) for p in task.params for name in ("w", "b")])
    network.compile(
        optimizer=keras.optimizers.Adam(task.rate, epsilon=1e-8) if task.adam else keras.optimizers.SGD(task.rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=min(len(task.x) // task.batch_size, 128),
        jit_compile=True,
    )

    def epochs(k):
        network.fit(task.x, task.y, batch_size=task.batch_size, epochs=k, verbose=0)

    def accuracy():
        return np.mean(np.argmax(network.predict(task.x_test, verbose=0), -1) == task.y_test)

    return epochs, accuracy


def with_torch(task: Task, *, compiled: bool = False):
    """PyTorch: eager, with its own optimizers; or with the loss and the update compiled by `torch.compile`."""
    import torch

    torch.manual_seed(0)
    layers: list[Any] = []
    for widths, p in zip(itertools.pairwise(task.dims), task.params, strict=True):
        layer = torch.nn.Linear(*widths)
        layer.weight.data, layer.bias.data = (torch.from_numpy(np.array(a)) for a in (p["w"].T, p["b"]))
        layers += [layer, torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    optimizer = (torch.optim.Adam if task.adam else torch.optim.SGD)(network.parameters(), lr=task.rate)
    cross_entropy = torch.nn.CrossEntropyLoss()
    x, y = torch.from_numpy(task.x), torch.from_numpy(task.y.astype(np.int64))

    def loss(x, y):
        return cross_entropy(network(x), y)

    def update():
        optimizer.step()

    if compiled:
        loss, update = torch.compile(loss), torch.compile(update)

    def epochs(k):
        for _ in range(k):
            order = torch.randperm(len(x))
            for start in range(0, len(order) - task.batch_size + 1, task.batch_size):
                places = order[start : start + task.batch_size]
                optimizer.zero_grad()
                loss(x[places], y[places]).backward()
                update()

    def accuracy():
        with torch.no_grad():
            return np.mean(network(torch.from_numpy(task.x_test)).argmax(-1).numpy() == task.y_test)

    return epochs, accuracy


def with_sklearn(task: Task):
    """scikit-learn: `MLPClassifier`, continued with `warm_start`."""
    import warnings

    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier(
        task.dims[1:-1],
        solver="adam" if task.adam else "sgd",
        alpha=0.0,
        momentum=0.0,
        batch_size=task.batch_size,
        learning_rate_init=task.rate,
        tol=0.0,
        n_iter_no_change=10**9,
        warm_start=True,
        random_state=0,
    )

    def epochs(k):
        network.max_iter = k
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ConvergenceWarning
            network.fit(task.x, task.y)

    return epochs, lambda: network.score(task.x_test, task.y_test)


PEERS: dict[str, Callable] = {
    "fcfunc": with_fcfunc,
    "bare scan": with_bare_scan,
    "plain JAX, scan": with_plain_jax_scan,
    "plain JAX, loop": with_plain_jax,
    "Flax NNX, scan": with_flax_nnx_scan,
    "Flax Linen, loop": with_flax,
    "Equinox, scan": with_equinox_scan,
    "Equinox, loop": with_equinox,
    "Keras on JAX": with_keras,
    "PyTorch": with_torch,
    "PyTorch, compiled": functools.partial(with_torch, compiled=True),
    "scikit-learn": with_sklearn,
}
