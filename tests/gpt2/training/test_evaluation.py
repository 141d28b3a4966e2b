"""gpt2/training/evaluation.py: losses and bits per byte compared with known values, and sums over ranks."""

import math

import numpy as np
import pytest

from gpt2 import Tokenizer
from gpt2.training.dataset import TokenDataset
from gpt2.training.evaluation import evaluate_data, evaluate_task, mean_loss, summed_loss
from gpt2.training.tasks import TASKS, load_items
from tests.gpt2.evaluation_data import TEXT, make_folder, make_model
from tinygrad2 import no_grad
from tinygrad2.distributed import SoloComm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("user"))


@pytest.fixture
def user(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_mean_loss_weights_all_windows_equally(folder):
    model, data = make_model(257), TokenDataset.open(folder / "data" / "text", "val")
    with no_grad():
        losses = [model.loss(*data.batch([i], 16)).item() for i in range(7)]
    assert max(losses) > min(losses) + 0.01
    assert mean_loss(model, data, 2, 16, 3) == pytest.approx(np.mean(losses[:6]), rel=1e-6)
    windows = data.windows(16)
    assert windows % 7 != 0  # the last batch is not full
    whole = mean_loss(model, data, 7, 16, 10**6)
    assert whole == pytest.approx(mean_loss(model, data, 1, 16, windows), rel=1e-6)
    parts = [summed_loss(model, data, range(windows)[part::3], 4, 16) for part in range(3)]
    assert sum(parts) / (windows * 16) == pytest.approx(whole, rel=1e-6)


class Both(SoloComm):
    """Simulates two ranks that run one after the other: the second one gathers the values of both."""

    size = 2

    def __init__(self):
        self.gathered = []

    def all_gather(self, array):
        self.gathered.append(array)
        return np.stack(self.gathered)


def test_an_evaluation_is_divided_among_ranks(user):
    model, tokenizer = make_model(257), Tokenizer.load("bytes")
    data, whole, parts = TokenDataset.open(user / "data" / "text", "val"), Both(), Both()
    for rank in range(2):
        whole.rank = parts.rank = rank
        loss = mean_loss(model, data, 2, 16, 5, whole)
        task = evaluate_task(TASKS["hellaswag"], model, tokenizer, load_items(TASKS["hellaswag"], "h.jsonl"), 4, parts)
    assert loss == pytest.approx(mean_loss(model, data, 2, 16, 5), rel=1e-6)
    alone = evaluate_task(TASKS["hellaswag"], model, tokenizer, load_items(TASKS["hellaswag"], "h.jsonl"), 4)
    assert task == pytest.approx(alone, rel=1e-6)
    assert [array[0] for array in parts.gathered] == [4, 3]  # the seven items, divided between the ranks


@pytest.mark.parametrize("name", ["text", "pairs"])
def test_bits_per_byte_of_uniform_probabilities(name, folder):
    """If all tokens are equally probable, each costs log2(V) bits; the bytes are those of the decoded text."""
    data = TokenDataset.open(folder / "data" / name, "val")
    tokenizer = Tokenizer.load(folder / "data" / name)
    V = tokenizer.vocab_size
    ids = data.read(1, data.windows(16) * 16)
    text = tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text])
    assert {tokenizer.end_of_text, 256} <= set(ids.tolist())
    figures = evaluate_data(make_model(V, seed=None), tokenizer, data, 8, 16)
    assert figures == {
        "loss": pytest.approx(math.log(V), rel=1e-6),
        "perplexity": pytest.approx(V, rel=1e-5),
        "bits_per_byte": pytest.approx(math.log2(V) * len(ids) / len(text), rel=1e-6),
        "tokens": len(ids),
        "bytes": len(text),
        "block_size": 16,
    }


def test_the_number_of_batches_can_be_limited(folder):
    data, tokenizer = TokenDataset.open(folder / "data" / "text", "val"), Tokenizer.load("bytes")
    model = make_model(257)
    figures = evaluate_data(model, tokenizer, data, 3, 8, batches=2)
    assert figures["tokens"] == 2 * 3 * 8
    assert figures["loss"] == pytest.approx(mean_loss(model, data, 3, 8, 2), rel=1e-6)


def test_data_with_another_tokenizer_is_rejected(folder):
    with pytest.raises(ValueError, match=r"pairs: prepared with the tokenizer ab; expected the model's, bytes"):
        evaluate_data(
            make_model(257), Tokenizer.load("bytes"), TokenDataset.open(folder / "data" / "pairs", "val"), 2, 8
        )


def test_data_of_another_program_is_evaluated_with_the_gpt2_tokenizer(gpt2_files, tmp_path):
    gpt2 = Tokenizer.load("gpt2")
    gpt2.encode(TEXT).astype("<u2").tofile(tmp_path / "val.bin")
    data = TokenDataset.open(tmp_path, "val")
    figures = evaluate_data(make_model(50257), gpt2, data, 2, 8, batches=3)
    assert figures["bytes"] == len(gpt2.decode_bytes(data.read(1, 48)))
    with pytest.raises(ValueError, match=r"with the tokenizer gpt2; expected the model's, bytes"):
        evaluate_data(make_model(257), Tokenizer.load("bytes"), data, 2, 8)


def test_a_damaged_model_is_reported(folder):
    model = make_model(257)
    model.wte.weight.data = np.full(model.wte.weight.shape, np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="the model's loss is nan"):
        evaluate_data(model, Tokenizer.load("bytes"), TokenDataset.open(folder / "data" / "text", "val"), 2, 8, 1)
