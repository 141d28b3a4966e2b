"""The parameters of a module by name: finding, printing, saving and loading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tinygrad2 import missing_names
from tinygrad2.files import atomic_write
from tinygrad2.params import Parameter


class State:
    """The base class of nn.Module: everything that needs only the names of the parameters."""

    if TYPE_CHECKING:

        def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]: ...

    else:

        def __getattr__(self, name):
            raise missing_names.missing(type(self).__name__, name, missing_names.MODULE)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The computation of the module, which subclasses define. By default, raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__; define the computation in __call__(self, x)")

    def state_dict(self) -> dict[str, numpy.ndarray]:
        """A copy of the values of all parameters, on the host, by name."""
        return {name: parameter.numpy().copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Self:
        """Copy into each parameter the array (or Tensor) with its name. Returns the module.

        strict  require exactly the names of the parameters; if False, ignore missing and unknown names.
        Raises ValueError if a name is missing or unknown or a shape differs, and TypeError for values that are not
        arrays of numbers. In case of an error, nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict: the state has type {type(state).__name__}; expected names and arrays")
        parameters = dict(self.named_parameters())
        missing, unknown = parameters.keys() - state.keys(), state.keys() - parameters.keys()
        if strict and (missing or unknown):
            found = [f"lacks {', '.join(sorted(missing))}"] if missing else []
            found += [f"has {', '.join(sorted(unknown))}, which the module does not have"] if unknown else []
            raise ValueError(f"load_state_dict: {type(self).__name__}: the state {', and '.join(found)}")
        loaded = [
            (parameter, parameter.checked(f"load_state_dict: {name}", state[name]))
            for name, parameter in parameters.items()
            if name in state
        ]
        for parameter, values in loaded:
            parameter.data = values
        return self

    def save(self, path: str | Path) -> None:
        """Write the parameters to a safetensors file, atomically."""
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"save: the folder {Path(path).parent} does not exist")
        with atomic_write(Path(path)) as partial:
            save_file(self.state_dict(), partial)

    def load(self, path: str | Path) -> Self:
        """Read the parameters from a safetensors file. Returns the module. Raises the errors of load_state_dict."""
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"load: {path}: not a valid safetensors file ({error})") from None
        return self.load_state_dict(state)

    def __repr__(self) -> str:
        return _tree(self)


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """The members of a module, list, tuple or dict, by name."""
    if isinstance(value, State):
        yield from vars(value).items()
    elif isinstance(value, list | tuple):
        yield from ((str(i), item) for i, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((str(name), item) for name, item in value.items())


def parameters_in(value: Any, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
    """Every parameter in a module, list, tuple or dict, with its dotted name. A shared one appears once per name."""
    for name, member in _members(value):
        if isinstance(member, Parameter):
            yield f"{prefix}{name}", member
        else:
            yield from parameters_in(member, f"{prefix}{name}.")


def modules_in(value: Any) -> Iterator[Any]:
    """Every module inside a module, list, tuple or dict."""
    for _, member in _members(value):
        if isinstance(member, State):
            yield member
        yield from modules_in(member)


def _tree(value: Any) -> str:
    """A module as text: its simple attributes, the shapes of its parameters, and its submodules, indented."""
    inside, modules = [], []
    for name, member in _members(value):
        if isinstance(member, Parameter):
            inside.append(f"{name} {member.shape}")
        elif isinstance(member, State) or any(True for _ in parameters_in(member)):
            modules.append(f"{name}: {_tree(member)}")
        elif isinstance(member, bool | int | float | str) and not name.startswith("_"):
            inside.append(f"{name}={member}")
    kind = f"{type(value).__name__}({', '.join(inside)})" if isinstance(value, State) else ", ".join(inside)
    lines = [line for module in modules for line in module.splitlines()]
    return kind + "".join(f"\n  {line}" for line in lines)
