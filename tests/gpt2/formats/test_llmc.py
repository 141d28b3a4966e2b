"""gpt2/formats/llmc.py: files in the format of llm.c's script, and damaged files."""

import numpy as np
import pytest

from gpt2 import GPT2, convert
from tests.gpt2.formats.models import assert_equal, random_model, values


@pytest.fixture
def model():
    return random_model()


def write_llmc(path, model, version=3, padded=384, dtype="<f4"):
    """An independent implementation of the writer in llm.c's train_gpt2.py."""
    c = model.config
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded
    arrays = values(model)
    parts = [np.pad(arrays["wte.weight"], ((0, padded - c.vocab_size), (0, 0))), arrays["wpe.weight"]]
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for part in ("weight", "bias"):
            parts += [arrays[f"h.{layer}.{kind}.{part}"].T for layer in range(c.n_layer)]
    parts += [arrays["ln_f.weight"], arrays["ln_f.bias"]]
    path.write_bytes(header.tobytes() + b"".join(np.ascontiguousarray(part).astype(dtype).tobytes() for part in parts))
    return path


def test_written_files_have_the_layout_of_llmc(model, tmp_path):
    written = write_llmc(tmp_path / "theirs.bin", model)
    assert_equal(model, GPT2.from_pretrained(written))
    model.save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "ours.bin", "llmc")
    assert (tmp_path / "ours.bin").read_bytes() == written.read_bytes()


def test_bfloat16_files_are_read_and_written(model, tmp_path):
    written = write_llmc(tmp_path / "theirs.bin", model, version=5, dtype="bfloat16")
    found = GPT2.from_pretrained(written)
    for name, array in values(model).items():
        assert np.array_equal(values(found)[name], array.astype("bfloat16").astype("float32"))
    convert.convert(written, tmp_path / "wide.bin", "llmc")
    convert.convert(tmp_path / "wide.bin", tmp_path / "again.bin", "llmc", "bfloat16")
    assert (tmp_path / "again.bin").read_bytes() == written.read_bytes()


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (1, 4, "version 4"),
        (1, 1, "version 1"),
        (2, 17, "according to its header"),
        (3, 400, "the padded vocabulary has 384 tokens"),
        (4, 2**31 - 1, "according to its header"),
        (4, -1, "n_layer is -1"),
        (5, 3, "is not a multiple"),
        (6, 2**30, "according to its header"),
        (7, 2**31 - 1, "according to its header"),
    ],
)
def test_an_invalid_header_is_rejected(word, value, message, model, tmp_path):
    path = write_llmc(tmp_path / "x.bin", model)
    content = bytearray(path.read_bytes())
    content[4 * word : 4 * word + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.bin: ") as error:
        GPT2.from_pretrained(path)
    assert message in str(error.value)


@pytest.mark.parametrize("keep", [4, 1023, 1024, -1])
def test_a_truncated_file_is_rejected(keep, model, tmp_path):
    path = write_llmc(tmp_path / "x.bin", model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x.bin: it "):
        GPT2.from_pretrained(path)
