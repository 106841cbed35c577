"""Per-example losses and a penalty, with hand-written backward rules.

A loss is one number per example; the mean is taken where the loss is used: `jnp.mean(loss(...))`. Losses are
computed and returned in at least float32, whatever the dtype of the network's output; gradients come back in that
output's dtype. Names and order of arguments are optax's where optax has the loss. Nothing is broadcast: `[N]`
against `[N, 1]` raises.

**Impossible labels.** A label outside `[0, classes)` makes the loss AND the gradient of its row NaN: never another
class, never a finite number. Only the label given as `ignore_index` stands for "no loss": its row has loss 0 and
gradient 0, whatever its scores are. The mean over the other rows is then `sum(loss) / sum(labels != ignore_index)`.
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
