"""tinygrad2/checkpoint.py: checkpoints are written completely or not at all."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tinygrad2 import checkpoint


def write(folder, text="weights"):
    with checkpoint.writing(folder) as partial:
        (partial / "model.bin").write_text(text)
        (partial / "sub").mkdir()
        (partial / "sub" / "more.bin").write_text(text * 2)


def test_a_checkpoint_has_a_manifest_with_a_checksum_of_every_file(tmp_path):
    write(tmp_path / "ckpt-000001")
    listed = json.loads((tmp_path / "ckpt-000001" / checkpoint.MANIFEST).read_text())["files"]
    assert sorted(listed) == ["model.bin", "sub/more.bin"]
    checkpoint.verify(tmp_path / "ckpt-000001")
    assert os.listdir(tmp_path) == ["ckpt-000001"]


def test_an_error_while_writing_keeps_the_old_checkpoint(tmp_path):
    write(tmp_path / "ckpt-000001", "first")

    def fail():
        with checkpoint.writing(tmp_path / "ckpt-000001") as partial:
            (partial / "model.bin").write_text("second")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    checkpoint.verify(tmp_path / "ckpt-000001")
    assert (tmp_path / "ckpt-000001" / "model.bin").read_text() == "first"
    assert os.listdir(tmp_path) == ["ckpt-000001"]


def test_writing_replaces_incomplete_files_of_a_killed_process(tmp_path):
    (tmp_path / ".ckpt-000001.partial").mkdir()
    (tmp_path / ".ckpt-000001.partial" / "half").write_text("x")
    write(tmp_path / "ckpt-000001", "first")
    write(tmp_path / "ckpt-000001", "second")
    assert (tmp_path / "ckpt-000001" / "model.bin").read_text() == "second"
    assert not (tmp_path / "ckpt-000001" / "half").exists()
    assert os.listdir(tmp_path) == ["ckpt-000001"]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip_a_bit(folder / "model.bin"), "model.bin: its checksum"),
        (lambda folder: (folder / "model.bin").write_text("w"), "model.bin: 1 bytes; expected 7"),
        (lambda folder: (folder / "sub" / "more.bin").unlink(), "more.bin: the file is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: expected a JSON object"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json: no files in this manifest"),
    ],
)
def test_damage_is_detected_and_the_previous_checkpoint_is_used(tmp_path, damage, message):
    for step in (1, 2):
        write(tmp_path / checkpoint.name(step))
    damage(tmp_path / checkpoint.name(2))
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.verify(tmp_path / checkpoint.name(2))
    folder, damaged = checkpoint.newest(tmp_path)
    assert folder == tmp_path / checkpoint.name(1)
    assert len(damaged) == 1
    assert message in damaged[0]


def test_checkpoints_are_sorted_by_step_and_other_names_are_ignored(tmp_path):
    assert checkpoint.newest(tmp_path / "none") == (None, [])
    for step in (5, 999_999, 1_000_000):
        write(tmp_path / checkpoint.name(step))
    (tmp_path / "ckpt-final").mkdir()
    (tmp_path / "ckpt-9999999").write_text("a file")
    assert [folder.name for folder in checkpoint.find(tmp_path)] == ["ckpt-1000000", "ckpt-999999", "ckpt-000005"]


def test_prune_keeps_the_newest_and_the_spared_checkpoints(tmp_path):
    for step in range(6):
        write(tmp_path / checkpoint.name(step))
    checkpoint.prune(tmp_path, keep=2, spare={checkpoint.name(1)})
    assert sorted(os.listdir(tmp_path)) == [checkpoint.name(step) for step in (1, 4, 5)]


def test_arrays_round_trip_exactly_and_the_file_has_default_permissions(tmp_path):
    arrays = {"a": np.linspace(0, 1, 7), "b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "c": np.float64(3.5)}
    path = tmp_path / "x.safetensors"
    checkpoint.save_arrays(path, arrays)
    loaded = checkpoint.load_arrays(path)
    for key, array in arrays.items():
        assert loaded[key].dtype == array.dtype
        assert np.array_equal(loaded[key], array)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(checkpoint.CheckpointError, match=r"x\.safetensors: cannot be read"):
        checkpoint.load_arrays(path)


def test_json_contains_no_nan(tmp_path):
    values = {"loss": float("nan"), "rows": [float("-inf"), 1.5, (np.float64("inf"), "NaN", 2)], "step": 3}
    checkpoint.write_json(tmp_path / "x.json", values)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {"loss": None, "rows": [None, 1.5, [None, "NaN", 2]], "step": 3}


@pytest.mark.parametrize("name", ["model.bin", checkpoint.MANIFEST])
def test_a_file_that_cannot_be_read_counts_as_damaged(tmp_path, monkeypatch, name):
    for step in (1, 2):
        write(tmp_path / checkpoint.name(step))
    damaged = tmp_path / checkpoint.name(2) / name
    original = io.open

    def unreadable(path, *args, **kwargs):
        if path == damaged:
            raise OSError(5, "Input/output error")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", unreadable)  # called by Path's methods
    folder, lines = checkpoint.newest(tmp_path)
    assert folder == tmp_path / checkpoint.name(1)
    assert lines == [f"{damaged}: Input/output error"]


def test_a_checkpoint_that_cannot_be_deleted_is_reported(tmp_path, monkeypatch):
    for step in range(3):
        write(tmp_path / checkpoint.name(step))
    rmdir = os.rmdir

    def refuse(path, *args, **kwargs):
        if str(path).endswith(checkpoint.name(0)):
            raise OSError(39, "Directory not empty", str(path))
        rmdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "rmdir", refuse)
    lines = checkpoint.prune(tmp_path, keep=1, spare=set())
    assert [line.rpartition("/")[2] for line in lines] == [f"{checkpoint.name(0)}: not deleted: Directory not empty"]
    assert sorted(os.listdir(tmp_path)) == [checkpoint.name(step) for step in (0, 2)]


def test_a_file_system_without_permissions_is_supported(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    checkpoint.save_arrays(tmp_path / "x.safetensors", {"a": np.ones(3)})
    assert np.array_equal(checkpoint.load_arrays(tmp_path / "x.safetensors")["a"], np.ones(3))
