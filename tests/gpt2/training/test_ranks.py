"""gpt2/training/ranks.py: ranks with different code, options or data are reported before the first step."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from gpt2.config import GPT2Config
from gpt2.training import ranks
from gpt2.training.dataset import TokenDataset
from gpt2.training.options import UsageError, resolve_options
from tests.stand_ins.thread_comm import on_ranks


@pytest.fixture
def options():
    return resolve_options({"data": "text"}, GPT2Config.preset("nano"))


def splits(path):
    return [TokenDataset.open(path, split) for split in ("train", "val")]


def test_equal_ranks_are_accepted(workspace, options):
    shutil.copytree("data/text", "copy")  # each rank may have its own copy
    on_ranks(2, lambda comm: ranks.compare(comm, options, splits("copy" if comm.rank else "data/text")))


def error_on_all_ranks(size, function):
    """Run the function, which must raise the same UsageError on all ranks. Returns the message."""

    def message(comm):
        with pytest.raises(UsageError) as caught:
            function(comm)
        return str(caught.value)

    (same,) = set(on_ranks(size, message))
    return same


def test_a_different_option_is_reported_with_the_rank(workspace, options):
    data = splits("data/text")
    other = replace(options, dtype="tf32")
    said = error_on_all_ranks(3, lambda comm: ranks.compare(comm, other if comm.rank == 2 else options, data))
    assert said == (
        "rank 2 differs from rank 0 in --dtype: 'tf32' instead of 'float32'; all ranks need the same code, options and "
        "data"
    )
    long = replace(options, data="x" * 1000 + "y"), replace(options, data="x" * 1000 + "z")
    assert "in --data: 'xxx" in error_on_all_ranks(2, lambda comm: ranks.compare(comm, long[comm.rank], data))


@pytest.mark.parametrize("split", ["train", "val"])
def test_different_data_is_reported_with_the_rank(workspace, options, split):
    for folder in ("whole", "other"):
        (workspace / folder).mkdir()
        for name in ("train", "val"):
            ids = np.arange(100, dtype="<u2")
            ids[0] += folder == "other" and name == split
            ids.tofile(f"{folder}/{name}.bin")
    pairs = [splits(folder) for folder in ("whole", "other")]
    said = error_on_all_ranks(2, lambda comm: ranks.compare(comm, options, pairs[comm.rank]))
    assert f"rank 1 differs from rank 0 in the data, {split}: other, fingerprint " in said
    assert " instead of whole, fingerprint " in said


def test_different_code_is_reported_with_the_rank(workspace, options, monkeypatch):
    data, versions = splits("data/text"), iter(["version 1", "version 2"])
    monkeypatch.setattr(ranks, "code_version", lambda: next(versions))
    said = error_on_all_ranks(2, lambda comm: ranks.compare(comm, options, data))
    assert "differs from rank 0 in the code of tinygrad2 and gpt2: version " in said


def test_the_code_version_depends_on_every_file(tmp_path, monkeypatch):
    package = tmp_path / "gpt2"
    (package / "training").mkdir(parents=True)
    for name in ("__init__.py", "decode.cu", "training/run.py"):
        (package / name).write_text("a")
    assert [folder.name for folder in ranks.PACKAGES] == ["tinygrad2", "gpt2"]
    monkeypatch.setattr(ranks, "PACKAGES", [package])
    found = {ranks.code_version()}
    for name in ("__init__.py", "decode.cu", "training/run.py"):
        (package / name).write_text("b")
        found.add(ranks.code_version())
    assert len(found) == 4
