"""tinygrad2/files.py: files and folders that are written completely or not at all, and locks."""

import os
import subprocess
import sys

import pytest

from tinygrad2 import files


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    for text in ("old", "new"):
        with files.atomic_write(tmp_path / "page") as partial:
            partial.write_text(text)
            assert partial.parent == tmp_path
            assert text == "old" or (tmp_path / "page").read_text() == "old"
    assert (tmp_path / "page").read_text() == "new"
    assert entries(tmp_path) == ["page"]


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path):
    for name in ("old", "new"):
        with files.atomic_write(tmp_path / "model") as partial:
            (partial / "inside").mkdir(parents=True)
            (partial / "inside" / name).touch()
    assert entries(tmp_path) == ["model"]
    assert entries(tmp_path / "model" / "inside") == ["new"]


def test_a_link_is_replaced_even_if_it_is_broken(tmp_path):
    for name in ("nowhere", "elsewhere"):
        with files.atomic_write(tmp_path / "best") as partial:
            partial.symlink_to(name)
    assert os.readlink(tmp_path / "best") == "elsewhere"
    assert entries(tmp_path) == ["best"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", ["write_text", "mkdir"])
def test_an_error_leaves_the_old_content(tmp_path, error, make):
    (tmp_path / "page").write_text("old")

    def fail():
        with files.atomic_write(tmp_path / "page") as partial:
            getattr(partial, make)(*(["half"] if make == "write_text" else []))
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (tmp_path / "page").read_text() == "old"
    assert entries(tmp_path) == ["page"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    rename = files.Path.rename

    def refuse(self, target):
        if self.name == ".model.partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files.Path, "rename", refuse)

    def replace():
        with files.atomic_write(tmp_path / "model") as partial:
            partial.mkdir()

    with pytest.raises(OSError, match="Input/output error"):
        replace()
    assert entries(tmp_path) == ["model"]
    assert entries(tmp_path / "model") == ["old"]


def test_a_killed_process_leaves_one_temporary_file_that_the_next_call_removes(tmp_path):
    code = (
        "import os, sys\nfrom tinygrad2 import files\n"
        "with files.atomic_write(files.Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "page"], check=False)
    assert entries(tmp_path) == [".page.partial"]
    with files.atomic_write(tmp_path / "page") as partial:
        assert not partial.exists()
        partial.write_text("whole")
    assert entries(tmp_path) == ["page"]


def test_everything_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    steps = []
    flush, replace = files.flush_entry, os.replace
    monkeypatch.setattr(files, "flush_entry", lambda path: (steps.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("rename"), replace(old, new)))
    with files.atomic_write(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "weights").touch()
    assert steps == ["weights", ".model.partial", "rename", tmp_path.name]


def test_free_name_counts_from_1(tmp_path):
    assert files.free_name(tmp_path / "out") == tmp_path / "out"
    (tmp_path / "out").mkdir()
    (tmp_path / "out-1").symlink_to("nowhere")
    assert files.free_name(tmp_path / "out") == tmp_path / "out-2"
    assert files.free_name(tmp_path / "out", separator=".") == tmp_path / "out.1"


def test_missing_folders_are_not_created(tmp_path):
    assert files.write_error(tmp_path / "a" / "b") == ""
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_by_a_running_process_only(tmp_path):
    lock = f"files.Lock(files.Path({str(tmp_path / 'lock')!r}), 'out')"
    code = f"from tinygrad2 import files; {lock}.__enter__()"
    owner = subprocess.Popen([sys.executable, "-c", f"{code}; print(flush=True); input()"], stdin=-1, stdout=-1)
    owner.stdout.readline()
    with pytest.raises(ValueError, match=f"^out: process {owner.pid} is using it"):
        files.Lock(tmp_path / "lock", "out").check()
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # ended, and still listed, since its parent does not wait
    with files.Lock(tmp_path / "lock", "out"):
        assert (tmp_path / "lock").read_text() == str(os.getpid())
    owner.communicate()
