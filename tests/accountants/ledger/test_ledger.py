# SPDX-License-Identifier: Apache-2.0
import errno
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from accountants import (
    Gaussian,
    Ledger,
    LedgerCorrupt,
    LedgerLocked,
    LedgerNotDurable,
    PoissonSampled,
    Repeated,
    accountant,
    charged,
    leaves,
    read,
    to_dict,
    verify,
)

STEP = PoissonSampled(0.01, Gaussian(1.0))
DEAR = PoissonSampled(0.5, Gaussian(0.5))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "population.ledger.jsonl"


def _filled(path, charges=3):
    with Ledger.open(path) as ledger:
        ledger.attempt({"model": "tiny", "lr": 0.1}, event=STEP)
        for step in range(charges):
            ledger.charge(STEP, context={"step": step})
        return ledger.head


def test_charges_survive_reopening(path):
    head = _filled(path)
    with Ledger.open(path) as ledger:
        assert (ledger.head, ledger.num_charges) == (head, 3)
        assert dict(leaves(ledger.events())) == {STEP: 3}
        ledger.charge(DEAR)
        ledger.note("checkpoint written", context={"step": 3})
        assert dict(leaves(ledger.events())) == {STEP: 3, DEAR: 1}
        assert ledger.knows(head)
        assert not ledger.knows("0" * 64)
    history = read(path)
    assert [record.kind for record in history.records] == ["header", "attempt", *["charge"] * 4, "note"]
    assert history.records[2].payload == {"event": to_dict(STEP), "context": {"step": 0}}
    assert dict(leaves(charged(history.records))) == {STEP: 3, DEAR: 1}
    assert history.torn == b""
    assert verify(path) == history.records[-1].hash


def test_the_total_can_be_priced(path):
    _filled(path)
    curve = accountant("rdp").curve(charged(read(path).records))
    assert curve.epsilon(1e-5) == pytest.approx(accountant("rdp").curve(Repeated(STEP, 3)).epsilon(1e-5))


def test_file_is_private_and_named_at_random(path, tmp_path):
    with Ledger.open(path) as one, Ledger.open(tmp_path / "other", unit="user") as other:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert one.id != other.id
        assert len(one.id) == 32
    with pytest.raises(
        ValueError, match=r"unit of .* must be 'record' to be continued; got 'user'; use another"
    ):
        Ledger.open(tmp_path / "other")


def test_durable_before_return(path, monkeypatch):
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(
        os, "fdatasync", lambda fd: (real(fd), synced.append(path.exists() and path.read_bytes()))
    )
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
    assert len(synced) == 2
    assert synced[0] is False  # the header is on disk before the file has its name
    assert synced[-1] == path.read_bytes()
    assert len(read(path).records) == 2


def test_single_writer(path):
    with Ledger.open(path) as ledger:
        with pytest.raises(
            LedgerLocked, match=r"the ledger must have one writer; got a second one .*; wait for"
        ):
            Ledger.open(path)
        code = "import sys; from accountants import Ledger; Ledger.open(sys.argv[1])"
        other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert "LedgerLocked" in other.stderr
        ledger.charge(STEP)
    assert len(read(path).records) == 2
    Ledger.open(path).close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_single_writer_forked_child(path):
    with Ledger.open(path) as ledger:
        results = multiprocessing.get_context("fork").Queue()

        def child():
            try:
                ledger.charge(STEP)
            except LedgerLocked as error:
                results.put(str(error))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        assert "charge in the parent" in results.get(timeout=20)
        process.join()
        ledger.charge(STEP)
    assert len(read(path).records) == 2


def test_closed_ledger_refuses(path):
    ledger = Ledger.open(path)
    ledger.close()
    ledger.close()
    with pytest.raises(ValueError, match=r"must be open; got .* after close\(\); open it again"):
        ledger.charge(STEP)


LOOP = """
import sys
from accountants import Gaussian, Ledger, PoissonSampled
with Ledger.open(sys.argv[1]) as ledger:
    ledger.attempt({}, event=PoissonSampled(0.01, Gaussian(1.0)))
    for step in range(10**6):
        ledger.charge(PoissonSampled(0.01, Gaussian(1.0)), context={"step": step})
        sys.stdout.write("released\\n")  # stands for the noise
        sys.stdout.flush()
"""


def test_no_charge_is_ever_lost_kill(path):
    released = 0
    for round_ in range(3):
        process = subprocess.Popen([sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == b"released\n"
        time.sleep(0.03 + 0.05 * round_)
        process.send_signal(signal.SIGKILL)
        released += 1 + process.stdout.read().count(b"released\n")
        process.wait()
        process.stdout.close()
        with Ledger.open(path) as ledger:
            assert released <= ledger.num_charges <= released + round_ + 1


@pytest.mark.parametrize("keep", [1, 20, 60, -2])
def test_no_charge_is_ever_lost_torn_line(path, keep):
    _filled(path)
    with Ledger.open(path) as ledger:
        ledger.charge(DEAR)
        ledger.charge(STEP)
    *_, last = path.read_bytes().splitlines(keepends=True)
    tear = path.read_bytes()[: -len(last)] + last[:keep]
    path.write_bytes(tear)
    assert read(path).torn == last[:keep]
    with pytest.raises(LedgerCorrupt, match="unfinished"):
        verify(path)
    with Ledger.open(path) as ledger:
        # the torn line is counted as the dearest event known
        assert dict(leaves(ledger.events())) == {STEP: 3, DEAR: 2}
        ledger.charge(STEP)
    assert read(path).records[-2].payload["context"] == {"repaired": len(last[:keep])}
    assert read(path).torn == b""


def test_repair_leaves_a_torn_line_when_it_dies(path, monkeypatch):
    _filled(path)
    junk = b'{"seq":5,"kind":"charge"' + b"x" * 1000
    path.write_bytes(path.read_bytes() + junk)

    def die(*_):
        raise OSError(errno.EIO, "died")

    monkeypatch.setattr(os, "ftruncate", die)
    with pytest.raises(LedgerNotDurable, match="a repair must be durable"):
        Ledger.open(path)
    monkeypatch.undo()
    with Ledger.open(path) as ledger:
        assert ledger.num_charges == 5  # 3, and the torn line twice
    verify(path)


def test_torn_note_costs_nothing(path):
    _filled(path)
    with Ledger.open(path) as ledger:
        ledger.note("x" * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with Ledger.open(path) as ledger:
        assert ledger.num_charges == 3
    assert read(path).records[-1].kind == "note"


def test_torn_first_charge_of_unknown_event_is_refused(path):
    Ledger.open(path).close()
    with path.open("ab") as file:
        file.write(b'{"seq":1,"kind":"charge","payl')
    with pytest.raises(LedgerCorrupt, match=r"must end in a whole line; got 30 bytes .*; .*by hand"):
        Ledger.open(path)


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_disk_full_stops_the_ledger(path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
        monkeypatch.setattr(os, call, full)
        with pytest.raises(
            LedgerNotDurable, match=r"durable before a release; got OSError.*No space.*; release nothing"
        ):
            ledger.charge(STEP)
        monkeypatch.undo()
        # no retry: after a failed sync the page cache cannot be trusted
        with pytest.raises(LedgerNotDurable, match="earlier failure"):
            ledger.charge(STEP)
        assert ledger.num_charges == 2  # over-counted, never under
    with Ledger.open(path) as ledger:
        assert ledger.num_charges in (1, 2)
        ledger.charge(STEP)
    verify(path)


def test_disk_full_half_written(path, monkeypatch):
    real = os.write

    def half(fd, data):
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, bytes(data)[: len(data) // 2])

    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(LedgerNotDurable):
            ledger.charge(STEP)
        monkeypatch.undo()
    with Ledger.open(path) as ledger:
        assert ledger.num_charges == 2


def test_disk_full_at_creation_leaves_no_file(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LedgerNotDurable, match="a new ledger must be durable"):
        Ledger.open(path)
    assert not path.exists()


@pytest.mark.parametrize("line", [1, 3, 5])
def test_tamper_evident(path, line):
    _filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for position in range(3, len(lines[line - 1]) - 1, 29):
        changed = bytearray(lines[line - 1])
        changed[position] ^= 1
        path.write_bytes(b"".join([*lines[: line - 1], bytes(changed), *lines[line:]]))
        for use in (Ledger.open, read, verify):
            with pytest.raises(LedgerCorrupt, match=rf"got line {line}: .*; restore the file"):
                use(path)


def test_tamper_evident_removed_swapped_or_forged_lines(path):
    _filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (lines[:2] + lines[3:], [*lines[:2], lines[3], lines[2], *lines[4:]], lines[1:], []):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(LedgerCorrupt, match="unbroken chain"):
            read(path)
    fields = json.loads(lines[-1])
    fields["payload"]["event"]["sampling_rate"] = 0.0
    path.write_bytes(b"".join(lines[:-1]) + json.dumps(fields, separators=(",", ":")).encode() + b"\n")
    with pytest.raises(LedgerCorrupt, match="got line 5"):
        read(path)


def test_rollback_is_seen_by_a_head_kept_elsewhere(path):
    head = _filled(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with Ledger.open(path) as ledger:
        assert not ledger.knows(head)


def test_payloads_are_plain_data(path):
    with Ledger.open(path) as ledger:
        for context in ({"loss": float("nan")}, {"grad": object()}):
            with pytest.raises(ValueError, match="a payload must be finite JSON data"):
                ledger.charge(STEP, context=context)
        assert ledger.num_charges == 0


def test_a_ledger_is_created_whole_or_not_at_all(path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fdatasync", die)
    with pytest.raises(KeyboardInterrupt):
        Ledger.open(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_disk_without_hard_links_has_ledgers_too(path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    _filled(path)
    assert len(read(path).records) == 5
    with pytest.raises(FileExistsError):
        Ledger.open(path, new=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_new_ledger_refuses_an_old_file(path):
    head = _filled(path)
    with pytest.raises(FileExistsError):
        Ledger.open(path, new=True)
    assert verify(path) == head


START = """
import os, sys, time
from pathlib import Path
from accountants import Ledger, LedgerLocked
while not Path(sys.argv[2]).exists():
    pass
for number in range(100):
    try:
        Ledger.open(f"{sys.argv[1]}-{number}")
        print("writer")
    except LedgerLocked:
        print("locked")
"""


def test_single_writer_of_a_ledger_that_two_create_at_once(path, tmp_path):
    command = [sys.executable, "-c", START, path, tmp_path / "go"]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(1.5)
    (tmp_path / "go").touch()
    told = [process.communicate(timeout=60)[0].split() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert len(told[0]) == len(told[1]) == 100
    # each ledger is held to the end of its process, or found free after the other's end
    assert all("writer" in both for both in zip(*told, strict=True))
    for number in range(100):
        verify(f"{path}-{number}")


@pytest.mark.parametrize("done", ["write", "fdatasync"])
def test_an_interrupted_charge_counts_and_stops_the_ledger(path, monkeypatch, done):
    real = getattr(os, done)

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
        monkeypatch.setattr(os, done, interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(STEP)
        monkeypatch.undo()
        assert ledger.num_charges == 2
        # another record would have the number of the one that is there
        with pytest.raises(LedgerNotDurable, match=r"earlier failure \(an interruption\)"):
            ledger.charge(STEP)
    with Ledger.open(path) as ledger:
        assert ledger.num_charges == 2
        ledger.charge(STEP)
    verify(path)


@pytest.mark.parametrize("harm", ["removed", "replaced", "emptied", "appended"])
def test_a_ledger_taken_away_from_its_writer_stops_it(path, harm):
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
        before = path.read_bytes()
        if harm == "removed":
            path.unlink()
        elif harm == "replaced":
            path.with_name("copy").write_bytes(before)
            path.with_name("copy").replace(path)
        else:
            path.write_bytes(b"" if harm == "emptied" else before + b"x")
        with pytest.raises(LedgerNotDurable, match=r"must be left alone during a run; got it .* put a copy"):
            ledger.charge(STEP)
        assert ledger.num_charges == 1
    path.write_bytes(before)
    with Ledger.open(path) as ledger:
        assert ledger.num_charges == 1


@pytest.mark.parametrize("keep", [1, 18, 100])
def test_a_torn_first_line_is_priced_by_what_is_about_to_be_charged(path, keep):
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
    header, line = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + line[:keep])
    with Ledger.open(path, expected=DEAR) as ledger:
        assert dict(leaves(ledger.events())) == {DEAR: 1}
    verify(path)
