import numpy as np
import pytest

from tinygrad2 import random
from tinygrad2.random import Key, bits64, draw, normal, permutation, philox4x32, uniform


# Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_results(counter, key, words):
    assert list(philox4x32(*map(np.uint64, counter + key))) == words
    arrays = [np.full((2, 3), value, dtype=np.uint64) for value in counter + key]
    for got, word in zip(philox4x32(*arrays), words, strict=True):
        np.testing.assert_array_equal(got, np.full((2, 3), word, dtype=np.uint64))


def test_the_counter_and_the_key_have_the_documented_layout():
    key, group = Key(seed=0x299F31D0A4093822, step=0x03707344, site=0x13198A2E), np.uint64(0x85A308D3243F6A88)
    assert list(draw(key, group)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize(("name", "bits"), [("seed", 64), ("step", 32), ("site", 32), ("first_sample", 48)])
def test_key_rejects_invalid_values(name, bits):
    assert getattr(Key(**{"seed": 0, name: 2**bits - 1}), name) == 2**bits - 1
    for value in (-1, 2**bits):
        with pytest.raises(ValueError, match=rf"^Key: {name} is {value}; expected 0 to 2\*\*{bits} - 1$"):
            Key(**{"seed": 0, name: value})


def test_at_changes_only_the_site():
    assert Key(5, 6, 7).at(8) == Key(5, 6, 7, 8)


def test_every_field_except_first_sample_selects_a_different_stream():
    streams = [bits64(key, 8) for key in (Key(0), Key(1), Key(2**32), Key(0, step=1), Key(0, site=1))]
    assert len({tuple(stream) for stream in streams}) == len(streams)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_bits64_combines_pairs_of_words(count):
    words = np.stack(draw(Key(3), np.arange(4, dtype=np.uint64)), axis=-1).reshape(-1)
    expected = [int(words[2 * i]) << 32 | int(words[2 * i + 1]) for i in range(count)]
    got = bits64(Key(3), count)
    assert got.dtype == np.uint64
    assert [int(value) for value in got] == expected


def test_uniform_has_the_moments_of_a_uniform_distribution():
    values = uniform(Key(1), 40_000)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    for power in (1, 2, 3):  # the tolerance is five standard deviations
        assert np.mean(values**power) == pytest.approx(1 / (power + 1), abs=5 * 0.3 / 200)
    np.testing.assert_array_equal(values[:17], uniform(Key(1), 17))


@pytest.mark.parametrize("n", [1, 2, 101])
def test_permutation_contains_every_index_once(n):
    order = permutation(Key(0), n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, permutation(Key(0), n))


def test_permutation_differs_by_epoch_and_seed():
    orders = {tuple(permutation(key, 50)) for key in (Key(0), Key(0, step=1), Key(0, step=2), Key(1))}
    assert len(orders) == 4
    assert tuple(range(50)) not in orders


def test_permutations_are_uniform():
    counts = np.bincount([permutation(Key(0, step), 3) @ [9, 3, 1] for step in range(6000)])
    counts = counts[counts > 0]
    assert len(counts) == 6
    assert np.sum((counts - 1000) ** 2 / 1000) < 20.5  # chi-squared with 5 degrees of freedom: p = 0.1 %


def test_normal_has_the_moments_of_a_normal_distribution():
    z = normal(Key(7), (200, 500))
    n = z.size
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs(np.mean(z**3)) < 5 * np.sqrt(15 / n)
    assert abs(np.mean(z**4) - 3) < 5 * np.sqrt(96 / n)
    neighbors = z.reshape(-1, 4)
    assert np.abs(np.corrcoef(neighbors.T) - np.eye(4)).max() < 5 / np.sqrt(len(neighbors))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 0, 2), (7, 3)])
def test_normal_is_reproducible_and_a_prefix_of_a_longer_draw(shape):
    z = normal(Key(7), shape, std=0.02)
    assert z.shape == shape
    assert z.dtype == np.float64
    np.testing.assert_array_equal(z.reshape(-1), normal(Key(7), (100,), std=0.02)[: z.size])


def test_normal_does_not_depend_on_its_chunks():
    many = 4 * (1 << 14) + 9
    z = normal(Key(1), (many,))
    rows = (np.stack(draw(Key(1), np.arange(1 << 14, (1 << 14) + 3, dtype=np.uint64)), axis=-1) + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(rows[:, :2])), 2 * np.pi * rows[:, 2:]
    expected = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)[:9]
    np.testing.assert_allclose(z[-9:], expected, rtol=1e-15)


def test_draws_have_no_state():
    before = random.uniform(Key(4), 5)
    random.normal(Key(4), (9,))
    np.testing.assert_array_equal(before, random.uniform(Key(4), 5))
