"""Parity with PyTorch's GPT-2: comparisons with golden files, and with torch and transformers if they are installed.

Differences are relative: for logits to the largest logit's magnitude, for gradients and parameters |a - b| / |b| over
the entire tensor. An elementwise comparison would be meaningless where the true gradient is zero: adding a constant
vector to every key shifts all scores of a row by the same amount, so the gradient of the key bias (the middle third of
c_attn.bias) is only rounding noise, and Adam turns that noise into steps of the size of the learning rate.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from gpt2 import GPT2, GPT2Config
from tinygrad2 import no_grad, optim

GOLDEN = Path(__file__).parent / "golden"
BOUNDS = {  # upper bounds, by dtype
    "float32": {"logits": 2e-5, "loss": 1e-5, "gradients": 1e-4, "losses": 1e-4, "norms": 1e-4, "final": 1e-3},
    "float64": {"logits": 1e-12, "loss": 1e-12, "gradients": 1e-11, "losses": 1e-11, "norms": 1e-11, "final": 1e-10},
}


def difference(ours, theirs):
    """|ours - theirs| / |theirs|, with Euclidean norms over all elements."""
    ours, theirs = np.asarray(ours, dtype="float64"), np.asarray(theirs, dtype="float64")
    return np.linalg.norm((ours - theirs).ravel()) / np.linalg.norm(theirs.ravel())


def without_key_bias(name, values):
    if not name.endswith("c_attn.bias"):
        return values
    query, _, value = np.split(np.asarray(values), 3)
    return np.concatenate((query, value))


def figures_of_step(model, tokens, targets, logits, loss, gradients):
    """Compare one forward and backward pass. Returns the differences of the logits, the loss and the worst gradient."""
    with no_grad():
        ours = model(tokens).numpy()
    ours_loss = model.loss(tokens, targets)
    ours_loss.backward()
    per_name = {name: difference(p.grad, gradients[name]) for name, p in model.named_parameters()}
    assert per_name.keys() == gradients.keys()
    return {
        "logits": np.abs(ours - logits).max() / np.abs(logits).max(),
        "loss": abs(ours_loss.item() - loss) / loss,
        "gradients": max(per_name.values()),
    }


def figures_of_training(model, tokens, targets, losses, norms, max_norm, **settings):
    """Compare AdamW steps with clipping. Returns the largest differences of the losses and of the norms before
    clipping."""
    optimizer = optim.AdamW(model, **settings)
    ours = []
    for _ in losses:
        optimizer.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        ours.append((loss.item(), float(optimizer.step(max_norm))))
    ours_losses, ours_norms = np.array(ours).T
    return {"losses": np.abs(ours_losses / losses - 1).max(), "norms": np.abs(ours_norms / norms - 1).max()}


def show(capsys, title, figures, bounds):
    """Print the figures, and assert that each is within its bound."""
    with capsys.disabled():
        print(f"\n{title}")
        for name, value in figures.items():
            print(f"  {name:<10} {value:8.1e}  bound {bounds[name]:.0e}  {'ok' if value <= bounds[name] else 'FAILED'}")
    assert {name: value for name, value in figures.items() if not value <= bounds[name]} == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_results_agree_with_the_golden_files(activation, dtype, capsys):
    with safe_open(GOLDEN / activation / "expected.safetensors", framework="numpy") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads(file.metadata()["optimizer"])
    tokens, targets = expected["tokens"], expected["targets"]
    gradients = {n.removeprefix("gradient."): v for n, v in expected.items() if n.startswith("gradient.")}
    final = {n.removeprefix("final."): v for n, v in expected.items() if n.startswith("final.")}

    model = GPT2.from_pretrained(GOLDEN / activation, dtype=dtype)
    figures = figures_of_step(model, tokens, targets, expected["logits"], expected["loss"], gradients)
    figures |= figures_of_training(model, tokens, targets, expected["losses"], expected["norms"], **settings)
    figures["final"] = max(
        difference(without_key_bias(name, p.data), without_key_bias(name, final[name]))
        for name, p in model.named_parameters()
    )
    show(capsys, f"golden, {activation}, {dtype}", figures, BOUNDS[dtype])


SMALL = {"vocab_size": 211, "n_positions": 64, "n_embd": 96, "n_layer": 3, "n_head": 4, "activation_function": "gelu"}
PUBLISHED = {"vocab_size": 50257, "activation_function": "gelu_new"}


# With a higher learning rate the model would memorize the batch: the compared losses would be close to 0, and rounding
# errors would grow from step to step. With these rates, ten steps change the loss, and rounding errors stay small.
@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
@pytest.mark.parametrize(
    ("sizes", "lr"),
    [pytest.param(SMALL, 3e-4, id="small"), pytest.param(PUBLISHED, 1e-5, id="124M", marks=pytest.mark.slow)],
)
def test_results_agree_with_transformers(sizes, lr, tmp_path, capsys):
    from tests.gpt2.golden import make_golden as golden

    theirs = golden.random_model(0, **sizes)
    tokens, targets = golden.random_batch(1, theirs, B=2, T=64)
    assert golden.attention_peak(theirs, tokens) > 0.5
    theirs.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    logits, loss, gradients = golden.gradients(theirs, tokens, targets)
    gradients = {name: gradient.numpy() for name, gradient in gradients.items()}
    ids = tokens.numpy(), targets.numpy()
    figures = figures_of_step(model, *ids, logits.numpy(), loss.item(), gradients)
    del logits, gradients
    settings = {**golden.OPTIMIZER, "lr": lr}
    losses, norms = np.array(list(golden.adamw_steps(theirs, tokens, targets, settings))).T
    assert norms.min() > golden.MAX_NORM  # every step is clipped
    figures |= figures_of_training(model, *ids, losses, norms, golden.MAX_NORM, **settings)
    show(capsys, f"live, {model.n_parameters():,} parameters, float32", figures, BOUNDS["float32"])


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_transformers_reads_the_saved_model(tmp_path):
    """transformers computes the same logits, in the dtype of the file, after a change to every weight."""
    import torch
    import transformers

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=4, activation_function="gelu")
    for dtype, bound in (("float32", 1e-6), ("float64", 1e-14)):
        model = GPT2(config, seed=3, dtype=dtype)
        for parameter in model.parameters():
            parameter.data += np.linspace(-0.5, 0.5, parameter.size).reshape(parameter.shape)
        model.save_pretrained(tmp_path)
        theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        tokens = np.arange(20).reshape(2, 10)
        with torch.no_grad():
            logits = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
        ours = model(tokens).numpy()
        assert logits.dtype == ours.dtype
        assert np.abs(ours - logits).max() <= bound * np.abs(logits).max()


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_tokens_equal_those_of_transformers(tmp_path, cache):
    """Tokens are compared up to the full context, with and without the key-value cache."""
    import torch
    import transformers

    model = GPT2(GPT2Config(vocab_size=211, n_positions=48, n_embd=64, n_layer=3, n_head=4), seed=5)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * 6  # far from uniform, so that a wrong position is detected
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for prompt in ([3], [7, 7, 9, 200], list(range(40))):
        new = 48 - len(prompt)
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
        assert len(set(expected.tolist())) > 1
        assert model.generate(prompt, new, temperature=0, cache=cache) == [expected.tolist()]
