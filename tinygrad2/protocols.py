"""What a Tensor answers to NumPy's functions and to the names of other libraries: tables, read by tensor.py."""

from __future__ import annotations

import numpy

# np.add(a, b) where a or b is a Tensor: the method of the first and, where that is not a Tensor, of the second.
UFUNCS: dict[numpy.ufunc, tuple[str, str | None]] = {
    numpy.add: ("__add__", "__radd__"),
    numpy.subtract: ("__sub__", "__rsub__"),
    numpy.multiply: ("__mul__", "__rmul__"),
    numpy.divide: ("__truediv__", "__rtruediv__"),
    numpy.matmul: ("__matmul__", "__rmatmul__"),
    numpy.power: ("__pow__", "__rpow__"),
    numpy.floor_divide: ("__floordiv__", "__rfloordiv__"),
    numpy.remainder: ("__mod__", "__rmod__"),
    numpy.equal: ("__eq__", "__eq__"),
    numpy.not_equal: ("__ne__", "__ne__"),
    numpy.less: ("__lt__", "__gt__"),
    numpy.less_equal: ("__le__", "__ge__"),
    numpy.greater: ("__gt__", "__lt__"),
    numpy.greater_equal: ("__ge__", "__le__"),
    numpy.bitwise_and: ("__and__", "__rand__"),
    numpy.bitwise_or: ("__or__", "__ror__"),
    numpy.invert: ("__invert__", None),
    numpy.negative: ("__neg__", None),
    numpy.exp: ("exp", None),
    numpy.log: ("log", None),
    numpy.tanh: ("tanh", None),
}

# np.sum(x, axis) is x.sum(axis): functions of a Tensor whose other arguments the method takes too.
METHODS = {
    numpy.sum: "sum",
    numpy.mean: "mean",
    numpy.max: "max",
    numpy.amax: "max",
    numpy.reshape: "reshape",
    numpy.transpose: "transpose",
}

# Functions that look at values and shapes alone, where there is no gradient to lose: they get the arrays.
ON_ARRAYS = {
    numpy.allclose,
    numpy.array_equal,
    numpy.array_equiv,
    numpy.array_repr,
    numpy.array_str,
    numpy.array2string,
    numpy.isclose,
    numpy.may_share_memory,
    numpy.ndim,
    numpy.result_type,
    numpy.save,
    numpy.savetxt,
    numpy.savez,
    numpy.shape,
    numpy.shares_memory,
    numpy.size,
}

# What other libraries call it: a missing attribute of this name is answered with what to use here.
ELSEWHERE = {
    "absolute": "abs(x)",
    "clone": "x + 0, or copy.deepcopy(x)",
    "contiguous": "x itself: operations take any memory layout",
    "copy": "copy.deepcopy(x)",
    "cpu": 'x.to("cpu")',
    "cuda": 'x.to("cuda")',
    "dim": "x.ndim",
    "double": 'x.astype("float64")',
    "element_size": "x.data.itemsize",
    "float": 'x.astype("float32")',
    "grad_fn": "repr(x), which names the operation",
    "half": 'x.astype("float16")',
    "int": 'x.astype("int32")',
    "is_leaf": "x.leaf is not None",
    "long": 'x.astype("int64")',
    "matmul": "x @ y",
    "mm": "x @ y",
    "mul": "x * y",
    "add": "x + y",
    "sub": "x - y",
    "div": "x / y",
    "neg": "-x",
    "nelement": "x.size",
    "numel": "x.size",
    "permute": "x.transpose(axes)",
    "pow": "x**number",
    "requires_grad_": "Tensor(x.data, requires_grad=True)",
    "retain_grad": "a leaf: a Tensor created with requires_grad=True",
    "register_hook": "x.leaf.on_final",
    "swapaxes": "x.transpose(axes)",
    "t": "x.T",
    "tolist": "x.numpy().tolist()",
    "type": "x.astype(dtype)",
    "unsqueeze": "x[None], or x[..., None]",
    "view": "x.reshape(shape)",
    "zero_grad": "x.grad = None",
}
