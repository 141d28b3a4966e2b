"""Helpers for parameters with bfloat16 copies, also on devices without support for bfloat16 activations."""

from tinygrad2.params import Parameter


def with_copies(model):
    """Give all parameters bfloat16 copies. Returns the model."""
    for p in model.parameters():
        p.convert(p.backend, p.dtype, "bfloat16")
    return model


def copy_of(p: Parameter):
    """The values that a layer with bfloat16 activations reads, copied to the host."""
    return p.backend.to_host(p.read_as("bfloat16", "test: p"))
