"""gpt2/language_model.py: a model with another architecture can be trained and evaluated, and generates text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2Config
from gpt2.generate import generate
from gpt2.language_model import LanguageModel
from gpt2.training.dataset import TokenDataset
from gpt2.training.evaluation import evaluate_data
from gpt2.training.options import resolve_options
from gpt2.training.run import Progress, RunFolder
from gpt2.training.trainer import Trainer
from tinygrad2 import nn, no_grad, ops, optim


@dataclass(frozen=True)
class BigramConfig:
    vocab_size: int
    n_positions: int = 32

    def flops_per_token(self, block_size):
        return 6 * 8 * self.vocab_size


class Bigram(nn.Module):
    """A bigram model: the logits depend only on the last token, so it needs no cache."""

    activations = "float32"

    def __init__(self, config):
        self.config = config
        self.table = nn.Embedding(config.vocab_size, 8)
        self.output = nn.Linear(8, config.vocab_size)

    @property
    def backend(self):
        return self.table.weight.backend

    def features(self, tokens, key=None, cache=None):
        if cache is not None:
            cache.length += np.shape(tokens)[1]
        return self.table(tokens)

    def head(self, features):
        return self.output(features)

    def loss(self, tokens, targets, key=None):
        return ops.cross_entropy(self.head(self.features(tokens)), targets)

    backward = LanguageModel.backward

    def cache_shapes(self, batch, capacity):
        return []


@pytest.fixture
def trained(workspace):
    """The trainer of a Bigram after 60 steps, and the logged rows."""
    train, validation = (TokenDataset.open(Path("data/text"), split) for split in ("train", "val"))
    tokenizer = train.tokenizer()
    given = {
        "batch_size": 8,
        "block_size": 32,
        "max_iters": 60,
        "learning_rate": 0.03,
        "eval_iters": 4,
        "optimizer": "adamw",
    }
    options = resolve_options(given, GPT2Config.preset("nano"))
    options.total_batch_size = 8 * 32
    model = Bigram(BigramConfig(tokenizer.vocab_size))
    data = train, validation, tokenizer
    trainer = Trainer(model, optim.AdamW(model), options, data, RunFolder("out"), Progress())
    rows = []
    for _ in range(60):
        trainer.step()
        rows += trainer.finished_steps(wait=True)
    return trainer, rows


def test_a_bigram_model_is_trained_and_evaluated(trained):
    trainer, rows = trained
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["loss"] == pytest.approx(np.log(257), abs=0.3)
    found = trainer.evaluate([])["val_loss"]
    assert found < 3.5
    assert trainer.progress.best == {"step": 60, "val_loss": found}
    figures = evaluate_data(trainer.model, trainer.tokenizer, trainer.validation, 8, 32, batches=4)
    assert figures["loss"] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_a_bigram_model_generates_text(trained, cache):
    model = trained[0].model
    with no_grad():
        follows = model.head(model.features(np.arange(257)[None])).numpy()[0].argmax(-1)
    expected = [int(follows[97])]
    while len(expected) < 40:  # beyond the context
        expected.append(int(follows[expected[-1]]))
    assert [int(tokens[0]) for tokens in generate(model, [97], 40, temperature=0, cache=cache)] == expected
