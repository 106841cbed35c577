"""Networks of other libraries: random networks in both directions, and modules that were not made here."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcfunc
from fcfunc import convert
from tests.helpers import drawn_network, predicted
from tests.rules import slow

LIBRARIES = ("torch", "flax", "nnx", "equinox", "keras")
DRAWS = 40
"""Networks drawn for each library: 200 in all."""


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def drawn(seed: int, library: str):
    """A random network with random parameters and running statistics, and inputs to try it on."""
    return drawn_network(np.random.default_rng([seed, LIBRARIES.index(library)]))


def there(library, net, params, state):
    """Converts a network to a module of another library."""
    if library == "flax":
        return convert.to_flax(net, params, state)
    if library == "nnx":
        return convert.to_nnx(net, params, state)
    made = {"torch": convert.to_torch, "equinox": convert.to_equinox, "keras": convert.to_keras}
    return made[library](net, params, state)


def back(library, module):
    if library == "flax" or (library == "equinox" and isinstance(module, tuple)):
        return getattr(convert, f"from_{library}")(*module)
    return getattr(convert, f"from_{'flax' if library == 'nnx' else library}")(module)


def outputs_and_gradients(library, module, x, g):
    """The predictions of a module, and the gradients of `sum(g * outputs)` with respect to x and its parameters."""
    if library == "torch":
        import torch

        module.eval().zero_grad()
        rows = torch.from_numpy(x).requires_grad_()
        outputs = module(rows)
        (outputs * torch.from_numpy(g)).sum().backward()
        gradients = [p.grad.numpy() for p in module.parameters()]
        return outputs.detach().numpy(), rows.grad.numpy(), gradients
    if library == "flax":
        module, variables = module
        parameters, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        run = lambda parameters, x: module.apply({"params": parameters, **rest}, x)
    elif library == "nnx":
        from flax import nnx

        module.eval()
        graph, parameters, rest = nnx.split(module, nnx.Param, ...)
        run = lambda parameters, x: nnx.merge(graph, parameters, rest)(x)
    elif library == "equinox":
        import equinox as eqx

        module, state = module if isinstance(module, tuple) else (module, None)
        parameters, static = eqx.partition(eqx.nn.inference_mode(module), eqx.is_inexact_array)

        def run(parameters, x):
            whole = eqx.combine(parameters, static)
            if state is None:
                return jax.vmap(lambda x: whole(x))(x)
            return jax.vmap(lambda x: whole(x, state)[0], axis_name="batch")(x)
    else:
        parameters, rest = (
            [v.value for v in module.trainable_variables],
            [v.value for v in module.non_trainable_variables],
        )
        run = lambda parameters, x: module.stateless_call(parameters, rest, x, training=False)[0]
    outputs, (of_params, of_x) = compiled(run, g)(parameters, jnp.asarray(x))
    return np.asarray(outputs), np.asarray(of_x), [np.asarray(a) for a in jax.tree.leaves(of_params)]


def compiled(run, g):
    """`(parameters, x) -> (outputs, gradients of sum(g * outputs))` as one program; one per operation is slower."""

    @jax.jit
    def program(*args):
        outputs, pull = jax.vjp(run, *args)
        return outputs, pull(g)

    return program


def sizes(gradients):
    """The size and norm of each gradient, in an order that does not depend on names and layouts."""
    return sorted((a.size, float(np.linalg.norm(a))) for a in gradients if a.size)


@pytest.mark.parametrize("seed", [seed if seed < 6 else slow(seed) for seed in range(DRAWS)])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_drawn_network_computes_the_same_there_and_comes_back(library, seed):
    pytest.importorskip("flax" if library == "nnx" else library)
    net, params, state, x = drawn(seed, library)
    module = there(library, net, params, state)
    g = np.random.default_rng(seed).standard_normal((6, net.dims[-1])).astype(np.float32)
    theirs, of_x, of_params = outputs_and_gradients(library, module, x, g)
    run = lambda params, x: predicted(net, params, state, x)
    outputs, (expected_params, expected_x) = compiled(run, g)(params, jnp.asarray(x))
    near = {"rtol": 3e-5, "atol": 3e-5}
    np.testing.assert_allclose(theirs, outputs, **near)
    np.testing.assert_allclose(of_x, expected_x, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(sizes(of_params), sizes(jax.tree.leaves(expected_params)), rtol=1e-3, atol=1e-3)
    new_net, new_params, new_state = back(library, module)
    again = jax.jit(predicted, static_argnums=0)(new_net, new_params, new_state, x)
    np.testing.assert_allclose(again, outputs, **near)
    assert (new_net.dims, new_net.norm, new_net.dropout_rate) == (net.dims, net.norm, net.dropout_rate)
    assert new_net.use_bias == net.use_bias
    jax.tree.map(np.testing.assert_array_equal, new_params, params)


@pytest.mark.parametrize("library", LIBRARIES)
def test_float64_networks_stay_float64(library):
    pytest.importorskip("flax" if library == "nnx" else library)
    if library == "keras":
        pytest.skip("Keras computes in its floatx")
    with jax.enable_x64(True):
        net = fcfunc.mlp([3, 5, 2], activation="tanh", norm="layer_norm")
        params = net.init(jax.random.key(0), param_dtype="float64")
        new_net, new_params, _ = back(library, there(library, net, params, []))
        assert new_params[0]["w"].dtype == jnp.float64
        x = np.random.default_rng(0).standard_normal((4, 3))
        np.testing.assert_allclose(new_net.apply(new_params, x), net.apply(params, x), rtol=1e-14)


class TestTorch:
    @pytest.fixture(autouse=True)
    def library(self):
        self.torch = pytest.importorskip("torch")
        self.torch.manual_seed(0)

    def test_a_custom_module_is_read_in_the_order_of_its_layers(self):
        torch, nn = self.torch, self.torch.nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.drop = nn.Linear(4, 6), nn.Linear(6, 3, bias=False), nn.Dropout(0.0)

            def forward(self, x):
                return self.second(torch.relu(self.first(x)))

        module = Net()
        net, params, state = convert.from_torch(module, activation="relu")
        x = torch.randn(5, 4)
        np.testing.assert_allclose(net.apply(params, x.numpy()), module(x).detach().numpy(), rtol=1e-5, atol=1e-6)
        assert module.training
        assert state == ()
        with pytest.raises(ValueError, match="does not simply apply its layers in order"):
            convert.from_torch(module)
        with pytest.raises(ValueError, match="does not simply apply its layers in order"):
            convert.from_torch(module, activation="tanh")

    def test_a_state_dict_in_alphabetical_order_is_put_in_the_order_of_its_numbers(self):
        nn = self.torch.nn
        module = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())))[:-1]
        as_saved = {name: a.numpy() for name, a in sorted(module.state_dict().items())}  # as in a safetensors file
        net, params, _ = convert.from_torch(as_saved, activation="tanh")
        x = self.torch.randn(5, 4)
        np.testing.assert_allclose(net.apply(params, x.numpy()), module(x).detach(), rtol=1e-5, atol=1e-6)

    def test_a_state_dict_of_unknown_order_needs_the_names_of_its_layers(self):
        nn = self.torch.nn
        module = nn.Sequential()
        for name in ("first", "middle", "head"):
            module.add_module(name, nn.Linear(4, 4))
        as_saved = dict(sorted(module.state_dict().items()))
        with pytest.raises(TypeError, match="the order of the layers first, head, middle is not known"):
            convert.from_torch(as_saved, activation="linear")
        with pytest.raises(ValueError, match="layer_names must list first, head, middle in order"):
            convert.from_torch(as_saved, activation="linear", layer_names=["first", "head"])
        net, params, _ = convert.from_torch(as_saved, activation="linear", layer_names=["first", "middle", "head"])
        x = self.torch.randn(5, 4)
        np.testing.assert_allclose(net.apply(params, x.numpy()), module(x).detach(), rtol=1e-5, atol=1e-6)

    def test_a_module_that_is_used_twice_is_read_twice(self):
        nn = self.torch.nn
        act, drop = nn.Tanh(), nn.Dropout(0.5)
        module = nn.Sequential(nn.Linear(4, 5), act, drop, nn.Linear(5, 5), act, drop, nn.Linear(5, 2))
        net, _, _ = convert.from_torch(module)
        assert (net.activation, net.dropout_rate) == ("tanh", 0.5)

    def test_shared_weights_are_refused(self):
        nn = self.torch.nn
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        module[2].weight = module[0].weight
        with pytest.raises(
            ValueError, match=r"2.weight and 0.weight are the same tensor; shared weights cannot be represented"
        ):
            convert.from_torch(module)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_running_statistics_in_half_precision_become_float32(self, dtype):
        nn = self.torch.nn
        layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)]
        module = nn.Sequential(*layers).to(getattr(self.torch, dtype))
        net, params, state = convert.from_torch(module)
        assert [a.dtype for a in jax.tree.leaves(state)] == [jnp.float32, jnp.float32]
        convert.from_torch(convert.to_torch(net, params, state))
        convert.to_equinox(net, params, state)

    def test_a_state_dict_with_norms_is_the_network_of_its_module(self):
        torch, nn = self.torch, self.torch.nn
        blocks = [
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Linear(5, 3),
        ]
        module = nn.Sequential(*blocks)
        for _ in range(3):
            module(torch.randn(9, 4))
        net, params, state = convert.from_torch(module.state_dict(), activation="relu")
        x = torch.randn(5, 4)
        expected = module.eval()(x).detach().numpy()
        np.testing.assert_allclose(predicted(net, params, state, x.numpy()), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(TypeError, match="a state dict does not contain the activations"):
            convert.from_torch(module.state_dict())

    def test_training_on_keeps_the_running_statistics_of_torch(self):
        torch, nn = self.torch, self.torch.nn
        module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        net, params, state = convert.from_torch(module)
        for _ in range(4):
            x = torch.randn(9, 4)
            outputs, state = net.apply_batch_norm(params, state, x.numpy(), training=True)
            np.testing.assert_allclose(outputs, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[0]["mean"], module[1].running_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[0]["var"], module[1].running_var, rtol=1e-5)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (lambda nn: [nn.Conv1d(1, 2, 3)], r"0 \(Conv1d\) cannot be represented"),
            (lambda nn: [nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)], r"1 \(PReLU\) cannot be represented"),
            (
                lambda nn: [nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2)],
                "2: norm cannot be represented here",
            ),
            (lambda nn: [nn.LayerNorm(3), nn.Linear(3, 4)], "0: norm before the first affine layer"),
            (lambda nn: [nn.Linear(3, 4), nn.LayerNorm(4)], "1: a norm after the last affine layer"),
            (
                lambda nn: [nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)],
                "all hidden layers must have the same norm",
            ),
            (lambda nn: [nn.Linear(3, 4), nn.Linear(5, 2)], "1 expects 5 inputs, but 0 before it has 4 outputs"),
            (
                lambda nn: [nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)],
                "without running",
            ),
            (lambda nn: [nn.ReLU()], "activation before the first affine layer"),
            (lambda nn: [nn.Bilinear(3, 3, 2)], r"0 \(Bilinear\)"),
            (lambda nn: [nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)], r"1 \(GroupNorm\)"),
            (lambda nn: [nn.Linear(3, 4), nn.Softplus(beta=2), nn.Linear(4, 2)], r"1 \(Softplus\)"),
            (
                lambda nn: [nn.MultiheadAttention(4, 2)],
                r"0 \(MultiheadAttention\)|does not simply apply its layers|cannot be called",
            ),
        ],
    )
    def test_what_cannot_be_represented_is_named(self, layers, message):
        with pytest.raises(ValueError, match=message):
            convert.from_torch(self.torch.nn.Sequential(*layers(self.torch.nn)))

    def test_a_parallel_branch_is_found_by_running_it(self):
        nn = self.torch.nn

        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.one(x) + self.two(x)

        with pytest.raises(ValueError, match="does not simply apply its layers in order"):
            convert.from_torch(Branches())

    def test_bfloat16_weights_keep_their_dtype(self):
        torch, nn = self.torch, self.torch.nn
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(torch.bfloat16)
        net, params, _ = convert.from_torch(module)
        assert params[0]["w"].dtype == jnp.bfloat16
        again = convert.to_torch(net, params)
        assert again[0].weight.dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))

    def test_residual_connections_are_refused(self):
        net = fcfunc.mlp([3, 4, 4, 2], residual=True)
        with pytest.raises(ValueError, match="to_torch: the residual connection of layer 1 cannot be represented"):
            convert.to_torch(net, net.init(jax.random.key(0)))

    def test_stacked_params_are_unstacked(self):
        torch = self.torch
        net = fcfunc.mlp([3, 4, 4, 4, 2])
        params = net.init(jax.random.key(0))
        stacked = convert.to_torch(net, fcfunc.stack(params))
        x = torch.randn(5, 3)
        assert torch.equal(stacked(x), convert.to_torch(net, params)(x))


class TestFlax:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("flax")

    def test_a_compact_module_is_read_as_it_is_called(self):
        from flax import linen

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x, training: bool):
                for width in (6, 5):
                    x = linen.Dense(width, use_bias=False)(x)
                    x = linen.BatchNorm(use_running_average=not training, momentum=0.9)(x)
                    x = linen.Dropout(0.1, deterministic=not training)(linen.silu(x))
                return linen.Dense(3)(x)

        module, x = Net(), np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
        variables = module.init(jax.random.key(0), x, training=False)
        keys = {"rngs": {"dropout": jax.random.key(1)}}
        for _ in range(3):
            _, updated = module.apply(variables, x, training=True, mutable=["batch_stats"], **keys)
            variables = {**variables, **updated}
        net, params, state = convert.from_flax(module, variables, activation="silu")
        assert (net.activation, net.norm, net.dropout_rate, net.use_bias) == ("silu", "batch_norm", 0.1, True)
        expected = module.apply(variables, x, training=False)
        np.testing.assert_allclose(predicted(net, params, state, x), expected, rtol=1e-5, atol=1e-6)
        _, after = net.apply_batch_norm(
            params, state, x, training=True, decay=0.9, unbiased_variance=False, key=None,
        )  # fmt: skip
        _, updated = module.apply(variables, x, training=True, mutable=["batch_stats"], **keys)
        theirs = updated["batch_stats"]["BatchNorm_0"]
        np.testing.assert_allclose(after[0]["var"], theirs["var"], rtol=1e-4)

    def test_a_linen_module_is_told_that_it_predicts_and_may_hold_a_sequential(self):
        from flax import linen

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x, train=True):
                x = linen.Dense(8)(x)
                x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
                return linen.Sequential([linen.Dropout(0.5, deterministic=not train), linen.Dense(3)])(x)

        module, keys = Net(), dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))
        net, _, _ = convert.from_flax(module, module.init(keys, jnp.ones((2, 4))), activation="relu")
        assert (net.dims, net.norm, net.dropout_rate) == ((4, 8, 3), "batch_norm", 0.5)

    def test_layers_that_are_made_in_reverse_are_read_as_they_are_called(self):
        from flax import linen

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x):
                return linen.Dense(2)(linen.relu(linen.Dense(8)(x)))  # the outer one is made first

        variables = Net().init(jax.random.key(0), jnp.ones((1, 3)))
        assert convert.from_flax(Net(), variables, activation="relu")[0].dims == (3, 8, 2)
        with pytest.raises(TypeError, match="variables must have the key 'params', got Dense_1, Dense_0"):
            convert.from_flax(Net(), variables["params"], activation="relu")

    def test_an_adapter_of_nnx_is_refused(self):
        from flax import nnx

        module = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"layers.0 \(LoRALinear\) cannot be represented"):
            convert.from_flax(nnx.Sequential(module))

    def test_a_custom_nnx_module_is_read_by_its_attributes(self):
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.first, self.norm = nnx.Linear(4, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
                self.last = nnx.Linear(6, 3, rngs=rngs)

            def __call__(self, x):
                return self.last(nnx.gelu(self.norm(self.first(x))))

        module, x = Net(nnx.Rngs(0)), np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
        net, params, _ = convert.from_flax(module, activation="gelu")
        assert net.norm_eps == 1e-6
        np.testing.assert_allclose(net.apply(params, x), module(x), rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="does not simply apply its layers in order"):
            convert.from_flax(module, activation="relu")

    def test_what_cannot_be_represented_is_named(self):
        from flax import linen

        module = linen.Sequential([linen.Dense(4), linen.GroupNorm(2), linen.Dense(2)])
        with pytest.raises(ValueError, match=r"layers_1 \(GroupNorm\) cannot be represented"):
            convert.from_flax(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
        with pytest.raises(TypeError, match="a linen module needs its variables"):
            convert.from_flax(module)
        with pytest.raises(TypeError, match=r"module must be a flax\.linen or flax\.nnx module, got dict"):
            convert.from_flax({})


class TestEquinox:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("equinox")

    @pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu, jnp.tanh, jax.nn.selu])
    @pytest.mark.parametrize("final", [None, jax.nn.sigmoid])
    def test_a_multilayer_perceptron_keeps_its_activations(self, activation, final):
        import equinox as eqx

        options = {} if final is None else {"final_activation": final}
        module = eqx.nn.MLP(4, 3, 7, 2, activation, use_final_bias=False, key=jax.random.key(0), **options)
        net, params, _ = convert.from_equinox(module)
        x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
        np.testing.assert_allclose(net.apply(params, x), jax.vmap(module)(x), rtol=1e-5, atol=1e-6)
        assert net.final_activation == (None if final is None else "sigmoid")

    def test_a_function_that_is_the_identity_on_small_numbers_alone_is_kept(self):
        import equinox as eqx

        module = eqx.nn.MLP(4, 2, 8, 1, final_activation=lambda z: jnp.clip(z, -3.0, 3.0), key=jax.random.key(0))
        net, params, _ = convert.from_equinox(module)
        x = 100 * jax.random.normal(jax.random.key(1), (5, 4))
        np.testing.assert_allclose(net.apply(params, x), jax.vmap(module)(x), rtol=1e-5, atol=1e-5)

    def test_batch_normalization_in_both_modes_is_read_from_its_state(self):
        import equinox as eqx

        for mode in ("ema", "batch"):
            keys = jax.random.split(jax.random.key(0), 2)

            def make(keys=keys, mode=mode):
                norm = eqx.nn.BatchNorm(6, "batch", mode=mode)
                layers = [eqx.nn.Linear(4, 6, key=keys[0]), norm, eqx.nn.Lambda(jax.nn.relu)]
                return eqx.nn.Sequential([*layers, eqx.nn.Linear(6, 3, key=keys[1])])

            module, state = eqx.nn.make_with_state(make)()
            x = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
            run = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            for _ in range(3):
                _, state = run(x, state)
            net, params, new_state = convert.from_equinox(module, state)
            expected = jax.vmap(eqx.nn.inference_mode(module), axis_name="batch", in_axes=(0, None))(x, state)[0]
            np.testing.assert_allclose(predicted(net, params, new_state, x), expected, rtol=1e-5, atol=1e-5)

    def test_what_cannot_be_represented_is_named(self):
        import equinox as eqx

        key = jax.random.key(0)
        module = eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=key), eqx.nn.PReLU(), eqx.nn.Linear(4, 2, key=key)])
        with pytest.raises(ValueError, match=r"layers\[1\] \(PReLU\) cannot be represented"):
            convert.from_equinox(module)
        with pytest.raises(ValueError, match="scalar inputs or outputs cannot be represented"):
            convert.from_equinox(eqx.nn.MLP(3, "scalar", 4, 1, key=key))


class TestKeras:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("keras")

    def test_a_model_with_the_defaults_of_keras_is_the_same_network(self):
        import keras

        of = keras.layers
        layers = [
            of.Dense(6, activation="gelu"),
            of.Dense(6, activation="leaky_relu"),
            of.Dense(3, activation="softmax"),
        ]
        model = keras.Sequential([keras.Input((4,)), *layers])
        net, params, _ = convert.from_keras(model)
        assert net.activation == ("gelu_exact", ("leaky_relu", 0.2))
        x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
        np.testing.assert_allclose(net.apply(params, x), model(x), rtol=1e-5, atol=1e-6)

    def test_a_leading_flatten_takes_the_shape_of_the_model(self):
        import keras

        layers = [keras.Input((6, 5)), keras.layers.Flatten(), keras.layers.Dense(4, "relu"), keras.layers.Dense(2)]
        assert convert.from_keras(keras.Sequential(layers))[0].dims == (30, 4, 2)

    @pytest.mark.filterwarnings("ignore:__array__ implementation")  # from Keras
    def test_a_saved_model_with_the_tanh_gelu_is_loaded_as_the_docs_say(self, tmp_path):
        import keras

        net = fcfunc.mlp([3, 4, 2], activation="gelu")
        model = convert.to_keras(net, net.init(jax.random.key(0)))
        model.save(tmp_path / "net.keras")
        objects = {"gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True)}
        loaded = keras.saving.load_model(tmp_path / "net.keras", custom_objects=objects)
        x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
        np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(made(x)) for made in (loaded, model)))

    def test_a_functional_model_with_norms_after_training_is_the_same_network(self):
        import keras

        of, inputs = keras.layers, keras.Input((4,))
        h = of.Activation("silu")(of.BatchNormalization()(of.Dense(6, use_bias=False)(inputs)))
        model = keras.Model(inputs, of.Dense(3)(of.Dropout(0.2)(h)))
        x = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
        model(x, training=True)
        net, params, state = convert.from_keras(model)
        assert (net.norm_eps, net.dropout_rate) == (1e-3, 0.2)
        np.testing.assert_allclose(predicted(net, params, state, x), model(x, training=False), rtol=1e-5, atol=1e-5)
        model(x, training=True)
        _, after = net.apply_batch_norm(
            params, state, x, training=True, decay=0.99, unbiased_variance=False, key=None,
        )  # fmt: skip
        np.testing.assert_allclose(after[0]["var"], model.layers[2].moving_variance, rtol=1e-5)

    def test_branches_and_other_layers_are_refused(self):
        import keras

        of, inputs = keras.layers, keras.Input((4,))
        model = keras.Model(inputs, of.Add()([of.Dense(3)(inputs), of.Dense(3)(inputs)]))
        with pytest.raises(ValueError, match=r"\(Add\) cannot be represented"):
            convert.from_keras(model)
        with pytest.raises(TypeError, match="the model has no weights yet"):
            convert.from_keras(keras.Sequential([of.Dense(3)]))
        with pytest.raises(TypeError, match="model must be a Keras model, got Dense"):
            convert.from_keras(of.Dense(3))


class TestSklearn:
    @pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
    @pytest.mark.parametrize("classes", [2, 3])
    def test_a_classifier_comes_and_goes_with_its_probabilities(self, classes, activation):
        from sklearn.datasets import make_classification
        from sklearn.neural_network import MLPClassifier

        x, y = make_classification(60, 6, n_informative=4, n_classes=classes, random_state=0)
        model = MLPClassifier((7, 5), activation, solver="lbfgs", tol=0.1, random_state=0).fit(
            x, np.array(list("abc"))[y]
        )
        with jax.enable_x64(True):
            net, params, _ = convert.from_sklearn(model)
            expected = model.predict_proba(x)
            np.testing.assert_allclose(net.apply(params, x), expected if classes == 3 else expected[:, 1:], rtol=1e-10)
            again = convert.to_sklearn(net, params, classes=list(model.classes_))
        np.testing.assert_allclose(again.predict_proba(x), expected, rtol=1e-10)
        np.testing.assert_array_equal(again.predict(x), model.predict(x))

    def test_our_own_estimators_and_regressors_are_taken_too(self):
        from sklearn.datasets import load_diabetes

        from fcfunc.sklearn import MLPRegressor

        x, y = load_diabetes(return_X_y=True)
        model = MLPRegressor(hidden_layer_sizes=(5,), solver="lbfgs", tol=1e3, random_state=0).fit(
            x.astype(np.float32), y
        )
        net, params, _ = convert.from_sklearn(model)
        np.testing.assert_allclose(
            net.apply(params, x.astype(np.float32))[:, 0], model.predict(x.astype(np.float32)), rtol=1e-5
        )
        again = convert.to_sklearn(net, params)
        np.testing.assert_allclose(again.predict(x.astype(np.float32)), model.predict(x.astype(np.float32)), rtol=1e-4)

    @pytest.mark.parametrize(
        "options", [{"norm": "layer_norm"}, {"norm": "batch_norm"}, {"residual": True}, {"activation": "gelu"}]
    )
    def test_estimators_of_fcfunc_keep_what_scikit_learn_does_not_have(self, options):
        from fcfunc.sklearn import MLPClassifier

        x = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
        model = MLPClassifier((6, 6), max_iter=1, random_state=0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about convergence
            model.fit(x, np.arange(60) % 3)
        net, params, state = convert.from_sklearn(model)
        if state:
            outputs, _ = net.apply_batch_norm(params, state, x, training=False)
        else:
            outputs = net.apply(params, x)
        np.testing.assert_allclose(outputs, model.predict_proba(x), rtol=1e-5, atol=1e-6)

    def test_an_estimator_of_scikit_learn_can_be_trained_on(self):
        net = fcfunc.mlp([4, 6, 3])
        model = convert.to_sklearn(net, net.init(jax.random.key(0)), classes=[0, 1, 2])
        x = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
        before = model.coefs_[0].copy()
        model.partial_fit(x, np.arange(60) % 3)
        assert np.abs(model.coefs_[0] - before).max() > 0

    def test_what_scikit_learn_does_not_have_is_refused(self):
        net = fcfunc.mlp([3, 4, 2], activation="gelu")
        with pytest.raises(ValueError, match="all hidden layers must use one of identity, logistic"):
            convert.to_sklearn(net, net.init(jax.random.key(0)))
        net = fcfunc.mlp([3, 4, 2], norm="layer_norm")
        with pytest.raises(ValueError, match="neither norms nor dropout, got layer_norm"):
            convert.to_sklearn(net, net.init(jax.random.key(0)))
        with pytest.raises(TypeError, match="estimator must be a fitted MLPClassifier or MLPRegressor, got str"):
            convert.from_sklearn("model")


@pytest.mark.parametrize("name", ["torch", "flax", "equinox", "keras"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(name, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"is not installed; pip install {name}"):
        getattr(convert, f"from_{name}")(None)


def test_stacked_running_statistics_are_unstacked():
    pytest.importorskip("flax")
    net = fcfunc.mlp([3, 5, 5, 5, 2], norm="batch_norm")
    params = fcfunc.stack(net.init(jax.random.key(0)))
    x = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    _, state = net.apply_batch_norm(params, net.init_batch_norm_state(params), x, training=True)
    module, variables = convert.to_flax(net, params, state)
    np.testing.assert_allclose(module.apply(variables, x), predicted(net, params, state, x), rtol=1e-5, atol=1e-5)


def test_params_of_another_network_are_refused():
    pytest.importorskip("flax")
    net, other = fcfunc.mlp([3, 4, 2]), fcfunc.mlp([3, 5, 2])
    with pytest.raises(ValueError, match=r"to_flax: params must match the network, \[3, 4, 2\]"):
        convert.to_flax(net, other.init(jax.random.key(0)))
    with pytest.raises(TypeError, match="to_flax: net must be a Network"):
        convert.to_flax(None, [])  # type: ignore[arg-type]
