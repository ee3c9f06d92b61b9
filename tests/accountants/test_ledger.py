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
    monkeypatch.setattr(os, "fdatasync", lambda fd: (real(fd), synced.append(path.read_bytes())))
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
    assert len(synced) == 2
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
