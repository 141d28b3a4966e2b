"""tinygrad2/files.py: atomic writes of files and folders, and locks."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import time

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


def test_make_folder_creates_a_folder_unless_the_name_is_taken(tmp_path):
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b")
    assert entries(tmp_path / "a") == ["b"]
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    for name, found in (("file", "a file"), ("broken", "a link to nowhere, which does not exist")):
        with pytest.raises(FileExistsError, match=f"{name}: {found}; expected a folder"):
            files.make_folder(tmp_path / name)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", ["write_text", "mkdir"])
def test_an_error_keeps_the_old_content(tmp_path, error, make):
    (tmp_path / "page").write_text("old")

    def fail():
        with files.atomic_write(tmp_path / "page") as partial:
            getattr(partial, make)(*(["half"] if make == "write_text" else []))
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (tmp_path / "page").read_text() == "old"
    assert entries(tmp_path) == ["page"]


def test_a_folder_that_cannot_be_renamed_does_not_replace_the_old_one(tmp_path, monkeypatch):
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


def test_the_next_write_removes_the_temporary_file_of_a_killed_process(tmp_path):
    code = (
        "import os, sys\nfrom tinygrad2 import files\n"
        "with files.atomic_write(files.Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "page"], check=False)
    assert entries(tmp_path) == [".page.partial"]
    with files.atomic_write(tmp_path / "page") as partial:
        assert not partial.exists()
        partial.write_text("complete")
    assert entries(tmp_path) == ["page"]


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    steps = []
    flush, replace = files.flush_entry, os.replace
    monkeypatch.setattr(files, "flush_entry", lambda path: (steps.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("rename"), replace(old, new)))
    with files.atomic_write(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "weights").touch()
    assert steps == ["weights", ".model.partial", "rename", tmp_path.name]


def test_free_name_appends_the_first_free_number(tmp_path):
    assert files.free_name(tmp_path / "out") == tmp_path / "out"
    (tmp_path / "out").mkdir()
    (tmp_path / "out-1").symlink_to("nowhere")
    assert files.free_name(tmp_path / "out") == tmp_path / "out-2"
    assert files.free_name(tmp_path / "out", separator=".") == tmp_path / "out.1"


def test_write_error_does_not_create_folders(tmp_path):
    assert files.write_error(tmp_path / "a" / "b") == ""
    assert list(tmp_path.iterdir()) == []


def other_process(code, *arguments):
    """A process that runs `code` with `files` and the Lock `lock`, prints a line, and waits."""
    code = f"import os, sys\nfrom tinygrad2 import files\nlock = files.Lock(files.Path(sys.argv[1]), 'out')\n{code}"
    command = [sys.executable, "-c", code + "\nprint(flush=True); input()", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def kill(process):
    process.kill()
    process.communicate()


def message_of(file):
    """The error message for a lock that another owner holds."""
    with pytest.raises(ValueError, match="lock: ") as caught, files.Lock(file, "out"):
        pass
    return str(caught.value)


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    file = tmp_path / "lock"
    owner = other_process("lock.acquire()", file)
    assert re.fullmatch(
        rf"{file}: process {owner.pid} on {socket.gethostname()}, started [\d-]+ [\d:]+, is using out; wait for it to "
        "end, or choose another folder",
        message_of(file),
    )
    kill(owner)
    assert file.exists()
    with files.Lock(file, "out") as lock:
        assert lock.stale
        assert lock.held()
        assert json.loads(file.read_text())["process"] == os.getpid()
        assert f"process {os.getpid()} on" in message_of(file)  # also within the same process
    assert not file.exists()
    with files.Lock(file, "out") as lock:
        assert not lock.stale


@pytest.mark.parametrize("content", ["1", str(os.getpid()), "", "[]", "\xff" * 9000])
def test_a_file_that_no_process_has_locked_is_stale(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with files.Lock(tmp_path / "lock", "out") as lock:
        assert lock.stale == bool(content)
    assert entries(tmp_path) == []


def foreign(file, machine="another"):
    """Write the lock file of a process on another host, whose locks are not visible here."""
    owner = {"host": "node7", "process": 12, "started": "2026-01-02 03:04:05", "machine": machine}
    file.write_text(json.dumps(owner))


def test_a_lock_file_of_another_host_is_valid_while_its_heartbeat_is_recent(tmp_path):
    file = tmp_path / "lock"
    foreign(file)
    assert re.fullmatch(
        rf"{file}: process 12 on node7, started 2026-01-02 03:04:05, was using out 0 s ago, and this file system may "
        r"not share locks between hosts; wait for it to end, or if it was killed, wait \d+ s",
        message_of(file),
    )
    old = time.time() - files.FRESH
    os.utime(file, (old, old))
    with files.Lock(file, "out") as lock:
        assert lock.stale
    foreign(file, machine=files.machine())  # from another container on this machine, whose locks are visible
    with files.Lock(file, "out") as lock:
        assert lock.stale


def test_the_heartbeat_updates_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT", 0.01)
    file = tmp_path / "lock"
    with files.Lock(file, "out"):
        os.utime(file, (0, 0))
        end = time.monotonic() + 20
        while file.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert file.stat().st_mtime > 0


def test_on_a_file_system_without_locks_only_the_heartbeat_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLING", 0.0)
    monkeypatch.setattr(files, "_try_lock", lambda handle: None)
    file = tmp_path / "lock"
    with files.Lock(file, "out"):
        assert f"process {os.getpid()} on {socket.gethostname()}" in message_of(file)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: foreign(file))  # another process writes at the same time
    assert message_of(file).endswith("node7, started 2026-01-02 03:04:05, is using out")


def test_a_lock_detects_that_its_folder_was_moved(tmp_path):
    (tmp_path / "out").mkdir()
    with files.Lock(tmp_path / "out" / "lock", "out") as lock:
        (tmp_path / "out").rename(tmp_path / "moved")
        assert not lock.held()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "lock").write_text("another")
        assert not lock.held()
    assert (tmp_path / "out" / "lock").exists()


RACE = """
import contextlib, time
for trial in range(int(sys.argv[2])):
    while not os.path.exists(f"{sys.argv[1]}-{trial}"):
        pass
    with contextlib.suppress(ValueError):
        lock.acquire()
    print(int(lock.held()), flush=True)
    input()
    lock.release()
    print(flush=True)
"""


@pytest.mark.parametrize("trials", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_exactly_one_of_four_processes_acquires_a_stale_lock(tmp_path, trials):
    file = tmp_path / "lock"
    processes = [other_process("print(flush=True)" + RACE, file, trials) for _ in range(4)]
    try:
        for trial in range(trials):
            if trial % 2:
                file.write_text("1")
            else:
                foreign(file, files.machine())
            (tmp_path / f"lock-{trial}").touch()  # start all processes
            assert sorted(int(process.stdout.readline()) for process in processes) == [0, 0, 0, 1]
            for process in processes:
                process.stdin.write(b"\n")
                process.stdin.flush()
            for process in processes:
                process.stdout.readline()
            assert not file.exists()
    finally:
        for process in processes:
            kill(process)


def test_only_one_process_holds_the_lock_at_a_time(tmp_path):
    code = """
import contextlib, time
alone = files.Path(sys.argv[1] + "-alone")
end, count = time.monotonic() + 2, 0
while time.monotonic() < end:
    with contextlib.suppress(ValueError), lock:
        alone.touch(exist_ok=False)
        count += 1
        alone.unlink()
print(count)
"""
    command = "print(flush=True)" + code
    processes = [other_process(command, tmp_path / "lock") for _ in range(4)]
    try:
        assert sum(int(process.stdout.readline()) for process in processes) > 4
    finally:
        for process in processes:
            kill(process)
    assert entries(tmp_path) == []


def test_clean_undoes_interrupted_writes(tmp_path):
    for name in (".page.partial", ".log.replaced", "log", "note.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "weights").touch()
    files.clean(tmp_path)
    assert entries(tmp_path) == ["log", "model", "note.partial"]
    assert entries(tmp_path / "model") == ["weights"]


def test_a_file_system_that_cannot_flush_folders_is_supported(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with files.atomic_write(tmp_path / "model") as partial:
        partial.mkdir()
    assert entries(tmp_path) == ["model"]


def test_the_error_of_a_failed_flush_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "page").touch()

    def fail(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    for path in (tmp_path / "page", tmp_path):
        with pytest.raises(OSError, match="Input/output error") as caught:
            files.flush_entry(path)
        assert caught.value.filename == str(path)
