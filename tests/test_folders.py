"""Folders are worked in by one run at a time, and what is written is whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

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


@pytest.mark.parametrize("change", [{"started": "another start"}, {"pid": 2**22 + 1}, {"pid": "?"}, {"pid": -1}])
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
