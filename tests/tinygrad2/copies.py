"""Parameters with bfloat16 copies, also on devices that do not support bfloat16 activations."""

from tinygrad2.params import Parameter


def with_copies(model):
    """Give the parameters bfloat16 copies; returns the model."""
    for p in model.parameters():
        p.convert(p.backend, p.dtype, "bfloat16")
    return model


def copy_of(p: Parameter):
    """The values that a layer with bfloat16 activations reads, on the host."""
    return p.backend.to_host(p.read_as("bfloat16", "test: p"))
