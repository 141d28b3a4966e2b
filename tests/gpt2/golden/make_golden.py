"""Write the golden files next to this script: the results of PyTorch and transformers for two small GPT-2 models.

    python tests/gpt2/golden/make_golden.py

For each form of GELU, it writes a folder in the Hugging Face layout (config.json and model.safetensors in float32,
saved by transformers) and expected.safetensors, which contains the tokens and targets and, in float64, the logits, the
loss and every gradient (`gradient.NAME`). It also contains the losses of ten AdamW steps with clipping, the gradient
norms before clipping and the final parameters (`final.NAME`). The metadata contains the optimizer's settings.

test_parity.py uses the same functions for its comparison with the installed transformers.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

SMALL = {"vocab_size": 61, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
STEPS = 10


def random_model(seed, **sizes):
    """A GPT2LMHeadModel without dropout, in float32, with weights so large that every part affects the result.

    Activations have a variance of about 1 after every matrix. Queries and keys have a larger one, so that attention
    scores have a standard deviation of about 5 and attention is far from uniform. Biases and gains are random too.
    """
    rest = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "attn_implementation": "eager"}
    end_of_text = sizes["vocab_size"] - 1
    config = GPT2Config(**sizes, **rest, bos_token_id=end_of_text, eos_token_id=end_of_text)
    model = GPT2LMHeadModel(config).eval()
    C = model.config.n_embd
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * draw + (1 if ".ln_" in name and name.endswith("weight") else 0))
            elif name.endswith(("wte.weight", "wpe.weight")):
                parameter.copy_(draw * 2 / C**0.5)
            else:
                gain = 2.2 if "c_attn" in name else 1
                parameter.copy_(draw * gain / parameter.shape[0] ** 0.5)
    return model


def random_batch(seed, model, B, T):
    """Tokens and targets, each (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(model.config.vocab_size, (B, T + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def attention_peak(model, tokens):
    """The largest attention weight in a row, averaged over layers, heads and the second half of the rows."""
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    return (
        torch.stack([weights[..., tokens.shape[1] // 2 :, :].amax(-1).mean() for weights in attentions]).mean().item()
    )


def named_parameters(model):
    """The parameters by this project's names, which have no `transformer.` prefix."""
    return {name.removeprefix("transformer."): parameter for name, parameter in model.named_parameters()}


def loss_of(logits, targets):
    """The cross-entropy in the dtype of the logits (transformers' own loss is rounded to float32)."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradients(model, tokens, targets):
    """The logits, the loss, and every parameter's gradient by name."""
    model.zero_grad()
    logits = model(tokens).logits
    loss = loss_of(logits, targets)
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad.clone() for name, p in named_parameters(model).items()}


def adamw_steps(model, tokens, targets, settings):
    """Do ten steps with clipping on one batch. Yields the loss before each step and the norm of its gradients."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], **settings)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model(tokens).logits, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        yield loss.item(), norm.item()


def main():
    for seed, activation in enumerate(("gelu_new", "gelu")):
        folder = Path(__file__).parent / activation
        model = random_model(seed, activation_function=activation, **SMALL)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        model.double()
        tokens, targets = random_batch(seed, model, B=2, T=13)
        peak = attention_peak(model, tokens)
        assert peak > 0.5, f"attention is too uniform: the largest weight of a row is {peak:.2f} on average"
        logits, loss, grads = gradients(model, tokens, targets)
        losses, norms = zip(*adamw_steps(model, tokens, targets, OPTIMIZER), strict=True)
        assert min(norms) > MAX_NORM, "some steps are not clipped"
        arrays = {"tokens": tokens, "targets": targets, "logits": logits, "loss": loss}
        arrays |= {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "norms": torch.tensor(norms, dtype=torch.float64),
        }
        arrays |= {f"gradient.{name}": gradient for name, gradient in grads.items()}
        arrays |= {f"final.{name}": p.detach() for name, p in named_parameters(model).items()}
        settings = json.dumps({**OPTIMIZER, "max_norm": MAX_NORM})
        save_file(arrays, folder / "expected.safetensors", metadata={"optimizer": settings})
        print(f"{activation}: peak {peak:.2f}, losses {losses[0]:.2f} to {losses[-1]:.2f}, norms from {min(norms):.1f}")


if __name__ == "__main__":
    main()
