"""Hints that are added to the AttributeError for names that exist in PyTorch or NumPy but not in tinygrad2.

    tinygrad2.conv2d  ->  AttributeError: tinygrad2 has no attribute 'conv2d'; convolutions are not supported: ...

Each table maps the missing names of one owner (the package, a module, or a class) to hints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Hints = dict[str, str]


def _hints(rows: dict[str, str]) -> Hints:
    """Expand rows whose keys list several names to one entry per name."""
    return {name: hint for names, hint in rows.items() for name in names.split()}


def missing(owner: str, name: str, hints: Hints) -> AttributeError:
    """The error for an attribute that does not exist, with a hint if there is one."""
    hint = hints.get(name)
    return AttributeError(f"{owner} has no attribute {name!r}" + (f"; {hint}" if hint else ""))


def missing_in_place(name: str, methods: type) -> AttributeError:
    """The error for an in-place method of PyTorch, such as `add_`."""
    other = f"use x = x.{name[:-1]}(...), or " if hasattr(methods, name[:-1]) else ""
    return missing("Tensor", name, {name: f"in-place methods are not supported: {other}write to x.data"})


def of_module(module: str, hints: Hints) -> Callable[[str], Any]:
    """The `__getattr__` of a module, which Python calls for attributes that do not exist."""

    def reject(name: str) -> Any:
        raise missing(module, name, hints)

    return reject


def reject_calls(module: str, hint: str) -> None:
    """Make calling a module, whose name is that of a function in PyTorch or NumPy, raise a TypeError with this hint."""

    class Module(ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            raise TypeError(f"{module} is a module; {hint}")

    sys.modules[module].__class__ = Module


# Unsupported operations, as functions and as methods ------------------------------------------------------------------

UNSUPPORTED = _hints(
    {
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d unfold fold correlate":
            "convolutions are not supported: sum shifted slices times weights, or write an operation with record()",
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_max_pool2d max_unpool2d lp_pool2d interpolate upsample pixel_shuffle":
            "pooling is not supported: reshape an axis of n elements to (n // k, k), and take max or mean over k",
        "scatter scatter_add scatter_reduce index_add index_copy index_fill index_put index_reduce masked_scatter put "
        "put_along_axis slice_scatter select_scatter diagonal_scatter fill_diagonal copyto place putmask":
            "scatter is not supported: use where(mask, x, y), or "
            "one_hot(index, n).T @ x, which adds row i of x to row index[i] of n rows",
        "linalg inv inverse pinv pinverse det logdet slogdet svd eig eigh eigvals eigvalsh qr lu cholesky solve lstsq "
        "matrix_power matrix_rank matrix_exp cond triangular_solve cholesky_solve":
            "linear algebra is not supported except products, norm, trace and diagonal: for constants, use np.linalg",
        "fft ifft rfft irfft stft istft": "Fourier transforms are not supported: for constants, use np.fft",
        "batch_norm group_norm instance_norm local_response_norm":
            "this normalization is not supported: use layernorm or rmsnorm",
        "nonzero argwhere unique unique_consecutive bincount histogram histc searchsorted bucketize digitize isin":
            "it has no gradient: apply NumPy's function to x.numpy()",
        "quantile nanquantile percentile kthvalue mode": "use x.sort(axis).values, or np.median(x)",
        "cummax cummin": "it has no gradient: apply np.maximum.accumulate or np.minimum.accumulate to x.numpy()",
    }
)  # fmt: skip

COMPOSED = _hints(
    {
        "logical_and bitwise_and": "use x & y",
        "logical_or bitwise_or": "use x | y",
        "logical_xor bitwise_xor": "use x ^ y",
        "floor_divide": "use x // y",
        "true_divide": "use x / y",
        "allclose equal array_equal": "use np.allclose(x, y) or np.array_equal(x, y)",
        "normalize": "use x / x.norm(axis=-1, keepdims=True)",
        "cosine_similarity": "use (x * y).sum(-1) / (x.norm(axis=-1) * y.norm(axis=-1))",
        "cdist": "use (x[:, None] - y[None]).norm(axis=-1)",
        "kl_div": "use (p * (p.log() - log_q)).sum()",
        "smooth_l1_loss huber_loss": "use where(d < 1, 0.5 * d * d, d - 0.5).mean() with d = (x - y).abs()",
        "glu": "use a * b.sigmoid() with a, b = x.chunk(2, -1)",
        "softmin": "use (-x).softmax()",
        "prelu": "use where(x > 0, x, slope * x)",
        "addmm": "use bias + x @ y",
        "baddbmm": "use bias + x @ y",
        "mT": "use x.swapaxes(-1, -2)",
        "H": "use x.swapaxes(-1, -2)",
    }
)

# The attributes of each object ---------------------------------------------------------------------------------------

TENSOR = (
    UNSUPPORTED
    | COMPOSED
    | _hints(
        {
            "absolute": "use abs(x)",
            "clone": "use x + 0, or copy.deepcopy(x)",
            "copy": "use copy.deepcopy(x)",
            "cpu": 'use x.to("cpu")',
            "cuda": 'use x.to("cuda")',
            "element_size": "use x.data.itemsize",
            "itemsize nbytes strides": "use the attribute of the array x.data",
            "stride": "use x.data.strides, in bytes",
            "data_ptr": "use x.data",
            "grad_fn": "use repr(x), which names the operation",
            "is_leaf": "use x.leaf is not None",
            "is_cuda": 'use x.device == "cuda"',
            "nelement": "use x.size",
            "requires_grad_": "use Tensor(x.data, requires_grad=True)",
            "retain_grad": "use a leaf: a Tensor created with requires_grad=True",
            "register_hook": "use x.leaf.on_final",
            "type type_as": "use x.astype(dtype)",
            "zero_grad": "use x.grad = None",
            "values indices": "max and min return only the values: use max(axis=...) and argmax(axis=...)",
            "new_zeros new_ones new_full new_empty new_tensor": "use zeros, ones or full with x's dtype",
            "is_contiguous": "use x.data.flags.c_contiguous",
            "byte char short bool": "use x.astype(dtype)",
            "bfloat16": 'use x.to("bfloat16")',
        }
    )
)

FUNCTIONS = (
    UNSUPPORTED
    | COMPOSED
    | _hints(
        {
            "from_numpy as_tensor asarray": "use Tensor(array)",
            "empty empty_like": "use zeros or zeros_like",
            "manual_seed seed default_rng": "the random functions take a key: randn(2, 3, key=Key(seed))",
            "randint randperm bernoulli multinomial normal uniform choice": "use NumPy's generator, or rand and randn",
            "rand_like randn_like": "use rand or randn with x.shape",
            "save load": "use model.save(path) and model.load(path)",
            "float16 float32 float64 bfloat16 half double float int8 uint8 int16 int32 int64 int long bool dtype":
                'pass a dtype as a string, such as "float32", or as a NumPy dtype',
            "device cuda": 'pass a device as a string: "cpu" or "cuda"',
            "is_tensor": "use isinstance(x, Tensor)",
            "grad value_and_grad elementwise_grad": "use loss.backward(), then x.grad",
            "enable_grad set_grad_enabled inference_mode is_grad_enabled": "use no_grad()",
            "jacobian hessian jvp vjp make_jvp make_vjp hvp func": "second-order gradients are not supported: use "
                "backward(dy)",
            "compile jit vmap": "it is not supported: operations run eagerly, on whole arrays",
            "layer_norm": "use layernorm",
            "rms_norm": "use rmsnorm",
            "Module Linear LayerNorm Embedding Parameter": "use the one in tinygrad2.nn",
            "AdamW SGD Adam": "use the one in tinygrad2.optim",
            "nan inf pi e": "use the one in math",
            "newaxis": "use None",
            "float_power": "use x ** y",
            "tril_indices triu_indices diag_indices logspace geomspace": "use NumPy's function",
        }
    )
)  # fmt: skip

OPS = _hints(
    {
        "relu sigmoid silu tanh exp log where concatenate cat stack einsum matmul mse_loss log_softmax rmsnorm maximum "
        "scaled_dot_product_attention rotary_embedding one_hot minimum sum mean nll_loss":
            "ops contains only GPT-2's operations: the others are functions of the package, such as tinygrad2.relu",
        "layer_norm": "use layernorm",
    }
)  # fmt: skip

AUTOGRAD = _hints(
    {
        "Function": "write an operation as two functions: the forward function returns tinygrad2.record(...)",
        "grad functional": FUNCTIONS["grad"],
        "gradcheck": "use tinygrad2.gradcheck.check",
        "Variable": "use tinygrad2.Tensor",
        "set_grad_enabled enable_grad": FUNCTIONS["enable_grad"],
    }
)

_POOL = UNSUPPORTED["max_pool2d"]
_RECURRENT = "recurrent layers are not supported: examples/name_gru.py has a GRU"
_TRANSFORMER = "use tinygrad2.scaled_dot_product_attention; examples/seq2seq_attention.py has a Transformer"
_FUNCTION = "layers can be functions: use Tensor."
LAYERS = _hints(
    {
        "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Unfold Fold": UNSUPPORTED["conv2d"],
        "MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool2d AdaptiveMaxPool2d Upsample":
            _POOL,
        "BatchNorm1d BatchNorm2d BatchNorm3d GroupNorm InstanceNorm1d InstanceNorm2d":
            "this normalization is not supported: use LayerNorm or RMSNorm",
        "RNN GRU LSTM RNNCell GRUCell LSTMCell": _RECURRENT,
        "MultiheadAttention Transformer TransformerEncoder TransformerDecoder TransformerEncoderLayer "
        "TransformerDecoderLayer": _TRANSFORMER,
        "ModuleList ParameterList": "assign a list to an attribute",
        "ModuleDict ParameterDict": "assign a dict to an attribute",
        "CrossEntropyLoss": "use tinygrad2.cross_entropy(logits, targets)",
        "MSELoss": "use tinygrad2.mse_loss(input, target)",
        "L1Loss": "use tinygrad2.l1_loss(input, target)",
        "NLLLoss": "use tinygrad2.nll_loss(log_probabilities, targets)",
        "BCELoss": "use tinygrad2.binary_cross_entropy(input, target)",
        "BCEWithLogitsLoss": "use tinygrad2.binary_cross_entropy_with_logits(input, target)",
        "SmoothL1Loss HuberLoss": COMPOSED["huber_loss"],
        "KLDivLoss": COMPOSED["kl_div"],
        "Flatten": "layers can be functions: use lambda x: x.flatten(1)",
        "Identity": "layers can be functions: use lambda x: x",
        "init": "pass init=nn.normal_init(std) to a layer, or assign to parameter.data",
        "utils": "optimizer.step(max_norm=...) clips the gradients to a global norm",
        "Bilinear": "use tinygrad2.einsum",
        "DataParallel": "train.py trains on several devices with mpirun",
    }
    | {
        name: _FUNCTION + method
        for name, method in {
            "Tanh": "tanh", "Sigmoid": "sigmoid", "LeakyReLU": "leaky_relu", "ELU": "elu", "SELU": "selu",
            "CELU": "celu", "Softplus": "softplus", "Softsign": "softsign", "LogSigmoid": "logsigmoid",
            "Hardtanh": "hardtanh", "Hardswish": "hardswish", "Hardsigmoid": "hardsigmoid", "ReLU6": "relu6",
            "Mish": "mish", "Softmax": "softmax", "LogSoftmax": "log_softmax",
        }.items()
    }
)  # fmt: skip

MODULE = _hints(
    {
        "train eval training": "there is no training mode: dropout is applied only if a key is passed, model(x, key)",
        "cuda cpu": 'use to("cuda") or to("cpu")',
        "half float double bfloat16": 'use to(precision="float32"), or another precision',
        "children named_children named_modules": "use modules()",
        "apply": "use a loop over modules() or parameters()",
        "register_buffer": "assign an array to an attribute; state_dict() contains only the parameters",
        "buffers named_buffers": "a module has only parameters",
        "register_parameter register_module add_module": "assign it to an attribute",
        "requires_grad_": "to train some of the parameters, give the optimizer a list of them",
        "forward": "call the module itself: module(x)",
        "append extend insert": "use model.layers, which is a list",
    }
)

OPTIMIZERS = _hints(
    {
        "Adam": "use AdamW with weight_decay=0",
        "RMSprop Adagrad Adadelta Adamax NAdam RAdam LBFGS ASGD Rprop SparseAdam Adafactor Lion":
            "this optimizer is not supported: use AdamW, SGD or Muon, or a subclass of Optimizer with your update rule",
        "lr_scheduler": "set the learning rate before each step: optimizer.lr = optim.cosine(step, ...)",
    }
)  # fmt: skip

OPTIMIZER = _hints(
    {
        "param_groups add_param_group defaults":
            "all parameters are in one group: use lr and weight_decay, which applies only to matrices",
        "state_dict": "use state() and steps",
        "load_state_dict": "use load_state(arrays, steps)",
    }
)  # fmt: skip
