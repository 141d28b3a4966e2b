"""gpt2/training/dataset.py: windows, batches, damaged data, data of other programs, sample order, n-gram baselines."""

import hashlib
import json
import math
from itertools import pairwise

import numpy as np
import pytest

from gpt2.tokenizer import Tokenizer
from gpt2.training import dataset
from gpt2.training.dataset import FORMAT, MANIFEST, SampleOrder, TokenDataset, baselines, find_dataset, token_dtype


def write_dataset(folder, splits, vocab_size=257, shard_tokens=10):
    """Write a data set with these ids, without using prepare.py."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "<u2" if vocab_size <= 65536 else "<u4"
    shards = []
    for split, ids in splits.items():
        for k in range(-(-len(ids) // shard_tokens)):
            data = np.asarray(ids[k * shard_tokens : (k + 1) * shard_tokens], dtype=dtype).tobytes()
            (folder / f"{split}-{k:05d}.bin").write_bytes(data)
            tokens = len(data) // np.dtype(dtype).itemsize
            sha = hashlib.sha256(data).hexdigest()
            shards.append({"file": f"{split}-{k:05d}.bin", "split": split, "tokens": tokens, "sha256": sha})
    manifest = {
        "format": FORMAT,
        "tokenizer": {"name": "x", "fingerprint": "0", "vocab_size": vocab_size},
        "dtype": np.dtype(dtype).name,
        "shards": shards,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "set", {"train": np.arange(100, 137), "val": np.arange(5)})


def test_read_crosses_shard_boundaries(folder):
    data = TokenDataset.open(folder, "train")
    assert data.tokens == 37
    assert data.manifest["tokenizer"]["name"] == "x"
    for start in range(38):
        for count in range(38 - start):
            assert data.read(start, count).tolist() == list(range(100 + start, 100 + start + count))


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (30, 8), (38, 0), (3, -1)])
def test_reading_beyond_the_split_is_an_error(folder, start, count):
    with pytest.raises(ValueError, match="is out of range; train has 37 tokens"):
        TokenDataset.open(folder, "train").read(start, count)


@pytest.mark.parametrize("T", [1, 3, 9, 12, 35, 36])
def test_windows_contain_each_target_once(folder, T):
    data = TokenDataset.open(folder, "train")
    windows = data.windows(T)
    assert windows == 36 // T
    tokens, targets = data.batch(np.arange(windows), T)
    assert tokens.shape == targets.shape == (windows, T)
    assert tokens.dtype == targets.dtype == np.int64
    assert tokens.flags.c_contiguous
    assert targets.flags.c_contiguous
    assert tokens.ravel().tolist() == list(range(100, 100 + windows * T))
    assert np.array_equal(targets, tokens + 1)


def test_rows_of_a_batch_are_in_the_order_of_the_indices(folder):
    tokens, _ = TokenDataset.open(folder, "train").batch([2, 0, 2], 4)
    assert tokens[:, 0].tolist() == [108, 100, 108]


@pytest.mark.parametrize("bad", [9, -1])
def test_batch_refuses_a_window_outside(folder, bad):
    with pytest.raises(ValueError, match=f"window {bad} is out of range; train has 9 windows"):
        TokenDataset.open(folder, "train").batch([0, bad], 4)


def test_the_error_for_a_large_block_size_states_the_required_tokens(folder):
    with pytest.raises(ValueError, match=r"train has 37 tokens; a block size of 37 requires 37 \+ 1 = 38"):
        TokenDataset.open(folder, "train").windows(37)


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(257, 2), (65536, 2), (65537, 4)])
def test_bytes_per_id_depend_on_the_vocabulary_size(tmp_path, vocab_size, bytes_each):
    assert token_dtype(vocab_size).itemsize == bytes_each
    ids = [0, vocab_size - 1, 1]
    data = TokenDataset.open(write_dataset(tmp_path / "set", {"train": ids}, vocab_size), "train")
    assert data.read(0, 3).tolist() == ids
    assert (tmp_path / "set" / "train-00000.bin").stat().st_size == 3 * bytes_each


def test_the_error_for_an_id_outside_the_vocabulary_names_the_shard(tmp_path):
    folder = write_dataset(tmp_path / "set", {"train": [*range(15), 257, 3]})
    data = TokenDataset.open(folder, "train")
    assert data.read(0, 15).tolist() == list(range(15))
    with pytest.raises(ValueError, match=r"train-00001.bin: contains the id 257, but the vocabulary has 257 ids \(x\)"):
        data.batch([1], 8)


def delete_folder(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def edit_manifest(folder, edit):
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def flip_a_byte(folder):
    data = bytearray((folder / "train-00002.bin").read_bytes())
    data[6] ^= 1
    (folder / "train-00002.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete_folder, "no such data set; prepare one with python data/prepare.py"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json: no such file; prepare the data set with"),
        (lambda f: (f / MANIFEST).write_text("{"), "not a valid manifest of a data set"),
        (lambda f: (f / MANIFEST).write_text("[]"), "not a valid manifest of a data set"),
        (lambda f: edit_manifest(f, lambda m: m.pop("shards")), "not a valid manifest of a data set"),
        (lambda f: edit_manifest(f, lambda m: m["tokenizer"].pop("name")), "not a valid manifest of a data set"),
        (
            lambda f: edit_manifest(f, lambda m: m["tokenizer"].update(name=1)),
            "the name of the tokenizer is not a string",
        ),
        (lambda f: edit_manifest(f, lambda m: m["tokenizer"].update(vocab_size=0)), "the size of the vocabulary is 0"),
        (lambda f: edit_manifest(f, lambda m: m["shards"][0].update(tokens="9")), "a shard's tokens is '9'"),
        (lambda f: edit_manifest(f, lambda m: m["shards"][0].update(tokens=-9)), "a shard has -9 tokens"),
        (lambda f: edit_manifest(f, lambda m: m["shards"][0].update(file="../x")), "'../x', which is not a file name"),
        (lambda f: edit_manifest(f, lambda m: m["shards"].append(m["shards"][0])), "occurs twice"),
        (lambda f: edit_manifest(f, lambda m: m.update(format=99)), "format 99, .* expected format 1"),
        (lambda f: edit_manifest(f, lambda m: m.update(dtype="uint32")), "dtype uint32; expected .* dtype uint16"),
        (lambda f: edit_manifest(f, lambda m: m.update(shards=[])), "the split train is empty"),
        (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin: the shard is missing"),
        (lambda f: (f / "train-00003.bin").write_bytes(b"12345"), "has 5 bytes; expected 14"),
        (lambda f: (f / "train-00000.bin").write_bytes(bytes(40)), "has 40 bytes; expected 20"),
        (flip_a_byte, "train-00002.bin: the shard's checksum differs"),
    ],
)
def test_damage_is_reported_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        TokenDataset.open(folder, "train")
    assert "\n" not in str(caught.value)


def test_a_large_split_is_not_hashed(folder, monkeypatch):
    flip_a_byte(folder)
    monkeypatch.setattr(dataset, "CHECKED_BYTES", 73)  # the split has 74 bytes
    assert TokenDataset.open(folder, "train").tokens == 37


def test_an_unknown_split_is_an_error(folder):
    with pytest.raises(ValueError, match="split is 'test'; expected one of train, val"):
        TokenDataset.open(folder, "test")


def test_find_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data 'mine': no such data set \(data/ contains no data set\)"):
        find_dataset("mine")
    write_dataset(tmp_path / "data" / "mine", {"train": [1, 2]})
    write_dataset(tmp_path / "data" / "also", {"train": [1, 2]})
    elsewhere = write_dataset(tmp_path / "elsewhere" / "set", {"train": [1, 2]})
    assert find_dataset("mine").resolve() == tmp_path / "data" / "mine"
    assert find_dataset("data/mine").resolve() == tmp_path / "data" / "mine"
    assert find_dataset(elsewhere) == elsewhere
    with pytest.raises(
        FileNotFoundError, match=r"data/ contains also, mine\); prepare one with python data/prepare.py"
    ):
        find_dataset("nine")


# Data of other programs.


def llmc_header(tokens, magic=20240520, version=1):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, tokens
    return header.tobytes()


def nanogpt(folder, train, val):
    for name, ids in (("train", train), ("val", val)):
        np.asarray(ids, dtype=np.uint16).tofile(folder / f"{name}.bin")


def build_nanogpt(folder, train, val):
    half = len(train) // 2
    for name, ids in (("val_000000", val), ("train_000001", train[:half]), ("train_000002", train[half:])):
        np.save(folder / f"edufineweb_{name}.npy", np.asarray(ids, dtype=np.uint16))


def llmc(folder, train, val):
    half = len(train) // 2
    for name, ids in (("val_000000", val), ("train_000001", train[:half]), ("train_000002", train[half:])):
        (folder / f"fineweb_{name}.bin").write_bytes(llmc_header(len(ids)) + np.asarray(ids, "<u2").tobytes())


def llmc_small(folder, train, val):
    for name, ids in (("val", val), ("train", train)):
        (folder / f"tiny_shakespeare_{name}.bin").write_bytes(llmc_header(len(ids)) + np.asarray(ids, "<u2").tobytes())


KINDS = [nanogpt, build_nanogpt, llmc, llmc_small]


@pytest.mark.parametrize("write", KINDS)
def test_data_of_other_programs_is_read(tmp_path, monkeypatch, write):
    train, val = np.random.default_rng(0).integers(0, 50257, 5001), np.arange(50200, 50257)
    folder = tmp_path / "data" / "theirs"
    folder.mkdir(parents=True)
    write(folder, train, val)
    monkeypatch.chdir(tmp_path)
    assert find_dataset("theirs").resolve() == folder
    with pytest.raises(FileNotFoundError, match=r"data/ contains theirs\)"):
        find_dataset("other")
    data = TokenDataset.open(folder, "train")
    assert (data.tokens, data.vocab_size) == (5001, 50257)
    assert np.array_equal(data.read(0, 5001), train)
    assert np.array_equal(data.read(2000, 1000), train[2000:3000])
    assert np.array_equal(TokenDataset.open(folder, "val").read(0, 57), val)


@pytest.mark.parametrize("write", KINDS)
def test_data_of_other_programs_has_the_gpt2_tokenizer(gpt2_files, tmp_path, write):
    write(tmp_path, np.arange(9), np.arange(9))
    tokenizer = TokenDataset.open(tmp_path, "train").tokenizer()
    assert (tokenizer.name, tokenizer.end_of_text) == ("gpt2", 50256)


def test_fingerprint_of_data_of_other_programs(tmp_path):
    """The fingerprint covers the first, the last and some other ids, but not the names of folder and files."""
    ids = np.random.default_rng(0).integers(0, 50257, 200_000)

    def fingerprint(name, ids, write=build_nanogpt):
        (tmp_path / name).mkdir()
        write(tmp_path / name, ids, ids[:9])
        return TokenDataset.open(tmp_path / name, "train").fingerprint

    first = fingerprint("a", ids)
    assert fingerprint("b", ids) == fingerprint("c", ids, llmc) == first
    for i in (0, 99_999, 100_000, 199_999):
        changed = ids.copy()
        changed[i] = (changed[i] + 1) % 50257
        assert fingerprint(f"d{i}", changed) != first
    assert fingerprint("e", np.roll(ids, 100_000)) != first
    assert fingerprint("f", ids[:-2]) != first


def test_ids_of_other_programs_are_checked_when_they_are_read(tmp_path):
    nanogpt(tmp_path, [1, 2, 3, 4, 60000], [1])
    data = TokenDataset.open(tmp_path, "train")
    assert data.read(0, 4).tolist() == [1, 2, 3, 4]
    with pytest.raises(
        ValueError, match=r"train.bin: contains the id 60000, but the vocabulary has 50257 ids \(gpt2\)"
    ):
        data.read(3, 2)


def write_bytes(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def save_array(name, array):
    return lambda folder: np.save(folder / name, array)


THREE = np.arange(3, dtype="<u2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write_bytes("train.bin", b"123"), "train.bin: 3 bytes; expected raw uint16 ids, two bytes each"),
        (write_bytes("train.bin", b""), "train.bin: 0 bytes; expected raw uint16 ids"),
        (
            write_bytes("x_train.bin", llmc_header(4) + THREE.tobytes()),
            "version 1 and 4 ids, but the file has 1030 bytes; expected",
        ),
        (write_bytes("x_train.bin", llmc_header(3, version=2) + THREE.tobytes()), "version 2 and 3 ids"),
        (write_bytes("x_train.bin", llmc_header(0)), "version 1 and 0 ids"),
        (write_bytes("x_train.bin", llmc_header(3)[:9]), "version 0 and 0 ids, but the file has 9 bytes"),
        (
            write_bytes("x_train.bin", llmc_header(3, 20240801, 7)),
            "llm.c's ids for Llama 3; expected ids for GPT-2",
        ),
        (write_bytes("x_train_1.npy", b""), "x_train_1.npy: not a valid .npy file, or truncated"),
        (write_bytes("x_train_1.npy", b"\x93NUMPY\x01\0\x0a\0{'descr': ["), "not a valid .npy file, or truncated"),
        (write_bytes("x_train_1.npy", b"cos\nsystem\n(S'true'\ntR."), "not a valid .npy file, or truncated"),
        (
            save_array("x_train_1.npy", THREE.astype("<i8")),
            "int64, shape (3,); expected a one-dimensional uint16 array",
        ),
        (save_array("x_train_1.npy", THREE.reshape(1, 3)), "uint16, shape (1, 3); expected a one-dimensional"),
        (save_array("x_train_1.npy", THREE[:0]), ".npy"),
        (
            lambda folder: nanogpt(folder, THREE, THREE) or (folder / "meta.pkl").write_bytes(b""),
            "the ids are not from GPT-2's vocabulary",
        ),
        (
            lambda folder: nanogpt(folder, THREE, THREE) or build_nanogpt(folder, THREE, THREE),
            "has .npy and .bin files",
        ),
        (write_bytes("val.bin", THREE.tobytes()), "no file of the split train; expected train.bin, *_train_*.bin or"),
    ],
)
def test_damaged_files_of_other_programs_are_reported_in_one_line(tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        TokenDataset.open(tmp_path, "train")
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Python's warnings about damaged headers
def test_damage_to_a_header_raises_value_error_or_is_harmless(tmp_path):
    rng, said = np.random.default_rng(0), set()
    for write, name in ((build_nanogpt, "edufineweb_train_000001.npy"), (llmc_small, "tiny_shakespeare_train.bin")):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder, np.arange(100), np.arange(100))
        whole = (folder / name).read_bytes()
        for _ in range(400):
            data = bytearray(whole)
            for i in rng.integers(0, 128, rng.integers(1, 4)):
                data[i] = rng.integers(256)
            (folder / name).write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)
            try:
                opened = TokenDataset.open(folder, "train")
                assert opened.read(0, opened.tokens).max() < 50257
            except ValueError as error:
                said.add(str(error))
    assert len(said) > 20
    assert not any("\n" in line for line in said)


def test_manifest_and_vocabulary_must_have_the_same_tokenizer(tmp_path):
    folder = write_dataset(tmp_path / "set", {"train": [1, 2]})
    Tokenizer.load("bytes").save(folder)
    with pytest.raises(ValueError, match=r"manifest.json and vocabulary.json have different tokenizers"):
        TokenDataset.open(folder, "train").tokenizer()
    edit_manifest(folder, lambda m: m.update(tokenizer=Tokenizer.load("bytes").describe()))
    assert TokenDataset.open(folder, "train").tokenizer().name == "bytes"


# The order of samples.


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_each_sample_occurs_once_per_epoch(n):
    order = SampleOrder(n, seed=3)
    epochs = order.indices(0, 5 * n).reshape(5, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(n), (5, n)))
    if n == 100:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
        assert not np.array_equal(epochs[0], SampleOrder(n, seed=4).indices(0, n))


def test_sample_order_does_not_depend_on_how_positions_are_divided():
    """Micro-steps, ranks and restarts divide the sequence of positions, but do not change its samples."""
    n, total = 13, 200
    whole = SampleOrder(n, seed=8).indices(0, total)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ranks = [SampleOrder(n, seed=8) for _ in range(rng.integers(1, 5))]
        cuts = [0, *np.sort(rng.choice(np.arange(1, total), size=rng.integers(1, 30), replace=False)), total]
        spans = list(pairwise(cuts))
        seen = np.full(total, -1)
        for i in rng.permutation(len(spans)):
            first, last = map(int, spans[i])
            seen[first:last] = ranks[i % len(ranks)].indices(first, last - first)
        assert np.array_equal(seen, whole)


def test_zero_samples_is_an_error_but_zero_positions_is_not():
    with pytest.raises(ValueError, match="n is 0"):
        SampleOrder(0, seed=0)
    assert SampleOrder(3, seed=0).indices(2, 0).tolist() == []


def test_sample_order_is_pinned():
    """Resumed runs rely on the order, so it must not change between versions of this code."""
    assert SampleOrder(8, seed=0).indices(0, 16).tolist() == [3, 6, 4, 0, 7, 5, 2, 1, 2, 5, 7, 6, 0, 3, 1, 4]


# Baselines.


def naive_baselines(train, val, V):
    pairs, first, targets = {}, {}, {}
    for a, b in pairwise(train):
        pairs[a, b] = pairs.get((a, b), 0) + 1
        first[a] = first.get(a, 0) + 1
        targets[b] = targets.get(b, 0) + 1
    unigram = bigram = 0.0
    for a, b in pairwise(val):
        unigram -= math.log((targets.get(b, 0) + 1) / (len(train) - 1 + V))
        bigram -= math.log((pairs.get((a, b), 0) + 1) / (first.get(a, 0) + V))
    return {"unigram": unigram / (len(val) - 1), "bigram": bigram / (len(val) - 1)}


def test_baselines_agree_with_a_naive_implementation(tmp_path):
    rng = np.random.default_rng(1)
    train, val = (rng.integers(0, 12, size) ** 2 % 12 for size in (900, 150))
    folder = write_dataset(tmp_path / "set", {"train": train, "val": val}, vocab_size=12, shard_tokens=400)
    got = baselines(TokenDataset.open(folder, "train"), TokenDataset.open(folder, "val"))
    assert got == pytest.approx(naive_baselines(train.tolist(), val.tolist(), 12), rel=1e-12)


def test_a_large_vocabulary_has_no_bigram_baseline(tmp_path):
    train, val = [5, 6, 7, 6], [6, 6, 4999]
    folder = write_dataset(tmp_path / "set", {"train": train, "val": val}, vocab_size=5000)
    got = baselines(TokenDataset.open(folder, "train"), TokenDataset.open(folder, "val"))
    assert got == {"unigram": pytest.approx(naive_baselines(train, val, 5000)["unigram"], rel=1e-12)}


def test_baselines_count_the_pair_between_chunks(tmp_path):
    """The ids are constant and fill more than two chunks. All pairs are equal, so the exact count is known."""
    tokens = (1 << 22) + 3
    ids = np.zeros(tokens, dtype=np.uint16)
    folder = write_dataset(tmp_path / "set", {"train": ids, "val": ids[:9]}, vocab_size=2, shard_tokens=tokens)
    got = baselines(TokenDataset.open(folder, "train"), TokenDataset.open(folder, "val"))
    assert got["bigram"] == pytest.approx(-math.log(tokens / (tokens + 1)), rel=1e-6)


def test_baselines_need_at_least_two_tokens(tmp_path):
    folder = write_dataset(tmp_path / "set", {"train": [1, 2], "val": [1]})
    with pytest.raises(ValueError, match="the split val has 1 token; expected at least 2"):
        baselines(TokenDataset.open(folder, "train"), TokenDataset.open(folder, "val"))
