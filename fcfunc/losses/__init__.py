"""Per-example losses and an L2 penalty, with hand-written backward rules.

A loss function returns one number per example, and the caller takes the mean: `jnp.mean(loss(...))`. Losses are
computed and returned in at least float32 for any dtype of the network's output; gradients have that output's dtype.
Where optax has the same loss, names and argument order match. Nothing is broadcast: `[N]` against `[N, 1]` raises.

**Impossible labels.** A label outside `[0, classes)` makes both the loss and the gradient of its row NaN. It never
selects another class or gives a finite number. To mask rows by their label, pass that label as `ignore_index`: such a
row has zero loss and zero gradient for any scores. The mean over the other rows is then
`sum(loss) / sum(labels != ignore_index)`.
"""

# ruff: noqa: I001, RUF022  (one rule per line)
from fcfunc.losses._cross_entropy import (
    sigmoid_binary_cross_entropy, sigmoid_binary_cross_entropy_fwd, sigmoid_binary_cross_entropy_bwd,
    softmax_cross_entropy, softmax_cross_entropy_fwd, softmax_cross_entropy_bwd,
    softmax_cross_entropy_with_integer_labels,
    softmax_cross_entropy_with_integer_labels_fwd,
    softmax_cross_entropy_with_integer_labels_bwd,
)  # fmt: skip
from fcfunc.losses._large_output import (
    linear_softmax_cross_entropy, linear_softmax_cross_entropy_fwd, linear_softmax_cross_entropy_bwd,
)  # fmt: skip
from fcfunc.losses._simple import (
    l2_penalty, l2_penalty_fwd, l2_penalty_bwd,
    mean,
    multiclass_svm, multiclass_svm_fwd, multiclass_svm_bwd,
    negative_log_likelihood, negative_log_likelihood_fwd, negative_log_likelihood_bwd,
    squared_error, squared_error_fwd, squared_error_bwd,
)  # fmt: skip

__all__ = [
    "l2_penalty", "l2_penalty_fwd", "l2_penalty_bwd",
    "linear_softmax_cross_entropy", "linear_softmax_cross_entropy_fwd", "linear_softmax_cross_entropy_bwd",
    "mean",
    "multiclass_svm", "multiclass_svm_fwd", "multiclass_svm_bwd",
    "negative_log_likelihood", "negative_log_likelihood_fwd", "negative_log_likelihood_bwd",
    "sigmoid_binary_cross_entropy", "sigmoid_binary_cross_entropy_fwd", "sigmoid_binary_cross_entropy_bwd",
    "softmax_cross_entropy", "softmax_cross_entropy_fwd", "softmax_cross_entropy_bwd",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy_with_integer_labels_fwd",
    "softmax_cross_entropy_with_integer_labels_bwd",
    "squared_error", "squared_error_fwd", "squared_error_bwd",
]  # fmt: skip
