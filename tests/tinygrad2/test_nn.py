import math

import numpy as np
import pytest

from tests.stand_ins import strict_cupy
from tinygrad2 import Key, Tensor, functional, nn, no_grad, ops, optim, random
from tinygrad2.precision import BFLOAT16_WEIGHTS, FLOAT32

R = np.random.default_rng(0)


class MLP(nn.Module):
    def __init__(self):
        self.name = "not a parameter"
        self.layers = [nn.Linear(3, 4), nn.Linear(4, 2, bias=False)]
        self.grid = [[nn.LayerNorm(2)], [nn.LayerNorm(2)]]
        self.norm = nn.LayerNorm(2)


def test_names_are_paths_in_the_order_of_registration():
    model = MLP()
    assert [name for name, _ in model.named_parameters()] == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "grid.0.0.weight",
        "grid.0.0.bias",
        "grid.1.0.weight",
        "grid.1.0.bias",
        "norm.weight",
        "norm.bias",
    ]
    named = dict(model.named_parameters())
    assert named["layers.1.weight"] is model.layers[1].weight
    assert [id(p) for p in model.parameters()] == [id(p) for p in named.values()]


def test_n_parameters_counts_all_elements():
    assert nn.Linear(3, 4).n_parameters() == 16
    assert nn.Linear(3, 4, bias=False).n_parameters() == 12
    assert nn.LayerNorm(5).n_parameters() == 10
    assert nn.Embedding(7, 2).n_parameters() == 14


def test_layers_equal_their_operations():
    x, tokens = Tensor(R.normal(size=(2, 5, 3))), np.array([[1, 0, 1]])
    linear, norm = nn.Linear(3, 4, precision="float64"), nn.LayerNorm(3, eps=0.1, precision="float64")
    linear.bias.data = R.normal(size=4)
    norm.weight.data, norm.bias.data = R.normal(size=3), R.normal(size=3)
    table = nn.Embedding(7, 2)
    np.testing.assert_array_equal(linear(x).data, ops.linear(x, linear.weight, linear.bias).data)
    np.testing.assert_array_equal(norm(x).data, ops.layernorm(x, norm.weight, norm.bias, 0.1).data)
    s, y = norm.add_and_normalize(x, x)
    np.testing.assert_array_equal(s.data, 2 * x.data)
    np.testing.assert_array_equal(y.data, norm(s).data)
    np.testing.assert_array_equal(table(tokens).data, table.weight.data[tokens])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_default_initial_values(dtype):
    linear, norm, table = (
        nn.Linear(400, 100, precision=dtype),
        nn.LayerNorm(4, precision=dtype),
        nn.Embedding(400, 90, precision=dtype),
    )
    assert linear.weight.data.std() == pytest.approx(1 / math.sqrt(400), rel=0.03)
    assert table.weight.data.std() == pytest.approx(0.02, rel=0.03)
    assert not linear.bias.data.any()
    np.testing.assert_array_equal(norm.weight.data, np.ones(4))
    np.testing.assert_array_equal(norm.bias.data, np.zeros(4))
    assert {p.dtype for layer in (linear, norm, table) for p in layer.parameters()} == {np.dtype(dtype)}


def test_init_arguments():
    key = Key(5, site=2)
    np.testing.assert_array_equal(nn.normal_init(0.3, key)((2, 3)), random.normal(key, (2, 3), 0.3))
    layer = nn.Linear(2, 3, init=nn.normal_init(0.3, key))
    np.testing.assert_array_equal(layer.weight.data, random.normal(key, (2, 3), 0.3).astype("float32"))
    assert not nn.Embedding(2, 3, init=nn.zeros_init).weight.data.any()


def test_a_network_learns():
    """A small network fits a function, so layers and gradients work together."""
    net = [nn.Linear(1, 16, precision="float64"), nn.Linear(16, 1, precision="float64")]
    x = Tensor(np.linspace(-2, 2, 32)[:, None])
    losses = []
    for _ in range(300):
        loss = ((net[1](net[0](x).tanh()) - np.sin(2 * x.data)) ** 2).mean()
        for layer in net:
            layer.zero_grad()
        loss.backward()
        for p in (p for layer in net for p in layer.parameters()):
            p.data = p.data - 0.1 * p.grad
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_unsupported_dtypes_and_devices_are_rejected():
    names = "float32, tf32, bfloat16, float64, bfloat16_weights"
    for name in ("int8", np.int8, "float16", "fp32"):
        with pytest.raises(ValueError, match=rf"^dtype '\w+' is not supported; choose one of {names}$"):
            nn.Linear(1, 1, precision=name)
    with pytest.raises(ValueError, match=r"^Embedding: tf32 needs a GPU$"):
        nn.Embedding(1, 1, precision="tf32")
    with pytest.raises(ValueError, match=r"^device 'tpu' is unknown; choose one of auto, cpu, cuda$"):
        nn.LayerNorm(1, device="tpu")


def test_a_shared_parameter_is_listed_once_under_its_first_name():
    class Tied(nn.Module):
        def __init__(self):
            self.encode = nn.Linear(3, 3)
            self.decode = nn.Linear(3, 3)
            self.decode.weight = self.encode.weight

    model = Tied()
    assert [name for name, _ in model.named_parameters()] == ["encode.weight", "encode.bias", "decode.bias"]
    assert model.n_parameters() == 9 + 3 + 3


class Small(nn.Module):
    def __init__(self, dtype="float32"):
        self.table = nn.Embedding(7, 6, precision=dtype)
        self.first, self.second = nn.Linear(6, 5, precision=dtype), nn.Linear(5, 7, bias=False, precision=dtype)
        self.norm = nn.LayerNorm(6, precision=dtype)

    def __call__(self, tokens):
        return self.second(self.first(self.norm(self.table(tokens))))


def rounded(array):
    """Round to 8 significant bits, ties to even, using the bits of float32."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("in_arena", [False, True])
def test_bfloat16_weights_round_only_the_matrices(in_arena):
    model, tokens = Small(), [[1, 6, 3]]
    if in_arena:
        model.arena()
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    assert model.to(precision="bfloat16_weights") is model
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.dtype.name == "bfloat16"
            assert p.data.nbytes == before[name].nbytes // 2
            np.testing.assert_array_equal(p.data.astype(np.float32), rounded(before[name]))
            assert (p.data.astype(np.float32) != before[name]).any()
        else:
            assert p.dtype == np.float32
            np.testing.assert_array_equal(p.data, before[name])
    data = [p.data for p in model.parameters()]
    model.to("cpu", BFLOAT16_WEIGHTS)  # the second call changes nothing
    assert all(p.data is values for p, values in zip(model.parameters(), data, strict=True))
    wide = Small()
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        p.data = q.data.astype(np.float32)
    with no_grad():
        got, expected = model(tokens).data, wide(tokens).data
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(Small("bfloat16_weights").named_parameters(), model.parameters(), strict=True):
        assert p.dtype == q.dtype
        p.data = before[name]
        np.testing.assert_array_equal(p.data, q.data)


def test_bfloat16_weights_cannot_be_trained():
    model = Small().to(precision="bfloat16_weights")
    with pytest.raises(
        TypeError, match=r"^embedding: wte is stored in bfloat16 only and has no gradient; compute inside no_grad\(\)$"
    ):
        model([[1, 2]])
    with pytest.raises(TypeError, match=r"^ParameterArena: .* use one dtype$"):
        model.arena()


def test_an_unsupported_precision_is_rejected_without_changes():
    with strict_cupy.registered():
        model = Small().to("cuda")
        for precision, message in (
            (
                "bfloat16_weights",
                r"bfloat16_weights \(only weights in bfloat16\) is supported only on the CPU",
            ),
            ("bfloat16", "bfloat16 needs the CUDA kernels"),
        ):
            with pytest.raises(ValueError, match=f"^Embedding: {message}.*; also pass another precision, as in to"):
                model.to(precision=precision)
        assert {p.dtype.name for p in model.parameters()} == {"float32"}
        assert model.table.precision is FLOAT32
        model.to(precision="tf32")
        with pytest.raises(ValueError, match=r"^Embedding: tf32 needs a GPU; also pass another precision"):
            model.to("cpu")
        assert {p.backend.device for p in model.parameters()} == {"cuda"}
        assert model.to("cpu", "bfloat16_weights").table.weight.dtype.name == "bfloat16"


def test_changing_the_precision_converts_values_and_clears_gradients():
    model = Small()
    before = [p.data.copy() for p in model.parameters()]
    optimizer = optim.AdamW(model)
    model([[1, 2]]).sum().backward()
    optimizer.step()
    arena, after = model.arena(), [p.data.copy() for p in model.parameters()]
    model.to(precision="float64")
    assert model.arena() is not arena
    assert model([[1, 2]]).dtype == np.float64
    assert any((values != old).any() for values, old in zip(after, before, strict=True))
    for p, values in zip(model.parameters(), after, strict=True):
        assert p.dtype == np.float64
        np.testing.assert_array_equal(p.data, values)
        assert not p.grad.any()
    model([[1, 2]]).sum().backward()
    optimizer.step()
    assert {array.dtype.name for part in optimizer.parts for array in part.state} == {"float64"}


@pytest.mark.parametrize(("layers", "given"), [("float32", "float64"), ("float64", "float32")])
def test_a_layer_rejects_an_input_of_different_precision(layers, given):
    x = Tensor(np.ones((2, 3), given))
    for layer, name in (
        (nn.Linear(3, 3, precision=layers), "linear"),
        (nn.LayerNorm(3, precision=layers), "layernorm"),
    ):
        with pytest.raises(TypeError) as raised:
            layer(x)
        assert str(raised.value) == f"{name}: weight is {layers}; expected {given}, the dtype of the activations"


# Other modules --------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Parameters and modules in tuples, dicts and nested lists."""

    def __init__(self):
        self.pair = (nn.Linear(2, 2, bias=False), nn.RMSNorm(2))
        self.heads = {"a": nn.Linear(2, 1, bias=False), "b": [nn.Linear(2, 3, bias=False)]}
        self.scale = nn.RMSNorm(1).weight
        self.note = "text"


def test_parameters_in_tuples_and_dicts_are_found():
    names = [name for name, _ in Mixed().named_parameters()]
    assert names == ["pair.0.weight", "pair.1.weight", "heads.a.weight", "heads.b.0.weight", "scale"]


def test_repr_shows_the_module_tree():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(0.5), nn.Sequential(nn.RMSNorm(3, eps=0.1)))
    assert repr(model).splitlines() == [
        "Sequential()",
        "  layers: ",
        "    0: Linear(weight (2, 3), bias (3,))",
        "    1: ReLU()",
        "    2: Dropout(rate=0.5)",
        "    3: Sequential()",
        "      layers: ",
        "        0: RMSNorm(weight (3,), eps=0.1)",
    ]
    assert "a: Linear(weight (2, 1))" in repr(Mixed())


def test_sequential_applies_its_layers_in_order():
    linear = nn.Linear(3, 4)
    x = Tensor(R.normal(size=(2, 3)).astype("float32"))
    model = nn.Sequential(linear, nn.GELU(exact=True), nn.SiLU(), lambda x: x * 2)
    np.testing.assert_array_equal(model(x).data, (ops.gelu(linear(x), exact=True).silu() * 2).data)
    assert len(model) == 4
    assert model[0] is linear


def test_each_dropout_layer_of_a_sequence_uses_its_own_site():
    x, key = Tensor(np.ones((4, 50), dtype="float32")), Key(3, site=5)
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), nn.ReLU(), nn.Dropout(0.5))
    assert model.sites == 3
    expected = x
    for site in (5, 6, 7):
        expected = ops.dropout(expected, 0.5, key.at(site))
    np.testing.assert_array_equal(model(x, key).data, expected.data)
    np.testing.assert_array_equal(model(x).data, x.data)
    with pytest.raises(ValueError, match=r"Dropout: the rate is 1; expected 0 <= rate < 1"):
        nn.Dropout(1)


def test_rmsnorm_equals_its_operation():
    norm, x = nn.RMSNorm(3, eps=0.1, precision="float64"), Tensor(R.normal(size=(2, 3)))
    norm.weight.data = R.normal(size=3)
    np.testing.assert_array_equal(norm(x).data, functional.rmsnorm(x, norm.weight, 0.1).data)


def test_saved_and_loaded_parameters_are_bit_identical(tmp_path):
    model, other = Mixed(), Mixed()
    for parameter in model.parameters():
        parameter.data = R.normal(size=parameter.shape)
    model.save(tmp_path / "model.safetensors")
    assert other.load(tmp_path / "model.safetensors") is other
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], values)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_state_dict_copies_and_load_state_dict_writes_into_the_arena():
    model = nn.Linear(2, 3)
    state = model.state_dict()
    arena = model.arena()
    model.load_state_dict({name: values + 1 for name, values in state.items()})
    np.testing.assert_array_equal(model.weight.data, state["weight"] + 1)
    assert np.shares_memory(model.weight.data, arena.regions[0].values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bias"), r"Linear: the state lacks bias$"),
        (lambda s: s.update(gain=s["bias"]), r"the state has gain, which the module does not have$"),
        (lambda s: s.update(bias=np.ones((3, 1))), r"bias has shape \(3, 1\); expected \(3,\)"),
    ],
)
def test_an_incompatible_state_is_rejected_without_changes(change, message):
    model = nn.Linear(2, 3)
    before, state = model.state_dict(), model.state_dict()
    state["weight"] += 1
    change(state)
    with pytest.raises(ValueError, match=message) as raised:
        model.load_state_dict(state)
    assert "\n" not in str(raised.value)
    np.testing.assert_array_equal(model.weight.data, before["weight"])


def test_a_file_in_another_format_is_rejected(tmp_path):
    (tmp_path / "x").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match=r"load: .*x: not a valid safetensors file"):
        nn.Linear(2, 3).load(tmp_path / "x")
