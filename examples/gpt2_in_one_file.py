"""GPT-2 in one file, in pure NumPy: gradients, the model, training and sampling.

    python examples/gpt2_in_one_file.py sample -p "Return the"     # the trained model in checkpoint/ continues a text
    python examples/gpt2_in_one_file.py train FILE                 # trains a small model on a text file, in minutes
    python examples/gpt2_in_one_file.py sample --checkpoint out-one-file -p "Once"

Read it from top to bottom:

    1. The tape         what a gradient is, and how a program computes it by running backwards
    2. The operations   eight operations, each with its formula and the derivation of its backward pass
    3. The model        GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), without
                        dropout
    4. The optimizer    AdamW, gradient clipping, and the learning-rate schedule
    5. The files        config.json and model.safetensors, as in Hugging Face's transformers
    6. Training         training on the bytes of a file
    7. Sampling         generating text token by token
    8. The command line

Comments give the shapes: B sequences of T tokens, C channels, H heads of D = C / H channels, V token ids.
"""

from __future__ import annotations

import argparse
import codecs
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

Array = np.ndarray
Rng = np.random.Generator
END_OF_TEXT = 256  # the id that follows the ids of the 256 bytes

# 1. The tape ----------------------------------------------------------------------------------------------------------
#
# Training minimizes a loss L, which is a single number computed from millions of parameters. The gradient of L with
# respect to an array x has the shape of x. In this file, it is called dx:
#
#     dx[i] = ∂L/∂x[i]        how much L increases per unit of x[i], while everything else is unchanged
#
# One could measure it by changing x[i] by a small h and computing L again, once for every parameter. The chain rule
# gives all of dx in a single backward pass. If y = f(x), and L depends on x only through y, then
#
#     dx[i] = sum_j dy[j] ∂y[j]/∂x[i]
#
# so an operation f only has to compute dx, the gradient of its input, from dy, the gradient of its result. This is its
# backward pass; section 2 derives it for each operation. If x is used several times, each use contributes a dx, and the
# contributions are added.
#
# The tape is the record of the computation: each result stores its inputs and its backward pass. Running the backward
# passes from the loss to the parameters is called backpropagation.

Backward = Callable[[Array], tuple[Array, ...]]
_numbers = itertools.count()


class Tensor:
    """An array that records how it was computed.

    data      the values.
    grad      the gradient of the loss with respect to `data`, once `backward` has run.
    parents   the tensors from which it was computed; empty for a parameter.
    function  the backward pass, which takes dy and returns one gradient per parent.

    >>> x = Tensor(3.0)
    >>> loss = x + x + x
    >>> loss.backward()
    >>> print(x.grad)
    3.0
    """

    def __init__(self, data: Any, parents: tuple[Tensor, ...] = (), function: Backward | None = None):
        self.data: Array = np.asarray(data)
        self.grad: Any = None
        self.parents, self.function = parents, function
        self.number = next(_numbers)  # larger than the numbers of its parents, which already exist

    def __add__(self, other: Tensor) -> Tensor:
        return add(self, other)

    def __matmul__(self, other: Tensor) -> Tensor:
        return matmul(self, other)

    def backward(self) -> None:
        """Compute the gradients of this tensor, a loss with one element, with respect to all tensors it depends on.

        The gradients of parameters are added to `grad`. Those of intermediate results are freed, and so is the tape.
        """
        if self.function is None or self.data.size != 1:
            raise ValueError(f"backward: expected a computed tensor with one element; the shape is {self.data.shape}")
        found: dict[int, Tensor] = {}
        stack = [self]
        while stack:
            tensor = stack.pop()
            if tensor.number not in found:
                found[tensor.number] = tensor
                stack += tensor.parents
        self.grad = np.ones_like(self.data)  # dL / dL
        # Visit the tensors in descending order of their numbers. When a tensor is visited, all tensors computed from it
        # have been visited, so its gradient is complete.
        for number in sorted(found, reverse=True):
            tensor = found.pop(number)
            if tensor.function is not None:
                for parent, gradient in zip(tensor.parents, tensor.function(tensor.grad), strict=True):
                    parent.grad = gradient if parent.grad is None else parent.grad + gradient
                tensor.parents, tensor.function, tensor.grad = (), freed, None


def freed(dy: Array) -> tuple[Array, ...]:
    raise ValueError("backward: an earlier backward has freed this part of the tape; compute the loss again")


# 2. The operations ----------------------------------------------------------------------------------------------------
#
# Each operation computes y and defines `backward`, which computes the gradients of the inputs from dy and can use the
# results of the forward pass. The derivations consider one element first, and then give the matrix form.


def add(a: Tensor, b: Tensor) -> Tensor:
    """y = a + b. If b has fewer axes than a, it is added to every row, like a bias."""
    # y[n,i] = a[n,i] + b[i]. The derivatives are 1, so da = dy. b[i] is used in every row n, so db[i] = sum_n dy[n,i].
    axes = tuple(range(a.data.ndim - b.data.ndim))
    if a.data.shape[len(axes) :] != b.data.shape:
        raise ValueError(f"add: shapes {a.data.shape} and {b.data.shape}; expected equal shapes, or the last axes of a")
    return Tensor(a.data + b.data, (a, b), lambda dy: (dy, dy.sum(axis=axes)))


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """y = x w, the product with a matrix: (..., I) (I, O) -> (..., O)."""
    # y[n,o] = sum_i x[n,i] w[i,o]. Every y[n,o] contains x[n,i] with the factor w[i,o]: dx[n,i] = sum_o dy[n,o] w[i,o].
    # The y[n,o] of every row n contains w[i,o] with the factor x[n,i]: dw[i,o] = sum_n x[n,i] dy[n,o].
    # As matrices: dx = dy w^T and dw = x^T dy.
    rows = x.data.reshape(-1, x.data.shape[-1])  # one product of large matrices is faster than B smaller ones

    def backward(dy: Array) -> tuple[Array, ...]:
        dy = dy.reshape(-1, dy.shape[-1])
        return (dy @ w.data.T).reshape(x.data.shape), rows.T @ dy

    return Tensor((rows @ w.data).reshape(*x.data.shape[:-1], w.data.shape[1]), (x, w), backward)


def transpose(x: Tensor) -> Tensor:
    """y = x^T, for a matrix x."""
    # y[i,j] = x[j,i], so dx[j,i] = dy[i,j].
    return Tensor(x.data.T, (x,), lambda dy: (dy.T,))


def embedding(ids: Array, table: Tensor) -> Tensor:
    """y = table[ids], a row of the table for each id: ids (...), table (V, C) -> (..., C)."""

    # y[n] is a copy of row v = ids[n] of the table, so dtable[v] is the sum of dy[n] over all n where ids[n] = v.
    def backward(dy: Array) -> tuple[Array, ...]:
        dtable = np.zeros_like(table.data)
        np.add.at(dtable, ids, dy)  # unlike dtable[ids] += dy, it sums the rows of an id that occurs twice
        return (dtable,)

    return Tensor(table.data[ids], (table,), backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y = weight xhat + bias, where xhat is x shifted and scaled to mean 0 and variance 1 along its last axis.

    Source: Ba, Kiros, Hinton, arXiv:1607.06450.
    """
    # xhat = (x - mean) / std, with std = sqrt(variance + eps). Both depend on all C elements of the row:
    # ∂mean/∂x[i] = 1 / C and ∂std/∂x[i] = xhat[i] / C. So
    #     ∂xhat[j]/∂x[i] = ((1 if i = j else 0) - 1 / C - xhat[i] xhat[j] / C) / std
    # and with dxhat = dy weight, the sum over j of dxhat[j] times this is
    #     dx[i] = (dxhat[i] - mean of dxhat - xhat[i] * mean of (dxhat xhat)) / std.
    # The two components of the gradient that would only shift x, or only scale it, are removed.
    centered = x.data - x.data.mean(axis=-1, keepdims=True)
    std = np.sqrt((centered**2).mean(axis=-1, keepdims=True) + eps)
    xhat = centered / std

    def backward(dy: Array) -> tuple[Array, ...]:
        dxhat = dy * weight.data
        along = xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)
        dx = (dxhat - dxhat.mean(axis=-1, keepdims=True) - along) / std
        rows = tuple(range(dy.ndim - 1))
        return dx, (dy * xhat).sum(axis=rows), dy.sum(axis=rows)

    return Tensor(xhat * weight.data + bias.data, (x, weight, bias), backward)


def gelu(x: Tensor) -> Tensor:
    """y = x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3): near 0 for x << 0, and near x for x >> 0.

    It approximates x times the cumulative normal distribution. Source: Hendrycks and Gimpel, arXiv:1606.08415.
    """
    # By the product rule, with t = tanh u and ∂t/∂x = (1 - t^2) ∂u/∂x:   dx = dy (1 + t + x (1 - t^2) ∂u/∂x) / 2.
    a = math.sqrt(2 / math.pi)
    square = x.data * x.data
    t = np.tanh(a * x.data * (1 + 0.044715 * square))

    def backward(dy: Array) -> tuple[Array, ...]:
        slope = a * (1 + 3 * 0.044715 * square)  # ∂u/∂x
        return (dy * 0.5 * (1 + t + x.data * (1 - t * t) * slope),)

    return Tensor(0.5 * x.data * (1 + t), (x,), backward)


def softmax(x: Array) -> Array:
    """p[i] = exp(x[i]) / sum_j exp(x[j]) along the last axis: converts any numbers to probabilities."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))  # a common shift cancels out, and prevents overflow of exp
    return e / e.sum(axis=-1, keepdims=True)


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """Causal self-attention: queries, keys and values (B, T, 3C) -> (B, T, C).

    In each head, position t attends to the positions s <= t: its query q[t] and each key k[s] give a score, the scores
    become weights that sum to 1, and the result is the weighted mean of the values v[s]:
        S = q k^T / sqrt(D), with -inf where s > t;  P = softmax(S);  out = P v.
    Source: Vaswani et al., arXiv:1706.03762, section 3.2.
    """
    # out = P v and S = q k^T / sqrt(D) are matrix products (see matmul):
    #     dP = dout v^T,  dv = P^T dout,  dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D).
    # Between them is the softmax of each row. Its derivative is ∂P[j]/∂S[i] = P[j] ((1 if i = j else 0) - P[i]), so
    #     dS[i] = P[i] (dP[i] - sum_j dP[j] P[j]).
    # Where S is -inf, P and dS are 0, so no gradient flows between a position and later positions.
    B, T, C = qkv.data.shape[0], qkv.data.shape[1], qkv.data.shape[2] // 3
    D = C // n_head
    q, k, v = qkv.data.reshape(B, T, 3, n_head, D).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scale = 1 / math.sqrt(D)
    scores = q @ k.swapaxes(-1, -2) * scale  # (B, H, T, T)
    p = softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf))

    def backward(dy: Array) -> tuple[Array, ...]:
        dout = dy.reshape(B, T, n_head, D).transpose(0, 2, 1, 3)  # (B, H, T, D)
        dp = dout @ v.swapaxes(-1, -2)
        ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale
        dqkv = np.stack((ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout))  # (3, B, H, T, D)
        return (dqkv.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * C),)

    return Tensor((p @ v).transpose(0, 2, 1, 3).reshape(B, T, C), (qkv,), backward)


def cross_entropy(logits: Tensor, targets: Array) -> Tensor:
    """The mean of -log p[target], with p = softmax(logits): logits (..., V), targets (...) -> a number.

    In nats: 0 if every target is predicted with certainty, log V if all V tokens are equally probable.
    """
    # -log p[t] = log(sum_j exp(x[j])) - x[t]. The derivative of the first term is p[i], that of x[t] is 1 where i = t:
    #     dx[i] = dy (p[i] - (1 if i = t else 0)) / N, for the mean over N targets.
    x, t = logits.data.reshape(-1, logits.data.shape[-1]), targets.reshape(-1)
    n, top = np.arange(len(t)), x.max(axis=-1)
    log_sum = np.log(np.exp(x - top[:, None]).sum(axis=-1)) + top

    def backward(dy: Array) -> tuple[Array, ...]:
        dx = np.exp(x - log_sum[:, None])
        dx[n, t] -= 1
        return ((dx * (dy / len(t))).reshape(logits.data.shape),)

    return Tensor((log_sum - x[n, t]).mean(), (logits,), backward)


# 3. The model ---------------------------------------------------------------------------------------------------------
#
# A language model reads tokens and predicts the next token at each position. GPT-2 represents a position by a vector
# with C channels, which starts as the sum of a token embedding and a position embedding. Each layer adds two vectors to
# it: the output of attention to earlier positions, and the output of the MLP for the vector itself. At the end, the dot
# products of the vector with the embeddings of all tokens are the logits, which softmax converts to probabilities.


@dataclass(frozen=True)
class Config:
    """The sizes of a model, with their names in config.json. With the defaults, it trains in minutes on a laptop."""

    vocab_size: int = 257  # V
    n_positions: int = 64  # the context: the maximum T
    n_embd: int = 128  # C
    n_layer: int = 4
    n_head: int = 4  # H
    layer_norm_epsilon: float = 1e-5

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of every parameter. Matrices are (in, out)."""
        C = self.n_embd
        yield from (("wte.weight", (self.vocab_size, C)), ("wpe.weight", (self.n_positions, C)))
        attention = ("ln_1", (C,)), ("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C))
        mlp = ("ln_2", (C,)), ("mlp.c_fc", (C, 4 * C)), ("mlp.c_proj", (4 * C, C))
        blocks = ((f"h.{i}.{name}", shape) for i in range(self.n_layer) for name, shape in (*attention, *mlp))
        for name, shape in itertools.chain(blocks, [("ln_f", (C,))]):
            yield from ((f"{name}.weight", shape), (f"{name}.bias", shape[-1:]))


class GPT2:
    """The model: its sizes, and its parameters by name. All computations use the dtype of the parameters."""

    def __init__(self, config: Config, arrays: dict[str, Array]):
        self.config = config
        self.parameters = {name: Tensor(arrays[name]) for name, _ in config.shapes()}

    @staticmethod
    def random(config: Config, rng: Rng) -> GPT2:
        """A new model to train, with small random matrices, biases of 0, and gains of 1."""
        arrays = {}
        for name, shape in config.shapes():
            # 2 n_layer matrices add to the vector. The smaller scale makes its variance independent of n_layer.
            std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
            ones_or_zeros = np.full(shape, float(name.endswith("weight")))
            arrays[name] = (ones_or_zeros if len(shape) == 1 else rng.normal(0, std, shape)).astype(np.float32)
        return GPT2(config, arrays)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        p = self.parameters
        return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], self.config.layer_norm_epsilon)

    def block(self, name: str, x: Tensor) -> Tensor:
        """One layer: (B, T, C) -> (B, T, C)."""
        qkv = self.linear(f"{name}.attn.c_attn", self.norm(f"{name}.ln_1", x))  # (B, T, 3C)
        x = x + self.linear(f"{name}.attn.c_proj", attention(qkv, self.config.n_head))
        hidden = gelu(self.linear(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x)))  # (B, T, 4C)
        return x + self.linear(f"{name}.mlp.c_proj", hidden)

    def logits(self, ids: Array) -> Tensor:
        """ids (B, T) -> (B, T, V), the scores for the next token at each position."""
        wte, wpe, T = self.parameters["wte.weight"], self.parameters["wpe.weight"], ids.shape[1]
        if self.config.n_positions < T:
            raise ValueError(f"GPT2: {T} tokens given; the context is {self.config.n_positions}")
        x = embedding(ids, wte) + embedding(np.arange(T), wpe)  # (B, T, C)
        for i in range(self.config.n_layer):
            x = self.block(f"h.{i}", x)
        return self.norm("ln_f", x) @ transpose(wte)

    def loss(self, ids: Array, targets: Array) -> Tensor:
        """The mean cross-entropy of predicting targets (B, T) from ids (B, T), in nats per token."""
        return cross_entropy(self.logits(ids), targets)


# 4. The optimizer -----------------------------------------------------------------------------------------------------


class AdamW:
    """Adam with decoupled weight decay. A parameter p with gradient g changes by about lr at step t = 1, 2, ...

        m = b1 m + (1 - b1) g            a running mean of the gradient
        v = b2 v + (1 - b2) g^2          a running mean of its square
        p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p)

    m and v start at 0; the division by 1 - b^t corrects for this. Weight decay applies only to matrices, not to biases
    and gains.
    Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.
    """

    def __init__(self, parameters: dict[str, Tensor], betas: tuple[float, float] = (0.9, 0.95), decay: float = 0.1):
        self.parameters, self.betas, self.eps, self.decay, self.t = parameters, betas, 1e-8, decay, 0
        self.m = {name: np.zeros_like(p.data) for name, p in parameters.items()}
        self.v = {name: np.zeros_like(p.data) for name, p in parameters.items()}

    def step(self, lr: float, max_norm: float = 1.0) -> float:
        """Update every parameter and clear its gradient. Returns the global norm of the gradient.

        max_norm  a larger gradient is scaled down to this norm, to limit the effect of an unusual batch.
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
        clip, (b1, b2) = min(1.0, max_norm / (norm + 1e-6)), self.betas
        self.t += 1
        for name, gradient in gradients.items():
            p, g = self.parameters[name], clip * gradient
            self.m[name] = m = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = v = b2 * self.v[name] + (1 - b2) * g * g
            update = m / (1 - b1**self.t) / (np.sqrt(v / (1 - b2**self.t)) + self.eps)
            p.data -= lr * (update + (self.decay * p.data if p.data.ndim > 1 else 0))
            p.grad = None
        return norm


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The learning rate of a step, counted from 0: linear warm-up to `peak`, followed by cosine decay to peak / 10."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# 5. The files ---------------------------------------------------------------------------------------------------------
#
# A model is a folder: config.json contains the sizes, and model.safetensors the parameters, with Hugging Face's names.


def read_safetensors(file: Path) -> dict[str, Array]:
    """The arrays in a file. It contains 8 bytes with the length of a JSON header, the header, and all values."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header, values = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] == "BF16":  # the upper two bytes of a float32
                array = (np.frombuffer(values[start:end], "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                array = np.frombuffer(values[start:end], {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry["dtype"]])
            arrays[name] = array.reshape(entry["shape"]).astype(np.float32)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: not a valid safetensors file of floats; copy it again") from None
    return arrays


def write_safetensors(file: Path, arrays: dict[str, Array]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    start = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, start + 4 * array.size]}
        start += 4 * array.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values start at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            stream.write(array.astype("<f4").tobytes())


def load(folder: Path) -> GPT2:
    """Load the model in a folder. Its vocabulary must consist of the bytes and an end-of-text token."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_bytes())
        config = Config(**{f.name: values[f.name] for f in fields(Config)})
        valid = min(asdict(config).values()) > 0 and config.n_embd % config.n_head == 0 and config.vocab_size == 257
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not valid JSON, or a size is missing: {error}") from None
    if not valid or values.get("activation_function") != "gelu_new":
        raise ValueError(f"{file}: expected positive sizes, n_embd a multiple of n_head, vocab_size 257, and gelu_new")
    file = folder / "model.safetensors"
    arrays = {name.removeprefix("transformer."): array for name, array in read_safetensors(file).items()}
    for name, shape in config.shapes():
        if name not in arrays or arrays[name].shape != shape:
            got = f"has shape {arrays[name].shape}" if name in arrays else "is missing"
            raise ValueError(f"{file}: {name} {got}; expected shape {shape}, according to config.json")
    return GPT2(config, arrays)


def save(folder: Path, model: GPT2) -> None:
    """Write the files that `load`, and GPT2LMHeadModel.from_pretrained in transformers, can read."""
    folder.mkdir(parents=True, exist_ok=True)
    constant = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    end, rates = ("bos_token_id", "eos_token_id"), ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    other = {**dict.fromkeys(end, END_OF_TEXT), **dict.fromkeys(rates, 0.0)}
    (folder / "config.json").write_text(json.dumps({**constant, **asdict(model.config), **other}, indent=2) + "\n")
    arrays = {f"transformer.{name}": p.data for name, p in model.parameters.items()}
    write_safetensors(folder / "model.safetensors", arrays)


# 6. Training ----------------------------------------------------------------------------------------------------------


def batch(ids: Array, size: int, T: int, rng: Rng) -> tuple[Array, Array]:
    """`size` random windows of T tokens, and their targets: the same windows shifted by one token."""
    starts = rng.integers(0, len(ids) - T, size)
    windows = ids[starts[:, None] + np.arange(T + 1)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def train_step(model: GPT2, optimizer: AdamW, ids: Array, targets: Array, lr: float) -> float:
    """Run one step: forward, backward, update. Returns the loss before the update."""
    loss = model.loss(ids, targets)
    loss.backward()
    optimizer.step(lr)
    return float(loss.data)


@np.errstate(over="ignore", invalid="ignore")  # a non-finite loss is reported as an error below
def train(model: GPT2, ids: Array, steps: int, size: int, peak: float, rng: Rng) -> None:
    """Train on all ids except the last tenth, which measures how well the model predicts unseen text."""
    T, n = model.config.n_positions, len(ids) - len(ids) // 10
    if len(ids) // 10 <= T:
        raise ValueError(f"the text has {len(ids):,} bytes; expected at least {10 * (T + 1):,} for a context of {T}")
    validation = [batch(ids[n:], 16, T, np.random.default_rng(i)) for i in range(4)]  # the same for every report
    optimizer, start, report = AdamW(model.parameters), time.perf_counter(), max(10, steps // 20)
    for step in range(1, steps + 1):
        lr = learning_rate(step - 1, steps, peak, warmup=min(100, steps // 10))
        loss = train_step(model, optimizer, *batch(ids[:n], size, T, rng), lr)
        if not math.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss}; try a lower --learning-rate than {peak:g}")
        if step == 1 or step % report == 0 or step == steps:
            speed = step * size * T / (time.perf_counter() - start)
            unseen = sum(float(model.loss(*part).data) for part in validation) / len(validation)
            print(f"step {step:5}  loss {loss:.3f}  unseen text {unseen:.3f}  {speed:,.0f} tokens/s", flush=True)


# 7. Sampling ----------------------------------------------------------------------------------------------------------


def sample(model: GPT2, ids: Sequence[int], temperature: float, top_k: int | None, rng: Rng) -> Iterator[int]:
    """Continue `ids` indefinitely: predict the next token, sample it, append it, and repeat.

    temperature  divides the logits. Below 1, probable tokens become more probable; 0 always selects the most probable.
    top_k        sample only from the top_k most probable tokens; None means all tokens.
    """
    ids = list(ids)
    while True:
        window = np.array([ids[-model.config.n_positions :]])  # (1, T), limited by the model's context
        logits = model.logits(window).data[0, -1].astype(np.float64)  # (V,), for the next token
        if top_k is not None and top_k < len(logits):
            logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
        greedy = temperature == 0
        ids.append(int(logits.argmax() if greedy else rng.choice(len(logits), p=softmax(logits / temperature))))
        yield ids[-1]


# 8. The command line --------------------------------------------------------------------------------------------------

TRAINED, OUT = Path(__file__).parents[1] / "checkpoint", Path("out-one-file")


def run_train(options: argparse.Namespace) -> None:
    if options.steps < 1 or options.batch_size < 1 or not 0 < options.learning_rate < math.inf:
        raise ValueError("expected positive values of --steps, --batch-size and --learning-rate")
    ids, rng = np.frombuffer(options.file.read_bytes(), np.uint8), np.random.default_rng(options.seed)
    model = load(options.init) if options.init else GPT2.random(Config(), rng)
    n = sum(p.data.size for p in model.parameters.values())
    print(f"{n:,} parameters, {len(ids):,} bytes; the loss of uniform probabilities is log 257 = {math.log(257):.3f}")
    try:
        train(model, ids, options.steps, options.batch_size, options.learning_rate, rng)
    except KeyboardInterrupt:
        print("stopped")
    save(options.out, model)
    print(f"saved in {options.out}; next: python {sys.argv[0]} sample --checkpoint {options.out} -p TEXT")


def run_sample(options: argparse.Namespace) -> None:
    if not 0 <= options.temperature < math.inf or (options.top_k is not None and options.top_k < 1):
        raise ValueError("expected a --temperature of 0 or more, and a --top-k of 1 or more")
    model, prompt = load(options.checkpoint), os.fsencode(options.prompt)
    rng, text = np.random.default_rng(options.seed), codecs.getincrementaldecoder("utf-8")("replace")
    print(text.decode(prompt), end="", flush=True)
    new = sample(model, [*prompt] or [END_OF_TEXT], options.temperature, options.top_k, rng)
    for i in itertools.takewhile(lambda i: i != END_OF_TEXT, itertools.islice(new, options.max_tokens)):
        print(text.decode(bytes([i])), end="", flush=True)  # a character is printed when its last byte is known
    print(text.decode(b"", final=True))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog=Path(__file__).name, description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="train|sample")
    training = commands.add_parser("train", help="train on a text file")
    training.set_defaults(run=run_train)
    add = training.add_argument
    add("file", type=Path, metavar="FILE", help="any text")
    add("--init", type=Path, metavar="MODEL", help="start from the model in this folder [default: random weights]")
    add("--out", type=Path, default=OUT, metavar="FOLDER", help="folder for the model [default: %(default)s]")
    add("--steps", type=int, default=1000, metavar="N", help="number of steps [default: %(default)s]")
    add("--batch-size", type=int, default=16, metavar="N", help="sequences per step [default: %(default)s]")
    add("--learning-rate", type=float, default=2e-3, metavar="X", help="peak learning rate [default: %(default)s]")
    sampling = commands.add_parser("sample", help="continue a text")
    sampling.set_defaults(run=run_sample)
    add = sampling.add_argument
    add("-p", "--prompt", default="", metavar="TEXT", help="text to continue [default: none; a new text begins]")
    add("--checkpoint", type=Path, default=TRAINED, metavar="MODEL", help="a model folder [default: %(default)s]")
    add(
        "-m", "--max-tokens", type=int, default=200, metavar="N", help="maximum number of tokens [default: %(default)s]"
    )
    add("-t", "--temperature", type=float, default=0.8, metavar="X", help="0 is greedy [default: %(default)s]")
    add("-k", "--top-k", type=int, metavar="K", help="sample only from the K most probable tokens [default: all]")
    for command in (training, sampling):
        seed_help = "the same seed gives the same result [default: %(default)s]"
        command.add_argument("--seed", type=int, default=0, metavar="N", help=seed_help)
    try:
        options = parser.parse_args(arguments)
        options.run(options)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
