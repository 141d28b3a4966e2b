"""examples/gpt2_in_one_file.py compared with the engine, finite differences and transformers; its command line."""

import ast
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from examples import gpt2_in_one_file as one_file
from examples.gpt2_in_one_file import Config, Tensor
from gpt2 import GPT2, GPT2Config, Tokenizer
from tinygrad2 import no_grad, optim

pytestmark = pytest.mark.usefixtures("one_blas_thread")

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "examples" / "gpt2_in_one_file.py"
CHECKPOINT = ROOT / "checkpoint"
SIZES = {"vocab_size": 29, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}


@pytest.fixture
def one_blas_thread():
    """Limit BLAS to one thread, because the matrices are small and other tests may use the other cores."""
    with threadpool_limits(1):
        yield


def test_the_file_has_at_most_600_lines():
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) <= 600


def test_the_file_imports_only_numpy_and_the_standard_library():
    nodes = list(ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - {"numpy"} <= sys.stdlib_module_names


def test_the_example_in_the_docstring():
    assert doctest.testmod(one_file).failed == 0


# Each backward pass compared with central differences in float64, for every element of every input.


def arrays(*shapes):
    rng = np.random.default_rng(len(shapes))
    return [rng.normal(size=shape) for shape in shapes]


IDS = np.array([[3, 0, 3], [1, 3, 4]])
OPERATIONS = {
    "add": (one_file.add, arrays((2, 3, 4), (2, 3, 4))),
    "add_bias": (one_file.add, arrays((2, 3, 4), (4,))),
    "add_positions": (one_file.add, arrays((2, 3, 4), (3, 4))),
    "matmul": (one_file.matmul, arrays((2, 3, 4), (4, 5))),
    "transpose": (one_file.transpose, arrays((3, 5))),
    "embedding": (lambda table: one_file.embedding(IDS, table), arrays((6, 4))),
    "layer_norm": (lambda *inputs: one_file.layer_norm(*inputs, eps=0.1), arrays((2, 3, 5), (5,), (5,))),
    "gelu": (one_file.gelu, arrays((3, 7))),
    "attention": (lambda qkv: one_file.attention(qkv, n_head=2), arrays((2, 5, 12))),
    "cross_entropy": (lambda logits: one_file.cross_entropy(logits, IDS), arrays((2, 3, 5))),
}


def worst_error(operation, inputs, h=1e-6):
    """The largest difference between the gradients and central differences of a random linear function of y."""
    weights = np.random.default_rng(9).normal(size=operation(*map(Tensor, inputs)).data.shape)

    def loss(values):
        return float((operation(*map(Tensor, values)).data * weights).sum())

    tensors = [Tensor(values.copy()) for values in inputs]
    y = operation(*tensors)
    Tensor((y.data * weights).sum(), (y,), lambda dy: (dy * weights,)).backward()
    worst = 0.0
    for x, tensor in zip(inputs, tensors, strict=True):
        for i in np.ndindex(x.shape):
            before, sides = x[i], []
            for step in (h, -h):
                x[i] = before + step
                sides.append(loss(inputs))
            x[i] = before
            worst = max(worst, abs((sides[0] - sides[1]) / (2 * h) - tensor.grad[i]))
    return worst


@pytest.mark.parametrize("name", OPERATIONS)
def test_backward_agrees_with_finite_differences(name):
    operation, inputs = OPERATIONS[name]
    assert worst_error(operation, inputs) < 1e-8


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_of_a_thousandth_in_the_gradient_is_detected(name):
    operation, inputs = OPERATIONS[name]

    def wrong(*tensors):
        y = operation(*tensors)
        function = y.function
        return Tensor(y.data, y.parents, lambda dy: tuple(1.001 * gradient for gradient in function(dy)))

    assert worst_error(wrong, inputs) > 1e-5


# Backward through the tape.


def test_gradients_of_all_uses_are_added():
    x, w = Tensor(np.array([[2.0]])), Tensor(np.array([[5.0]]))
    y = x @ w
    (y @ w + y).backward()  # x w^2 + x w
    assert x.grad.item() == 25 + 5
    assert w.grad.item() == 2 * 2 * 5 + 2


def test_a_tape_can_be_used_only_once():
    x = Tensor(3.0)
    y = x + x
    (y + y).backward()
    with pytest.raises(ValueError, match="freed this part of the tape"):
        (y + x).backward()
    with pytest.raises(ValueError, match="expected a computed tensor with one element"):
        x.backward()
    with pytest.raises(ValueError, match=re.escape("the shape is (2,)")):
        (Tensor(np.ones(2)) + Tensor(np.ones(2))).backward()


def test_add_rejects_shapes_that_it_does_not_broadcast():
    with pytest.raises(ValueError, match=re.escape("add: shapes (2, 1) and (1, 2)")):
        one_file.add(Tensor(np.ones((2, 1))), Tensor(np.ones((1, 2))))


# Comparison with the engine.


def twins(dtype, config=None, seed=1):
    """The same model in the engine and in the file: with random parameters if a config is given, else from
    checkpoint/."""
    if config is None:
        engine = GPT2.from_pretrained(CHECKPOINT, dtype=dtype)
    else:
        engine, rng = GPT2(config, seed=None, dtype=dtype), np.random.default_rng(seed)
        for parameter in engine.parameters():
            parameter.data[...] = rng.normal(0, 0.4, parameter.shape)
    sizes = {name: getattr(engine.config, name) for name in Config.__dataclass_fields__}
    values = {name: parameter.numpy().copy() for name, parameter in engine.named_parameters()}
    return engine, one_file.GPT2(Config(**sizes), values)


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("config", [GPT2Config(**SIZES, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0), None])
def test_logits_loss_and_gradients_agree_with_the_engine(config):
    engine, model = twins("float64", config)
    rng = np.random.default_rng(2)
    ids, targets = rng.integers(model.config.vocab_size, size=(2, 3, min(40, model.config.n_positions)))
    with no_grad():
        assert relative_error(model.logits(ids).data, engine(ids).numpy()) < 1e-12
    loss, expected = model.loss(ids, targets), engine.loss(ids, targets)
    assert float(loss.data) == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    parameters = dict(engine.named_parameters())
    assert model.parameters.keys() == parameters.keys()
    norm = max(np.abs(parameter.grad).max() for parameter in parameters.values())
    for name, parameter in parameters.items():
        # The gradient of the key bias is zero except for rounding, so errors are measured against the largest gradient.
        assert np.abs(model.parameters[name].grad - parameter.grad).max() < 1e-12 * norm, name


# With a higher learning rate the model would memorize the batches. Then the compared losses would be close to 0, and
# rounding errors would grow from step to step.
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-5), pytest.param("float64", 1e-12, marks=pytest.mark.slow)]
)
def test_losses_of_ten_steps_agree_with_the_engine(dtype, bound):
    """Both models start from checkpoint/ and use the same batches, AdamW, clipping and learning rates."""
    engine, model = twins(dtype)
    ids = np.frombuffer((ROOT / "README.md").read_bytes(), np.uint8)
    theirs, ours = optim.AdamW(engine, betas=(0.9, 0.95), weight_decay=0.1), one_file.AdamW(model.parameters)
    losses = []
    for step in range(10):
        tokens, targets = one_file.batch(ids, 4, 64, np.random.default_rng(step % 2))
        lr = one_file.learning_rate(step, steps=10, peak=3e-4, warmup=3)
        theirs.lr = optim.cosine(step, lr=3e-4, min_lr=3e-5, warmup=3, decay_steps=10)
        assert lr == pytest.approx(theirs.lr, rel=1e-12)
        expected = engine.loss(tokens.astype(np.int64), targets.astype(np.int64))
        expected.backward()
        theirs.step(max_norm=1.0)
        theirs.zero_grad()
        losses.append(expected.item())
        assert one_file.train_step(model, ours, tokens, targets, lr) == pytest.approx(losses[-1], rel=bound)
    assert losses[9] < losses[1] - 0.5  # on the same batch
    assert all(p.data.dtype == dtype for p in model.parameters.values())


def test_clipping_scales_a_large_gradient_as_the_engine_does():
    engine, model = twins("float64", GPT2Config(**SIZES, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0))
    ids, targets = np.random.default_rng(0).integers(29, size=(2, 2, 11))
    optimizer, expected = one_file.AdamW(model.parameters), optim.AdamW(engine, betas=(0.9, 0.95), weight_decay=0.1)
    model.loss(ids, targets).backward()
    engine.loss(ids, targets).backward()
    expected.lr = 0.01
    norm = optimizer.step(0.01, max_norm=0.1)
    assert norm > 0.1
    assert norm == pytest.approx(float(expected.step(max_norm=0.1)), rel=1e-12)
    for name, parameter in engine.named_parameters():
        np.testing.assert_allclose(model.parameters[name].data, parameter.numpy(), rtol=1e-6, atol=1e-8, err_msg=name)


def test_initial_weights_have_the_scales_of_the_engine():
    config = Config(n_layer=2, n_embd=64)
    for name, parameter in one_file.GPT2.random(config, np.random.default_rng(0)).parameters.items():
        values = parameter.data
        assert values.dtype == np.float32, name
        if values.ndim == 1:
            assert (values == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name
        else:
            expected = 0.01 if "c_proj" in name else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert values.std() == pytest.approx(expected, rel=0.05), name


# Model files.


@pytest.fixture
def saved(tmp_path):
    """A folder that the program wrote, and the model in it."""
    model = one_file.GPT2.random(Config(n_embd=12, n_head=3, n_layer=2, n_positions=16), np.random.default_rng(3))
    one_file.save(tmp_path / "model", model)
    return tmp_path / "model", model


def test_saved_files_can_be_loaded(saved):
    folder, model = saved
    read = one_file.load(folder)
    assert read.config == model.config
    for name, parameter in model.parameters.items():
        np.testing.assert_array_equal(read.parameters[name].data, parameter.data)


def test_the_engine_loads_the_saved_files(saved):
    folder, model = saved
    engine, ids = GPT2.from_pretrained(folder), np.arange(32).reshape(2, 16)
    assert engine.config.embd_pdrop == engine.config.attn_pdrop == engine.config.resid_pdrop == 0
    assert Tokenizer.for_model(folder, 257).name == "bytes"
    for name, parameter in engine.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), model.parameters[name].data)
    with no_grad():
        np.testing.assert_allclose(engine(ids).numpy(), model.logits(ids).data, rtol=0, atol=1e-6)


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_transformers_loads_the_saved_files(saved):
    import torch
    import transformers

    folder, model = saved
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.arange(32).reshape(2, 16)
    logits = theirs.eval()(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(model.logits(ids).data, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_point_dtype_is_read(dtype, tmp_path):
    import ml_dtypes
    from safetensors.numpy import save_file

    values = np.random.default_rng(0).normal(size=(3, 4)).astype(getattr(ml_dtypes, dtype, dtype))
    save_file({"a": values, "scalar": np.array(values[0, 0])}, tmp_path / "x.safetensors")
    read = one_file.read_safetensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["a"], values.astype(np.float32))
    assert read["scalar"].shape == ()


# The command line.


def error_of(capsys, *arguments):
    """Run the program, which must fail, and return the one line that it prints."""
    assert one_file.main([str(argument) for argument in arguments]) == 1
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("gpt2_in_one_file.py: error: ")
    return lines[0]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(500)), encoding="utf-8")
    return path


def test_train_and_sample_commands(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert one_file.main(["train", str(text), "--steps", "20", "--batch-size", "4", "--out", str(out)]) == 0
    losses = [float(loss) for loss in re.findall(r"unseen text (\S+)", capsys.readouterr().out)]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(5.2, abs=0.4)  # after one step; initially log 257 = 5.55
    assert losses[-1] < losses[0] - 1
    for _ in range(2):
        assert (
            one_file.main(["sample", "--checkpoint", str(out), "-p", "7 times", "--max-tokens", "20", "--seed", "5"])
            == 0
        )
    first, second = re.findall(r"7 times.*?(?=7 times|\Z)", capsys.readouterr().out, re.DOTALL)
    assert first == second
    assert one_file.main(["train", str(text), "--steps", "1", "--batch-size", "4", "--init", str(out)]) == 0
    assert float(re.search(r"loss (\S+)  unseen", capsys.readouterr().out)[1]) < losses[0] - 1


def test_the_model_in_checkpoint_is_the_default(capsys):
    assert one_file.main(["sample", "-p", "Return the", "--max-tokens", "12", "--temperature", "0"]) == 0
    found = capsys.readouterr().out
    model = GPT2.from_pretrained(CHECKPOINT)
    prompt = list(b"Return the")
    assert found == "Return the" + bytes(model.generate(prompt, 12, temperature=0)[0]).decode() + "\n"


def test_top_k_draws_from_the_most_probable_tokens():
    model = one_file.load(CHECKPOINT)
    logits = model.logits(np.array([list(b"def ")])).data[0, -1]
    top = set(np.argsort(-logits)[:3].tolist())
    drawn = {next(one_file.sample(model, b"def ", 1.0, 3, np.random.default_rng(seed))) for seed in range(40)}
    assert drawn == top
    assert next(one_file.sample(model, b"def ", 0, None, np.random.default_rng(0))) == logits.argmax()


def test_a_generated_text_may_exceed_the_context(saved):
    _, model = saved
    tokens = one_file.sample(model, b"abc", 0.8, None, np.random.default_rng(0))
    assert len([next(tokens) for _ in range(20)]) == 20


def test_a_character_of_several_bytes_is_printed_correctly(saved, capsys):
    assert one_file.main(["sample", "--checkpoint", str(saved[0]), "-p", "größer", "--max-tokens", "0"]) == 0
    assert capsys.readouterr().out == "größer\n"


def test_invalid_input_prints_one_line(text, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    assert "No such file" in error_of(capsys, "train", tmp_path / "missing.txt")
    assert "the text has 5 bytes; expected at least 650" in error_of(capsys, "train", tmp_path / "short.txt")
    assert "Is a directory" in error_of(capsys, "train", tmp_path)
    assert "expected positive values" in error_of(capsys, "train", text, "--steps", "0")
    assert "--learning-rate" in error_of(capsys, "train", text, "--learning-rate", "nan")
    assert "invalid int value: 'many'" in error_of(capsys, "train", text, "--steps", "many")
    assert "try a lower --learning-rate" in error_of(capsys, "train", text, "--steps", "40", "--learning-rate", "1e30")
    assert "config.json" in error_of(capsys, "sample", "--checkpoint", tmp_path / "empty")
    assert "--temperature" in error_of(capsys, "sample", "--temperature", "-1")
    assert "--top-k" in error_of(capsys, "sample", "--top-k", "0")
    assert "arguments are required" in error_of(capsys)
    assert "invalid choice: 'chat'" in error_of(capsys, "chat")


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


DAMAGES = {
    "the config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "the config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not valid JSON"),
    "a size is a string": (lambda folder: change(folder, n_layer="2"), "config.json: not valid JSON, or a size"),
    "another vocabulary": (lambda folder: change(folder, vocab_size=50257), "vocab_size 257"),
    "heads of unequal sizes": (lambda folder: change(folder, n_head=5), "n_embd a multiple of n_head"),
    "a size of 0": (lambda folder: change(folder, n_layer=0), "expected positive sizes"),
    "another activation": (lambda folder: change(folder, activation_function="relu"), "gelu_new"),
    "a missing layer": (lambda folder: change(folder, n_layer=3), "h.2.ln_1.weight is missing; expected shape (12,)"),
    "another context": (lambda folder: change(folder, n_positions=9), "wpe.weight has shape (16, 12)"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
    "not a safetensors file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"PK" * 99),
        "not a valid safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_prints_one_line(damage, saved, capsys):
    damaging, message = DAMAGES[damage]
    damaging(saved[0])
    assert message in error_of(capsys, "sample", "--checkpoint", saved[0])


def test_truncated_weights_print_one_line(saved, capsys):
    file = saved[0] / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 8, 60, len(data) - 100):
        file.write_bytes(data[:length])
        assert "not a valid safetensors file" in error_of(capsys, "sample", "--checkpoint", saved[0])


def test_the_file_runs_as_a_script(saved):
    command = [
        sys.executable,
        SOURCE,
        "sample",
        "--checkpoint",
        saved[0],
        "-p",
        "a",
        "--max-tokens",
        "3",
        "--seed",
        "1",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=saved[0], check=True)
    assert ran.stdout.startswith("a")
    assert ran.stderr == ""
