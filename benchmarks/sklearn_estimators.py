"""Compares the estimators with scikit-learn's: seconds of `fit`, including compilation, and accuracy.

    python -m benchmarks.sklearn_estimators

Each run is a separate process. The first `fit` compiles. The second, with another seed, reuses the compiled program,
as in a search or cross-validation. The seconds are those of `fit` alone, without imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings

import numpy as np

from fcfunc import data

SETUPS = {
    "digits, 64-128-10, batch 32, 100 epochs": (
        "digits", {"hidden_layer_sizes": (128,), "batch_size": 32, "max_iter": 100},
    ),
    "digits, 64-100-10, batch 200, 100 epochs": ("digits", {"batch_size": 200, "max_iter": 100}),
    "Fashion-MNIST, 784-128-10, batch 128, 10 epochs": (
        "fashion", {"hidden_layer_sizes": (128,), "batch_size": 128, "max_iter": 10},
    ),
}  # fmt: skip


def examples(name: str):
    """Inputs in [0, 1] and labels, for training and for testing."""
    if name == "digits":
        whole = data.digits()
        training, test = data.split(whole, (0.8, 0.2), seed=0, stratify=whole.y)
    else:
        training, test = data.fashion_mnist()
    return [(part.x.reshape(len(part.x), -1).astype(np.float32), part.y) for part in (training, test)]


def run(library: str, setup: str, seed: int) -> dict:
    """The seconds of two fits and the test accuracy of the first."""
    if library == "fcfunc":
        from fcfunc.sklearn import MLPClassifier
    else:
        from sklearn.neural_network import MLPClassifier
    name, options = SETUPS[setup]
    training, test = examples(name)
    scale = max(1.0, float(training[0].max()))
    seconds, accuracy = [], 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ConvergenceWarning
        for i in range(2):
            model = MLPClassifier(random_state=seed + 100 * i, tol=0.0, n_iter_no_change=10**6, **options)
            start = time.perf_counter()
            model.fit(training[0] / np.float32(scale), training[1])
            seconds.append(time.perf_counter() - start)
            accuracy = accuracy or float(model.score(test[0] / np.float32(scale), test[1]))
    return {"first": seconds[0], "second": seconds[1], "accuracy": accuracy}


def main(argv=None) -> None:
    """Prints the table, or one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--run", nargs=3, metavar=("LIBRARY", "SETUP", "SEED"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    if options.run:
        print(json.dumps(run(options.run[0], options.run[1], int(options.run[2]))))
        return
    columns = ("", "scikit-learn, s", "first fit, s", "second fit, s", "ratio, first", "second", "accuracy", "fcfunc")
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|")
    for setup in SETUPS:
        runs = {"scikit-learn": [], "fcfunc": []}
        for seed in range(options.seeds):
            for library, found in runs.items():
                command = [sys.executable, "-m", "benchmarks.sklearn_estimators", "--run", library, setup, str(seed)]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

        def of(library, what, runs=runs):
            return [one[what] for one in runs[library]]

        theirs, first, second = of("scikit-learn", "first"), of("fcfunc", "first"), of("fcfunc", "second")
        ratios = [statistics.median([t / o for t, o in zip(theirs, ours, strict=True)]) for ours in (first, second)]
        seconds = [f"{statistics.median(a):.2f}" for a in (theirs, first, second)]
        accuracies = [
            f"{statistics.mean(a):.4f} ± {statistics.stdev(a):.4f}"
            for a in (of("scikit-learn", "accuracy"), of("fcfunc", "accuracy"))
        ]
        print(
            f"| {setup} | {' | '.join(seconds)} | {ratios[0]:.2f} | {ratios[1]:.2f} | {' | '.join(accuracies)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
