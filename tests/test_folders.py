"""Folders are worked in by one run at a time, and what is written is whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from devil_hf.folders import CLAIM, DiskFull, FolderInUse, claimed, is_full, need_room, write_json, written

HOLDER = (
    "import sys, time\nfrom devil_hf.folders import claimed\nwith claimed(sys.argv[1], 'a long run'):\n"
    "    print('here', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def claim_of(folder, **changes):
    with claimed(folder, "work"):
        content = json.loads((folder / CLAIM).read_text())
    (folder / CLAIM).write_text(json.dumps(content | changes))


def test_two_runs_never_share_a_folder_and_a_dead_ones_claim_is_taken_over(tmp_path, holder):
    with pytest.raises(FolderInUse, match=rf"{tmp_path} is in use: a long run since .*process {holder.pid} on "):
        claimed(tmp_path, "another run").__enter__()
    holder.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # dead, though nobody has waited for it: a run's killed sibling is a zombie, too
    with claimed(tmp_path, "another run"):
        assert json.loads((tmp_path / CLAIM).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"started": "another start"}, {"pid": 2**22 + 1}, {"pid": "?"}, {"pid": -1}, {"pid": 2**70}])
def test_a_number_that_another_process_got_is_no_claim(change, tmp_path):
    claim_of(tmp_path, **change)
    with claimed(tmp_path, "mine"):
        pass


def test_of_another_host_only_its_owner_can_say_whether_it_runs(tmp_path):
    claim_of(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(FolderInUse, match=r"process 7 on elsewhere.*remove .*\.claimed"), claimed(tmp_path, "mine"):
        pass


def test_work_within_work_shares_the_claim_and_gives_it_back_once(tmp_path):
    with claimed(tmp_path, "outer"):
        with pytest.raises(KeyError), claimed(tmp_path / "." / "", "inner"):
            raise KeyError
        assert (tmp_path / CLAIM).exists()
        with claimed(tmp_path, "of another process of this run", mine=False):
            pass
    assert not (tmp_path / CLAIM).exists()


def test_a_claim_that_was_cut_off_is_nobodys(tmp_path):
    (tmp_path / CLAIM).touch()
    os.utime(tmp_path / CLAIM, (1, 1))
    with claimed(tmp_path, "mine"):
        pass


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(half):
        with written(tmp_path / "a.json") as unfinished:
            unfinished.write_text(half)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match=r"a\.json cannot be written, the disk is full"):
        fail("half")
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    for content in ("one", "two"):
        with written(tmp_path / "folder") as unfinished:
            unfinished.mkdir()
            (unfinished / content).touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "folder", "two"]


def test_a_full_disk_is_known_by_whatever_library_says_it():
    texts = ["Error while serializing: I/O error: No space left on device (os error 28)", "File too large (os error 27)"]
    assert all(is_full(RuntimeError(text)) for text in texts) and is_full(OSError(errno.EDQUOT, "quota"))
    assert not is_full(OSError(errno.ENOENT, "gone")) and not is_full(ValueError("shape"))


def test_room_is_asked_for_before_the_work(tmp_path):
    need_room(tmp_path / "new", 1, "a byte", "write less")
    with pytest.raises(DiskFull, match=r"GB free, but all of it needs 1000000000\.0 GB: make room, or write less"):
        need_room(tmp_path, 1e18, "all of it", "write less")


def test_what_several_write_at_once_is_one_of_theirs_and_whole(tmp_path):
    with written(tmp_path / "a.txt") as first:
        first.write_text("the first, half")
        with written(tmp_path / "a.txt") as second:
            second.write_text("the second")
        assert (tmp_path / "a.txt").read_text() == "the second"
        first.write_text("the first")
    assert (tmp_path / "a.txt").read_text() == "the first"
    with written(tmp_path / "folder") as first:
        first.mkdir()
        with written(tmp_path / "folder") as second:
            second.mkdir()
        (first / "of the first").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "folder", "of the first"]


def test_many_that_swap_a_folder_at_once_all_succeed(tmp_path):
    def write(number):
        with written(tmp_path / "folder") as unfinished:
            unfinished.mkdir()
            for name in "ab":
                (unfinished / name).write_text(str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "folder"]
    assert (tmp_path / "folder/a").read_text() == (tmp_path / "folder/b").read_text()


def test_what_a_killed_writer_left_is_swept_by_the_next_and_what_another_writes_is_not(tmp_path):
    code = "import os, sys\nfrom devil_hf.folders import written\nwith written(sys.argv[1]) as unfinished:\n"
    code += "    unfinished.write_text('half')\n    os._exit(1)\n"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".txt"
    elsewhere = [tmp_path / f".unfinished-00000000-1-0000000{n}-a.txt" for n in (1, 2)]
    for file in elsewhere:
        file.touch()
    os.utime(elsewhere[1], (1, 1))
    with written(tmp_path / "a.txt") as mine, written(tmp_path / "a.txt") as inner:
        mine.touch()
        inner.touch()
        assert set(tmp_path.iterdir()) == {mine, inner, elsewhere[0]}


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def interrupt():
        with written(tmp_path / "a.txt") as unfinished:
            unfinished.touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not list(tmp_path.iterdir())


def test_of_two_threads_the_last_one_gives_the_claim_back(tmp_path):
    first, second = claimed(tmp_path, "first"), claimed(tmp_path, "second")
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert (tmp_path / CLAIM).exists()
        with claimed(tmp_path, "third"):
            pass
        assert (tmp_path / CLAIM).exists()
        other.submit(second.__exit__, None, None, None).result()
    assert not (tmp_path / CLAIM).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_a_forked_process_has_no_part_in_its_parents_claim(tmp_path):
    code = (
        "import os, sys\nfrom devil_hf.folders import FolderInUse, claimed\n"
        "try:\n    with claimed(sys.argv[1], 'a run'):\n        child = not os.fork()\n        if child:\n"
        "            with claimed(sys.argv[1], 'another'):\n                os._exit(3)\n"
        "        code = os.waitstatus_to_exitcode(os.wait()[1])\n"
        "        assert os.listdir(sys.argv[1]) and code == 5, code\n"
        "except FolderInUse:\n    os._exit(5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not list(tmp_path.iterdir())


def test_a_claim_that_cannot_be_read_is_somebodys(tmp_path, monkeypatch):
    claim_of(tmp_path)
    os.utime(tmp_path / CLAIM, (1, 1))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / CLAIM))

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(FolderInUse, match=r"\.claimed cannot be read .*Ask its owner"), claimed(tmp_path, "mine"):
        pass
    monkeypatch.undo()
    assert (tmp_path / CLAIM).exists()


def test_a_claim_without_content_ends_though_its_clock_is_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr("devil_hf.folders.YOUNG", 0.2)
    (tmp_path / CLAIM).touch()
    os.utime(tmp_path / CLAIM, (time.time() + 1e6,) * 2)
    with claimed(tmp_path, "mine"):
        pass


def test_a_requeued_job_takes_over_its_own_claim_on_another_host_and_no_other(tmp_path, monkeypatch):
    claim_of(tmp_path, host="elsewhere", pid=7, job=["cluster", "12", "0"])
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "cluster")
    for job, restarts in (("13", "1"), ("12", "0")):  # another job, and another step of the same run
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(FolderInUse, match="elsewhere"), claimed(tmp_path, "mine"):
            pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with claimed(tmp_path, "mine"):
        assert json.loads((tmp_path / CLAIM).read_text())["job"] == ["cluster", "12", "1"]


def test_numbers_that_json_has_no_word_for_are_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), (float("inf"), 1.5)], "b": 2})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, [None, 1.5]], "b": 2}


def test_a_folder_where_nothing_can_be_written_is_named_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place, error in ((tmp_path / "file", FileExistsError), (tmp_path / "file" / "below", NotADirectoryError)):
        with (
            pytest.raises(error, match=rf"written to the folder {place} \(a file is there\): name another"),
            claimed(place, "work"),
        ):
            pass
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"somebody else.*name another"), claimed(tmp_path, "work"):
        pass
    monkeypatch.undo()

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    with pytest.raises(DiskFull, match="the disk is full"), claimed(tmp_path / "new", "work"):
        pass
