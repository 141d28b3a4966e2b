import itertools

import numpy as np
import pytest
from ml_dtypes import bfloat16

from gpt2 import GPT2, GPT2Config
from tests.stand_ins import strict_cupy
from tests.tinygrad2.copies import copy_of, with_copies
from tinygrad2 import Key, Tensor, nn, ops, optim, params
from tinygrad2.backend import get_backend
from tinygrad2.params import Parameter, ParameterArena

CONFIG = GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=3, n_head=2)
TOKENS = np.arange(10).reshape(2, 5)


def arena_of(**arrays):
    return ParameterArena((name, Parameter(np.array(values, dtype="float32"))) for name, values in arrays.items())


def test_the_regions_contain_each_parameter_once():
    model = GPT2(CONFIG)
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    arena = model.arena()
    assert [region.name for region in arena.regions] == ["decay", "no_decay"]
    for region in arena.regions:
        stops = [0, *(stop for _, stop in region.where.values())]
        assert [start for start, _ in region.where.values()] == stops[:-1]
        assert region.values.shape == region.grads.shape == (stops[-1],)
    assert sorted(name for region in arena.regions for name in region.where) == sorted(before)
    assert sum(region.values.size for region in arena.regions) == model.n_parameters()
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.data, before[name])
        assert (name in arena.regions[0].where) == (p.ndim == 2)


def test_parameters_are_views_of_the_flat_buffers():
    model = GPT2(CONFIG)
    arena = model.arena()
    for region in arena.regions:
        region.values[...] = np.arange(region.values.size)
        region.grads[...] = -np.arange(region.values.size)
        for name, (start, stop) in region.where.items():
            p = arena.parameters[name]
            np.testing.assert_array_equal(p.data.reshape(-1), np.arange(start, stop))
            np.testing.assert_array_equal(p.grad.reshape(-1), -np.arange(start, stop))
    assert model.arena() is arena


@pytest.mark.parametrize("key", [None, Key(0)])
def test_parameters_are_stored_in_the_order_of_their_final_gradients(key):
    model = GPT2(CONFIG)
    arena, fired = model.arena(), []
    for name, p in model.named_parameters():
        p.leaf.on_final = lambda name=name: fired.append(name)
    for _ in range(2):  # the order is the same every time
        fired.clear()
        model.loss(TOKENS, TOKENS, key).backward()
        assert len(fired) == len(arena.parameters)
        for region in arena.regions:
            assert [name for name in fired if name in region.where] == list(region.where)
    assert fired[-1] == list(arena.regions[0].where)[-1] == "wte.weight"


def test_a_hook_sees_the_final_gradient():
    model, seen = GPT2(CONFIG), {}
    model.arena()
    for name, p in model.named_parameters():
        p.leaf.on_final = lambda name=name, p=p: seen.update({name: p.grad.copy()})
    model.loss(TOKENS, TOKENS).backward()
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(seen[name], p.grad)
        assert p.grad.any()


@pytest.mark.parametrize("size", [1, 150, 500, 10**6])
def test_buckets_are_runs_of_complete_parameters(monkeypatch, size):
    monkeypatch.setattr(params, "BUCKET_SIZE", size)
    arena = GPT2(CONFIG).arena()
    for region in arena.regions:
        buckets = sorted((b for b in arena.buckets if b.region is region), key=lambda bucket: bucket.start)
        assert [name for bucket in buckets for name in bucket.names] == list(region.where)
        assert [bucket.start for bucket in buckets] == [0, *(bucket.stop for bucket in buckets[:-1])]
        for bucket in buckets:
            assert (bucket.start, bucket.stop) == (region.where[bucket.names[0]][0], region.where[bucket.names[-1]][1])
            assert bucket.stop - bucket.start <= size or len(bucket.names) == 1
        for bucket, following in itertools.pairwise(buckets):
            assert region.where[following.names[0]][1] - bucket.start > size
    order = list(arena.parameters)
    last = [order.index(bucket.names[-1]) for bucket in arena.buckets]
    assert last == sorted(last)


def test_creating_an_arena_moves_values_and_gradients():
    p, q = Parameter(np.ones((2, 2))), Parameter(np.full(3, 2.0))
    p.grad = np.full((2, 2), 5.0)
    arena = ParameterArena([("p", p), ("q", q)])
    np.testing.assert_array_equal(arena.regions[0].values, np.ones(4))
    np.testing.assert_array_equal(arena.regions[0].grads, np.full(4, 5.0))
    np.testing.assert_array_equal(arena.regions[1].grads, np.zeros(3))


def test_gradients_are_the_same_with_and_without_an_arena():
    separate, placed = GPT2(CONFIG, dtype="float64"), GPT2(CONFIG, dtype="float64")
    placed.arena()
    for model in (separate, placed):
        model.loss(TOKENS, TOKENS).backward()
    for (name, a), b in zip(separate.named_parameters(), placed.parameters(), strict=True):
        np.testing.assert_array_equal(a.grad, b.grad, err_msg=name)


def test_assigning_data_writes_into_the_arena():
    arena = arena_of(w=[[1, 2]], b=[3])
    w = arena.parameters["w"]
    w.data = np.array([[7.0, 8.0]])
    np.testing.assert_array_equal(arena.regions[0].values, [7, 8])
    assert np.shares_memory(w.data, arena.regions[0].values)
    assert w.dtype == "float32"
    with pytest.raises(ValueError, match=r"^parameter: data has shape \(2,\); expected \(1, 2\), the parameter's"):
        w.data = np.zeros(2)


def test_assigning_grad_writes_into_the_arena():
    arena = arena_of(w=[[1, 2]], b=[3])
    w, grads = arena.parameters["w"], arena.regions[0].grads
    w.grad = np.array([[7.0, 8.0]])
    np.testing.assert_array_equal(grads, [7, 8])
    w.grad = None
    np.testing.assert_array_equal(grads, [0, 0])
    (w * 3).sum().backward()
    np.testing.assert_array_equal(grads, [3, 3])
    assert np.shares_memory(w.grad, grads)


def test_the_gradient_of_a_parameter_outside_an_arena_can_be_cleared():
    p = Parameter(np.ones(2))
    assert p.grad is None
    (p * 2).sum().backward()
    np.testing.assert_array_equal(p.grad, [2, 2])
    p.grad = None
    assert p.grad is None
    with pytest.raises(ValueError, match="grad has shape"):
        p.grad = np.ones(3)


def test_zero_grad_clears_the_arena():
    model = GPT2(CONFIG)
    arena = model.arena()
    for clear in (arena.zero_grad, model.zero_grad):
        model.loss(TOKENS, TOKENS).backward()
        clear()
        assert not any(region.grads.any() for region in arena.regions)


def test_gradients_accumulate_in_the_arena():
    model = GPT2(CONFIG, dtype="float64")
    arena = model.arena()
    model.loss(TOKENS, TOKENS).backward()
    once = [region.grads.copy() for region in arena.regions]
    model.loss(TOKENS, TOKENS).backward()
    for region, grads in zip(arena.regions, once, strict=True):
        np.testing.assert_allclose(region.grads, 2 * grads, rtol=1e-9, atol=1e-15)


def test_a_parameter_is_a_tensor():
    p = Parameter(np.ones((2, 3)))
    assert isinstance(p, Tensor)
    assert p.requires_grad
    assert ops.linear(Tensor(np.ones((4, 2))), p).shape == (4, 3)


def test_invalid_parameters_are_rejected():
    with pytest.raises(ValueError, match=r"^ParameterArena: there are no parameters$"):
        nn.Module().arena()
    mixed = [("a", Parameter(np.ones(2))), ("b", Parameter(np.ones(2, dtype="float32")))]
    with pytest.raises(TypeError, match=r"^ParameterArena: a is float64, others are float32; use one dtype$"):
        ParameterArena(mixed)


def test_conversion_to_bfloat16_leaves_the_arena_and_halves_the_memory():
    arena = arena_of(w=[[1, 2 + 2**-9]], b=[3])
    w = arena.parameters["w"]
    (w * 3).sum().backward()
    w.convert(w.backend, "bfloat16", None)
    assert (w.dtype.name, w.data.nbytes, w.grad) == ("bfloat16", 4, None)
    assert w.data.tolist() == [[1, 2]]
    w.data = np.array([[5, 6]], np.float32)
    assert w.data.tolist() == [[5, 6]]
    np.testing.assert_array_equal(arena.regions[0].values, [1, 2 + 2**-9])


def rounded(p):
    """Whether the bfloat16 copy of a parameter equals its rounded data."""
    copy = copy_of(p)
    assert copy.dtype == bfloat16
    return np.array_equal(copy, p.backend.to_host(p.data).astype(bfloat16))


def test_read_as_returns_the_data_or_the_copy():
    x, p = Tensor(np.ones(2)), Parameter(np.full(2, 1.003, np.float32))
    assert x.read_as("float64", "x") is x.data
    assert p.read_as("float32", "p") is p.data
    with pytest.raises(TypeError, match=r"^p is float32; expected bfloat16, the dtype of the activations$"):
        p.read_as("bfloat16", "p")
    p.convert(p.backend, "float32", "bfloat16")
    assert p.read_as("float32", "p") is p.data
    assert copy_of(p).tolist() == [1, 1]
    assert p.dtype == np.float32
    assert rounded(p)
    with pytest.raises(TypeError, match=r"^linear: weight is float32; expected float64, the dtype of the activations$"):
        p.read_as("float64", "linear: weight")


@pytest.mark.parametrize("copy", [None, "bfloat16"])
def test_methods_and_operators_use_the_data_not_the_copy(copy):
    p = Parameter(np.array([[1.003, 2.003, 3], [4, 5, 6.003]], np.float32), copy)
    for got, expected in (
        (p.transpose(), p.data.T),
        (p.reshape(3, 2), p.data.reshape(3, 2)),
        (p[1], p.data[1]),
        (p * 1, p.data),
        (p @ p.transpose(), p.data @ p.data.T),
        (p.sum(axis=0), p.data.sum(axis=0)),
    ):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got.data, expected)
    (p.transpose() * 2).sum().backward()
    np.testing.assert_array_equal(p.grad, np.full((2, 3), 2, np.float32))


def test_copies_are_updated_when_the_data_change():
    p, q = (Parameter(np.full(shape, 0.3, np.float32), "bfloat16") for shape in ((2, 2), 3))
    p.data = np.full((2, 2), 0.1, np.float32)
    assert rounded(p)
    arena = ParameterArena([("p", p), ("q", q)])
    for parameter, region in zip((p, q), arena.regions, strict=True):
        assert np.shares_memory(copy_of(parameter), region.copies)
        assert rounded(parameter)
        assert region.copies.dtype == bfloat16
    p.data = np.full((2, 2), 0.9, np.float32)
    assert rounded(p)
    for region in arena.regions:
        region.values[...] = 1 / 3
    assert not rounded(p)
    arena.refresh_copies()
    assert rounded(p)
    assert rounded(q)


def test_regions_without_copies():
    arena = arena_of(w=[[1, 2]], b=[3])
    assert [region.copies for region in arena.regions] == [None, None]
    arena.refresh_copies()
    assert arena.parameters["w"].copy_dtype is None


def test_copies_of_only_some_parameters_are_rejected():
    a, b = Parameter(np.ones(2), "bfloat16"), Parameter(np.ones(2))
    with pytest.raises(
        TypeError, match=r"^ParameterArena: the copy of a has dtype bfloat16, other copies None; use one"
    ):
        ParameterArena([("a", a), ("b", b)])


def test_the_copy_moves_to_another_device():
    p = Parameter(np.full(2, 0.3, np.float32), "bfloat16")
    with strict_cupy.registered():
        p.convert(get_backend("cuda"), p.dtype, p.copy_dtype)
        assert rounded(p)
        p.data = np.full(2, 0.6, np.float32)
        assert rounded(p)
        p.convert(get_backend("cpu"), p.dtype, p.copy_dtype)
        assert rounded(p)
    p.convert(p.backend, p.dtype, None)
    assert p.copy_dtype is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_copies_of_a_model_equal_its_rounded_parameters(device):
    with strict_cupy.registered():
        model = with_copies(GPT2(CONFIG)).to(device)
        assert all(rounded(p) for p in model.parameters())
        model.arena()
        assert all(rounded(p) for p in model.parameters())


class TestOptimizersAcceptModulesOrParameters:
    @staticmethod
    def trained(given, steps=3):
        model = nn.Linear(3, 2, init=nn.normal_init(0.5, Key(1)))
        optimizer = optim.AdamW(given(model), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(Tensor(np.ones((1, 3), "float32"))) ** 2).sum().backward()
            optimizer.step()
        return model

    @pytest.mark.parametrize(
        "given", [nn.Module.parameters, lambda m: list(m.parameters()), lambda m: (m.bias, m.weight)]
    )
    def test_modules_and_parameters_give_the_same_steps(self, given):
        expected, model = self.trained(lambda m: m), self.trained(given)
        np.testing.assert_array_equal(model.weight.numpy(), expected.weight.numpy())
        np.testing.assert_array_equal(model.bias.numpy(), expected.bias.numpy())

    def test_only_some_parameters(self):
        model = nn.Linear(3, 2)
        before = model.bias.numpy().copy()
        optimizer = optim.SGD([model.weight], lr=0.1)
        model(Tensor(np.ones((1, 3), "float32"))).sum().backward()
        optimizer.step()
        np.testing.assert_array_equal(model.bias.numpy(), before)

    def test_a_second_optimizer_with_the_same_parameters_shares_the_arena(self):
        model = nn.Linear(3, 2)
        first, second = optim.AdamW(model.parameters()), optim.SGD(model)
        assert first.arena is second.arena is model.arena()

    def test_an_optimizer_with_part_of_another_ones_parameters_is_rejected(self):
        model = nn.Linear(3, 2)
        optimizer = optim.AdamW(model)
        with pytest.raises(ValueError, match=r"^ParameterArena: 0 is in the arena of another module or optimizer"):
            optim.AdamW([model.weight])
        del optimizer

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda m: m.weight, "item 0 of the parameters has type Tensor"),
            (
                lambda m: [m.weight.data],
                "item 0 of the parameters has type ndarray; expected a module, or an iterable",
            ),
            (lambda m: [{"params": m.parameters()}], "item 0 of the parameters has type dict"),
            (lambda m: 3, "item 0 of the parameters has type int"),
            (lambda m: m.named_parameters(), "item 0 of the parameters has type tuple"),
        ],
    )
    def test_other_arguments_are_rejected(self, given, message):
        with pytest.raises(TypeError, match=message):
            optim.AdamW(given(nn.Linear(3, 2)))

    def test_the_arena_follows_the_parameters_to_another_device(self):
        model = nn.Linear(3, 2)
        optimizer = optim.AdamW(model.parameters())
        with strict_cupy.registered():
            model.to("cuda")
            model(Tensor(np.ones((1, 3), "float32")).to("cuda")).sum().backward()
            before = model.weight.numpy()
            optimizer.step()
            assert model.weight.backend.device == "cuda"
            assert np.abs(model.weight.numpy() - before).max() > 1e-4


@pytest.mark.parametrize("value", [np.ones((3, 2)), Tensor(np.ones((3, 2))), 1.0])
def test_an_array_cannot_replace_a_parameter(value):
    model = nn.Linear(3, 2)
    with pytest.raises(
        TypeError, match=r"^Linear.weight is a parameter, and .* is not; copy the values into it: module.we"
    ):
        model.weight = value
    model.weight.data = np.ones((3, 2))
    other = nn.Linear(3, 2)
    other.weight = model.weight  # tied before an optimizer exists
    optimizer = optim.AdamW(other)
    with pytest.raises(
        TypeError, match=r"^Linear.weight belongs to an optimizer, which would not see the new parameter"
    ):
        other.weight = Parameter(np.ones((3, 2)))
    del optimizer
