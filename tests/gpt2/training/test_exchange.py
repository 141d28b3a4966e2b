"""gpt2/training/exchange.py: runs of train.py can be resumed by nanoGPT, and runs of nanoGPT by train.py."""

import json

import numpy as np
import pytest

from gpt2 import GPT2, Tokenizer, convert
from gpt2.config import is_matrix
from gpt2.formats import torch_file
from gpt2.formats.model_file import find_model
from gpt2.formats.torch_optimizer import pack
from gpt2.training.exchange import UNKNOWN_DATA, read_run
from gpt2.training.run import RunFolder
from tests.gpt2.formats.models import linear, random_model, stored, values
from tests.gpt2.formats.test_torch_optimizer import state
from tests.training_runs import assert_same_run, newest_arrays, run
from tinygrad2 import checkpoint, optim

SHORT = ["--max-iters", "4", "--warmup-iters", "2", "--optimizer", "adamw"]
NANOGPT = {  # settings in nanoGPT's train.py
    "dataset": "text", "batch_size": 2, "block_size": 16, "gradient_accumulation_steps": 3, "max_iters": 9,
    "learning_rate": 2e-3, "min_lr": 1e-4, "warmup_iters": 2, "lr_decay_iters": 9, "weight_decay": 0.1, "beta1": 0.9,
    "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True, "eval_iters": 2, "eval_interval": 4, "log_interval": 1,
    "compile": True, "dtype": "float16", "wandb_log": False,
}  # fmt: skip


def convert_to(form, source, target):
    assert convert.main([str(source), str(target), "--to", form]) == 0


def test_a_run_resumes_after_conversion_to_a_pytorch_file_and_back(workspace):
    """Losses, weights and moments are bit-identical to a run that was not converted."""
    for out in ("a", "b"):
        run(*SHORT, "--out-dir", out)
    convert_to("pt", "b", "b.pt")
    convert_to("run", "b.pt", "c")
    assert newest_arrays("b").keys() == newest_arrays("c").keys()
    for name, array in newest_arrays("b").items():
        assert np.array_equal(array, newest_arrays("c")[name]), name
    assert RunFolder("c").newest(print).progress == RunFolder("b").newest(print).progress
    for name in ("log.jsonl", "samples.jsonl", "starts.jsonl"):
        (workspace / "c" / name).write_bytes((workspace / "b" / name).read_bytes())
    for out in ("a", "c"):
        run("--max-iters", "8", "--out-dir", out)
    assert_same_run("a", "c")


def test_the_file_contains_the_entries_that_nanogpt_reads(workspace):
    run(*SHORT, "--out-dir", "a")
    convert_to("pt", "a", "a.pt")
    tree = torch_file.read_pickle(workspace / "a.pt")
    saved = RunFolder("a").newest(print)
    assert (tree["iter_num"], tree["best_val_loss"]) == (4, saved.progress.best["val_loss"])
    config = tree["config"]
    assert (config["block_size"], config["gradient_accumulation_steps"], config["max_iters"]) == (16, 1, 4)
    assert tree["model_args"]["n_layer"] == 4


@pytest.fixture
def from_nanogpt(workspace):
    """A checkpoint as nanoGPT writes it with --compile, and its model and state."""
    model = random_model(activation_function="gelu", n_positions=32)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.1
    before = state(model, options=NANOGPT)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 32, "bias": True, "vocab_size": 257, "dropout": 0.0}
    tree = {"model": stored(linear(model, "_orig_mod.transformer.")), "model_args": sizes, "config": NANOGPT}
    torch_file.write_pickle(workspace / "ckpt.pt", {**tree, **pack(model.config, before)})
    return model, before


def test_a_nanogpt_checkpoint_is_resumed(from_nanogpt, workspace, capsys):
    model, before = from_nanogpt
    convert_to("run", "ckpt.pt", "out")
    saved = RunFolder("out").newest(print)
    assert (saved.progress.step, saved.optimizer_steps, saved.data) == (7, 6, UNKNOWN_DATA)
    assert saved.progress.best == {"step": 7, "val_loss": 1.5}
    assert (saved.progress.tokens, saved.progress.samples) == (7 * 96, 7 * 6)
    assert saved.options["learning_rate"] == 2e-3
    arrays = newest_arrays("out")
    for name, array in values(model).items():
        assert np.array_equal(arrays[f"transformer.{name}"], array)
        assert np.array_equal(arrays[f"exp_avg.{name}"], before.moments[f"exp_avg.{name}"].read())
    run("--out-dir", "out")
    assert "step 7" in capsys.readouterr().out
    assert RunFolder("out").newest(print).progress.step == 9
    assert Tokenizer.for_model(find_model(workspace / "out", print), 257).name == "bytes"


def test_a_file_without_optimizer_state_is_not_a_run(workspace, capsys):
    random_model().save_pretrained("hf")
    convert.convert("hf", "a.pt", "pt")
    convert.convert("hf", "a.bin", "llmc")
    for source, message in (
        ("hf", "hf/model.safetensors: it has no training state; expected a checkpoint of nanoGPT or train.py"),
        ("a.bin", "a.bin: it has no training state"),
        ("a.pt", "a.pt: its iter_num is NoneType"),
    ):
        capsys.readouterr()
        assert convert.main([source, "out", "--to", "run"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (workspace / "out").exists()
    assert convert.main(["a.pt", "out", "--to", "run", "--dtype", "float16"]) == 1


def test_another_optimizer_is_not_written_to_a_pytorch_file(workspace, capsys):
    run("--max-iters", "4", "--out-dir", "a")
    convert_to("pt", "a", "a.pt")
    assert (
        "the state of the run was not converted: a/ckpt-000004: its optimizer is muon; nanoGPT supports only AdamW"
        in capsys.readouterr().err
    )
    assert "optimizer" not in torch_file.read_pickle(workspace / "a.pt")


def test_invalid_options_are_rejected(from_nanogpt, workspace, capsys):
    tree = torch_file.read_pickle(workspace / "ckpt.pt")
    torch_file.write_pickle(workspace / "bad.pt", tree | {"config": NANOGPT | {"beta1": 0.9, "max_iters": -3}})
    assert convert.main(["bad.pt", "out", "--to", "run"]) == 1
    assert "max-iters is -3" in capsys.readouterr().err
    torch_file.write_pickle(workspace / "bad.pt", tree | {"trainer": json.dumps({"progress": 3})})
    assert convert.main(["bad.pt", "out", "--to", "run"]) == 1
    assert "trainer.json: not a valid file of train.py" in capsys.readouterr().err


def torch_model(config):
    """A module with the parameters of nanoGPT's model, in the same order and with the same names."""
    from torch import nn

    C = config.n_embd

    def block():
        attention = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        return nn.ModuleDict({"ln_1": nn.LayerNorm(C), "attn": attention, "ln_2": nn.LayerNorm(C), "mlp": mlp})

    parts = {"wte": nn.Embedding(config.vocab_size, C), "wpe": nn.Embedding(config.n_positions, C)}
    parts |= {"h": nn.ModuleList([block() for _ in range(config.n_layer)]), "ln_f": nn.LayerNorm(C)}
    model = nn.ModuleDict({"transformer": nn.ModuleDict(parts), "lm_head": nn.Linear(C, config.vocab_size, bias=False)})
    model["transformer"]["wte"].weight = model["lm_head"].weight
    return model


def torch_optimizer(model):
    """The optimizer as nanoGPT's configure_optimizers creates it."""
    import torch

    parameters = [p for _, p in model.named_parameters()]
    decay, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def assert_one_step_is_equal(folder, theirs, optimizer):
    """Assert that one step with the same gradients gives the same parameters in both programs, up to 1e-6."""
    import torch

    ours = GPT2.from_pretrained(folder)
    step = optim.AdamW(ours, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    saved = RunFolder(folder.parent).newest(print)
    step.load_state(checkpoint.load_arrays(folder / "optimizer.safetensors"), saved.optimizer_steps)
    tokens = np.random.default_rng(3).integers(257, size=(2, 17))
    ours.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = {name: p.grad.copy() for name, p in ours.named_parameters()}
    names = [name.removeprefix("transformer.") for name, _ in theirs.named_parameters()]
    names = ["wte.weight" if name == "lm_head.weight" else name for name in names]
    for name, p in zip(names, theirs.parameters(), strict=True):
        before = ours_values = dict(ours.named_parameters())[name].data
        np.testing.assert_array_equal(p.detach().numpy(), before.T if is_matrix(name) else ours_values)
        p.grad = torch.from_numpy(np.ascontiguousarray(gradients[name].T if is_matrix(name) else gradients[name]))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    step.step()
    for name, p in zip(names, theirs.parameters(), strict=True):
        found = dict(ours.named_parameters())[name].data
        np.testing.assert_allclose(found.T if is_matrix(name) else found, p.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_nanogpt_resumes_a_run_with_the_same_step(workspace):
    """Loads the checkpoint as nanoGPT's `--init_from=resume` does, and compares one step."""
    import torch

    run(*SHORT, "--out-dir", "a")
    convert_to("pt", "a", "a.pt")
    tree = torch.load(workspace / "a.pt", weights_only=True)
    folder = find_model(workspace / "a", print)
    theirs = torch_model(GPT2.from_pretrained(folder).config)
    theirs.load_state_dict(tree["model"])
    optimizer = torch_optimizer(theirs)
    optimizer.load_state_dict(tree["optimizer"])
    assert_one_step_is_equal(folder, theirs, optimizer)


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_a_checkpoint_written_by_pytorch_resumes_with_the_same_step(workspace):
    """Trains for three steps in PyTorch, saves with torch.save, and compares one more step."""
    import torch

    torch.manual_seed(0)
    config = random_model().config
    theirs = torch_model(config)
    optimizer = torch_optimizer(theirs)
    for _ in range(3):
        for p in theirs.parameters():
            p.grad = 0.01 * torch.randn(p.shape)
        optimizer.step()
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": 257, "dropout": 0.0}
    entries = {"iter_num": 3, "best_val_loss": torch.tensor(5.5), "model_args": sizes, "config": NANOGPT}
    torch.save({"model": theirs.state_dict(), "optimizer": optimizer.state_dict(), **entries}, "ckpt.pt")
    convert_to("run", "ckpt.pt", "out")
    assert RunFolder("out").newest(print).progress.best == {"step": 3, "val_loss": 5.5}
    assert_one_step_is_equal(find_model(workspace / "out", print), theirs, optimizer)


def test_read_run_reads_a_checkpoint_and_rejects_invalid_files(workspace):
    run(*SHORT, "--out-dir", "a")
    folder = find_model(workspace / "a", print)
    found = read_run(folder, GPT2.from_pretrained(folder).config)
    assert (found.step, found.optimizer_steps, found.betas, found.weight_decay) == (4, 4, (0.9, 0.95), 0.1)
    (folder / "trainer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a valid file of train\.py"):
        read_run(folder, GPT2.from_pretrained(folder).config)
