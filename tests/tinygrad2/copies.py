"""Parameters with copies in bfloat16, also on devices that do not compute in it."""

from tinygrad2.params import Parameter


def with_copies(model):
    """The model itself; its parameters now have copies in bfloat16."""
    for p in model.parameters():
        p.convert(p.backend, p.dtype, "bfloat16")
    return model


def copy_of(p: Parameter):
    """What a layer reads whose activations are bfloat16, on the host."""
    return p.backend.to_host(p.read_as("bfloat16", "test: p"))
