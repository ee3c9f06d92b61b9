# SPDX-License-Identifier: Apache-2.0
"""The file under an open ledger: moved, replaced, linked, on another kind of node, copied into a fork."""

import os
import shutil
import threading
import time

import pytest

import accountants.storage as storage
from accountants import (
    Gaussian,
    Ledger,
    LedgerCorrupt,
    LedgerLocked,
    LedgerNotDurable,
    PoissonSampled,
    read,
    verify,
)

STEP = PoissonSampled(0.01, Gaussian(1.0))
TOUCHED = r"must be left alone during a run; got it .*; release nothing, put a copy .* open the ledger again"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "population.ledger.jsonl"


def _moved_and_an_old_copy_put_back(path):
    shutil.copy(path, path.with_name("old"))
    path.rename(path.with_name("moved"))
    shutil.copy(path.with_name("old"), path)


def _replaced_while_a_link_keeps_the_file_alive(path):
    path.with_name("backup").hardlink_to(path)
    shutil.copy(path, path.with_name("new"))
    path.with_name("new").replace(path)


def _removed_while_a_link_keeps_the_file_alive(path):
    path.with_name("backup").hardlink_to(path)
    path.unlink()


def _folder_moved(path):
    path.parent.rename(path.parent.with_name("elsewhere"))


def _turned_into_a_link_to_a_copy(path):
    shutil.copy(path, path.with_name("copy"))
    path.rename(path.with_name("moved"))
    path.symlink_to("copy")


HARMS = [
    _moved_and_an_old_copy_put_back,
    _replaced_while_a_link_keeps_the_file_alive,
    _removed_while_a_link_keeps_the_file_alive,
    _folder_moved,
    _turned_into_a_link_to_a_copy,
]


@pytest.mark.parametrize("harm", HARMS)
def test_charges_go_where_the_path_leads_or_nowhere(tmp_path, harm):
    path = tmp_path / "folder" / "ledger"
    path.parent.mkdir()
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
        harm(path)
        for _ in range(2):
            with pytest.raises(LedgerNotDurable, match=TOUCHED):
                ledger.charge(STEP)
        assert ledger.num_charges == 1


@pytest.mark.parametrize("harm", HARMS[:2])
def test_a_ledger_that_is_put_back_goes_on(path, harm):
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
        harm(path)
        with pytest.raises(LedgerNotDurable):
            ledger.charge(STEP)
        path.with_name("moved" if path.with_name("moved").exists() else "backup").replace(path)
        ledger.charge(STEP)
    assert len(read(path).records) == 3


def test_a_symbolic_link_is_followed_and_watched(path):
    with Ledger.open(path):
        pass
    shutil.copy(path, path.with_name("copy"))
    link = path.with_name("link")
    link.symlink_to(path.name)
    with Ledger.open(link) as ledger:
        ledger.charge(STEP)
        link.unlink()
        link.symlink_to("copy")
        with pytest.raises(LedgerNotDurable, match=TOUCHED):
            ledger.charge(STEP)
    assert len(read(path).records) == 2
    assert len(read(link).records) == 1


@pytest.mark.parametrize("harm", HARMS[:3])
def test_a_ledger_moved_while_a_line_is_written_is_no_durable_one(path, monkeypatch, harm):
    """The line may be in the file that is gone; it counts, and nothing may be released for it."""
    real = storage.write_durably
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)

        def write(fd, line):
            harm(path)
            real(fd, line)

        monkeypatch.setattr(storage, "write_durably", write)
        with pytest.raises(LedgerNotDurable, match=TOUCHED):
            ledger.charge(STEP)
        monkeypatch.undo()
        assert ledger.num_charges == 2
        with pytest.raises(LedgerNotDurable, match="earlier failure"):
            ledger.charge(STEP)


def test_a_ledger_replaced_while_it_is_opened_is_not_locked_in_vain(path, monkeypatch):
    with Ledger.open(path):
        pass
    real = storage._lock

    def lock(fd, where):
        _moved_and_an_old_copy_put_back(path)
        real(fd, where)

    monkeypatch.setattr(storage, "_lock", lock)
    with pytest.raises(LedgerNotDurable, match=TOUCHED):
        Ledger.open(path)
    monkeypatch.undo()
    Ledger.open(path).close()


def test_a_relative_path_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Ledger.open("ledger") as ledger:
        (tmp_path / "inner").mkdir()
        monkeypatch.chdir(tmp_path / "inner")
        ledger.charge(STEP)
    assert len(read(tmp_path / "ledger").records) == 2


def test_nothing_waits_for_the_other_end_of_a_pipe(path):
    os.mkfifo(path)
    for ask in (Ledger.open, read, verify):
        with pytest.raises(
            LedgerCorrupt, match="must be a file to be a ledger; got a named pipe; give the name"
        ):
            ask(path)
    with pytest.raises(FileExistsError):
        Ledger.open(path, new=True)
    for ask in (Ledger.open, read, verify):
        with pytest.raises(IsADirectoryError):
            ask(path.parent)
    if os.path.exists("/dev/zero"):
        with pytest.raises(LedgerCorrupt, match="got a device"):
            read("/dev/zero")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_charge_does_not_wait_for_it(path, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    real = storage.write_durably

    def write(fd, line):
        inside.set()
        go_on.wait(20)
        real(fd, line)

    with Ledger.open(path) as ledger:
        monkeypatch.setattr(storage, "write_durably", write)
        thread = threading.Thread(target=ledger.charge, args=(STEP,))
        thread.start()
        inside.wait(20)
        child = os.fork()
        if child == 0:
            try:
                ledger.charge(STEP)
            except LedgerLocked:
                os._exit(0)
            os._exit(1)
        for _ in range(200):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            status = None
        go_on.set()
        thread.join()
        assert status == 0
        assert ledger.num_charges == 1
