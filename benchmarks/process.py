"""One whole process per peer: import, load the data, train five epochs of Fashion-MNIST, print the accuracy.

    python -m benchmarks.process fcfunc        # or PyTorch, scikit-learn
    python -m benchmarks.process stages        # fcfunc, with the seconds of each stage as JSON

784-128-10, batches of 128, SGD at 0.1. Each process imports only what its peer needs.
"""

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
EPOCHS, BATCH, RATE = 5, 128, 0.1


def read(name: str, skip: int):
    """The bytes of one of the four files."""
    import numpy as np

    with gzip.open(FOLDER / f"{name}-ubyte.gz") as f:
        return np.frombuffer(f.read(), np.uint8, offset=skip)


def by_fcfunc(stage: Callable = lambda name, results=None: None) -> float:
    """fcfunc: the epoch as one program. Images stay bytes until a step uses them.

    `stage(name, results)` is called at the end of each stage.
    """
    import jax
    import jax.numpy as jnp

    stage("import JAX")
    import optax

    import fcfunc
    from fcfunc import data, losses, train

    stage("import Optax and fcfunc")
    training, test = jax.tree.map(jnp.asarray, data.fashion_mnist())
    stage("read the images", (training, test))

    def apply(params, batch):
        return fcfunc.apply(params, batch.x.reshape(len(batch.x), -1).astype(jnp.float32) / 255)

    def loss_fn(params, batch, key):
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(apply(params, batch), batch.y))

    def error_fn(params, batch, key):
        return jnp.mean(jnp.argmax(apply(params, batch), axis=-1) != batch.y, dtype=jnp.float32)

    optimizer = optax.sgd(RATE)
    state = train.init_state(fcfunc.init(jax.random.key(0), [784, 128, 10]), optimizer, jax.random.key(1))
    stage("initialize", state)
    epoch = train.make_train_epoch(loss_fn, optimizer, BATCH)
    for i in range(EPOCHS):
        state, _ = epoch(state, training)
        stage("compile, and the first epoch" if i == 0 else "the other epochs", state)
    accuracy = 1 - float(train.evaluate(error_fn, state.params, test)["loss"])
    stage("evaluate")
    return accuracy


def stages() -> dict[str, float]:
    """The seconds of each stage of `by_fcfunc`, each run to its end before the next begins."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def stage(name, results=None):
        nonlocal start
        if results is not None:
            sys.modules["jax"].block_until_ready(results)
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - start
        start = now

    by_fcfunc(stage)
    return seconds


def by_torch() -> float:
    """PyTorch in eager mode."""
    import torch

    def tensors(name):
        x = torch.from_numpy(read(f"{name}-images-idx3", 16).reshape(-1, 784).copy()).float() / 255
        return x, torch.from_numpy(read(f"{name}-labels-idx1", 8).copy()).long()

    (x, y), (x_test, y_test) = tensors("train"), tensors("t10k")
    network = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer, loss_fn = torch.optim.SGD(network.parameters(), lr=RATE), torch.nn.CrossEntropyLoss()
    for _ in range(EPOCHS):
        for places in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss_fn(network(x[places]), y[places]).backward()
            optimizer.step()
    with torch.no_grad():
        return (network(x_test).argmax(-1) == y_test).float().mean().item()


def by_sklearn() -> float:
    """scikit-learn's MLPClassifier."""
    import warnings

    import numpy as np
    from sklearn.neural_network import MLPClassifier

    warnings.simplefilter("ignore")  # ConvergenceWarning

    def arrays(name):
        x = read(f"{name}-images-idx3", 16).reshape(-1, 784) / np.float32(255)
        return x, read(f"{name}-labels-idx1", 8)

    network = MLPClassifier(
        [128], solver="sgd", alpha=0.0, momentum=0.0, batch_size=BATCH, learning_rate_init=RATE, max_iter=EPOCHS
    )
    return network.fit(*arrays("train")).score(*arrays("t10k"))


PROCESSES = {"fcfunc": by_fcfunc, "PyTorch": by_torch, "scikit-learn": by_sklearn}

if __name__ == "__main__":
    print(json.dumps(stages()) if sys.argv[1] == "stages" else f"test accuracy {PROCESSES[sys.argv[1]]():.4f}")
