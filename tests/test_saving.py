"""Writing that loses nothing: folders and files appear complete or not at all, and a killed writer leaves nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pow2quant import saving
from pow2quant.errors import OutputError

MARK = "mark.json"
WRITER = """
import sys
from pathlib import Path
from pow2quant import saving
target = Path(sys.argv[1])
saving._exchanged = saving._exchanged if sys.argv[2] == "exchange" else lambda one, other: False
print("ready", flush=True)
for number in range(10**6):
    with saving.staged(target, "mark.json") as folder:
        for name in ("mark.json", "a", "b"):
            (folder / name).write_text(str(number))
    saving.write(target.with_name("file"), str(number).encode() * 1000)
"""


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def put(target: Path, text: str) -> None:
    with saving.staged(target, MARK) as folder:
        for name in (MARK, "a", "b"):
            (folder / name).write_text(text)


@pytest.mark.parametrize("way", ["exchange", "rename"])
def test_writers_that_are_killed_lose_nothing_and_leave_nothing(tmp_path: Path, way: str) -> None:
    """After every kill the folder is whole, or was put back by the next writer; at the end nothing else is there."""
    target = tmp_path / "run"
    put(target, "0")
    for wait in (0.0, 0.003, 0.011, 0.027):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target), way], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.kill()
        process.communicate()
        if way == "exchange":
            assert len(contents(target)) == 3
        saving.write(tmp_path / "next", b"")
        found = contents(target)
        assert sorted(found) == ["a", "b", MARK]
        assert len(set(found.values())) == 1
        assert {p.name for p in tmp_path.iterdir()} <= {"run", "file", "next"}


def test_what_a_living_writer_has_begun_stays(tmp_path: Path) -> None:
    with saving.staged(tmp_path / "a", MARK) as folder:
        (folder / MARK).touch()
        child = (
            "import sys; from pathlib import Path; from pow2quant import saving; saving.write(Path(sys.argv[1]), b'')"
        )
        subprocess.run([sys.executable, "-c", child, str(tmp_path / "b")], check=True)
        assert (folder / MARK).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_process_numbers_say_nothing_about_what_is_left(tmp_path: Path) -> None:
    """In a container every run is process 1: what is left is known by its lock alone."""
    left = tmp_path / ".run.0123456789ab.partial"
    left.mkdir()
    (left / "big").touch()
    (tmp_path / ".file.0123456789ab.partial").touch()
    (tmp_path / ".mine.partial").touch()
    (tmp_path / "linked").symlink_to(left)
    saving.write(tmp_path / "other", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.partial", "linked", "other"]


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / ".run.0123456789ab.old"
    old.mkdir()
    (old / MARK).write_text("precious")
    saving.write(tmp_path / "other", b"")
    assert contents(tmp_path / "run") == {MARK: "precious"}


def test_added_files_come_together_and_the_rest_stays(tmp_path: Path) -> None:
    target = tmp_path / "run"
    put(target, "0")
    (target / "export").mkdir()
    (target / "export" / "deep").write_text("0")
    with pytest.raises(ZeroDivisionError), saving.added(target, ["a", "b"]) as folder:
        (folder / "a").write_text(f"{1 // 0}")
    assert (target / "a").read_text() == "0"
    with saving.added(target, ["a", "b"]) as folder:
        (folder / "a").write_text("1")
        (folder / "new").write_text("1")
    assert not (target / "b").exists()  # it was to be replaced, and nothing took its place
    assert [(target / name).read_text() for name in (MARK, "a", "new", "export/deep")] == ["0", "1", "1", "0"]
    assert list(tmp_path.iterdir()) == [target]


def test_only_folders_of_the_same_kind_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    (tmp_path / "file").touch()
    for name, why in (("mine", "holds no mark"), ("file", "is a file")):
        with pytest.raises(OutputError, match=why), saving.staged(tmp_path / name, MARK):
            pass
    put(tmp_path / "run", "0")
    with pytest.raises(OutputError, match="--overwrite"), saving.staged(tmp_path / "run", MARK, overwrite=False):
        pass


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\udc80" * 300, "file/below"])
def test_impossible_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), saving.staged(tmp_path / name, MARK):
        pass
    with pytest.raises(OutputError):
        saving.write(tmp_path / name, b"")


def test_links_that_go_round_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OutputError), saving.staged(tmp_path / "a" / "run", MARK):
        pass


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the system then refuses to write, too."""
    put(tmp_path / "run", "0")
    script = (
        "import resource, sys; from pathlib import Path; from pow2quant import saving, errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for write in (lambda: saving.write(Path(sys.argv[1], 'a'), b'1' * 1000), lambda: put()):\n"
        "    try: write()\n"
        "    except errors.OutputError as error: print(error)\n"
    )
    put_ = (
        "def put():\n"
        "    with saving.staged(Path(sys.argv[1]), 'mark.json') as folder: (folder / 'a').write_bytes(b'1' * 1000)\n"
    )
    script = script.replace("resource.setrlimit", put_ + "resource.setrlimit")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("cannot be written") == 2
    assert contents(tmp_path / "run") == {MARK: "0", "a": "0", "b": "0"}
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_temporary_folders_of_killed_runs_go(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pow2quant import saving\nwith saving.scratch(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    again = "from pow2quant import saving\nwith saving.scratch() as folder: print(folder)"
    subprocess.run([sys.executable, "-c", again], env=environment, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_another_of_its_kind_inside_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run" / "below" / "second").mkdir(parents=True)
    (tmp_path / "run" / "report.json").touch()
    (tmp_path / "run" / "notes.txt").touch()
    inner = tmp_path / "run" / "below" / "second" / "report.json"
    inner.touch()
    lost = pytest.raises(OutputError, match="holds another of its kind, second, which would be lost")
    with lost, saving.staged(tmp_path / "run", "report.json"):
        raise AssertionError
    assert inner.exists()
    inner.unlink()
    with saving.staged(tmp_path / "run", "report.json") as folder:
        (folder / "report.json").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["report.json"]
