# SPDX-License-Identifier: Apache-2.0
"""Looking at a ledger: whole, in use, torn, foreign, empty, cut and edited; and that looking changes nothing."""

import fcntl
import json
import os
from pathlib import Path

import dp_accounting
import pytest
from typer.testing import CliRunner

from accountants import (
    ADD_REMOVE,
    BY_RECORD,
    REPLACE,
    Composed,
    FixedSize,
    Gaussian,
    Ledger,
    NonPrivate,
    OncePerEpoch,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
    best,
    read,
)
from accountants.formats.to_dp_accounting import dp_accounting_data, from_dp_accounting_data, to_dp_accounting
from dpopt.cli.commands import app

STEP = PoissonSampled(0.01, Gaussian(1.0))
COMMANDS = (("verify",), ("status", "--delta", "1e-5"), ("export",), ("export", "--format", "dp-accounting"))


def invoke(command: str, path: Path, *options: object):
    words = ["ledger", command, str(path), *map(str, options)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


def everything(path: Path):
    """Every reading command, and the proof that it left the file as it was."""
    before, status = path.read_bytes(), path.stat()
    done = [invoke(command, path, *options) for command, *options in COMMANDS]
    after = path.stat()
    assert path.read_bytes() == before
    assert (after.st_mtime_ns, after.st_ino, after.st_size) == (
        status.st_mtime_ns,
        status.st_ino,
        status.st_size,
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return done


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    for seed, charges in ((None, 3), (7, 2)):
        with Ledger.open(path, unit="one user", relation=ADD_REMOVE) as book:
            config = {
                "mechanism": "GaussianMechanism",
                "sampler": "PoissonSampling",
                "sampling_rate": 0.01,
                "insecure_seed": seed,
            }
            book.attempt(config, event=STEP)
            for _ in range(charges):
                book.charge(STEP)
    return path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_a_whole_ledger_verifies_and_is_described(ledger: Path) -> None:
    verified, status, exported, foreign = everything(ledger)
    head = read(ledger).records[-1].hash
    assert [done.exit_code for done in (verified, status, exported, foreign)] == [0, 0, 0, 0]
    assert f"8 records, 5 charges; head {head}" in verified.stdout
    for told in ("one user", ADD_REMOVE, "5, of which 0", "2, of which 1 resumed", "PUBLIC: 7", "INSECURE"):
        assert told in status.stdout
    bound = best(Repeated(STEP, 5), 1e-5)
    shown = float(status.stdout.split("at delta 1e-05")[0].split()[-1])
    assert bound.epsilon <= shown <= bound.epsilon + 1.1e-4
    data = json.loads(exported.stdout)
    assert (data["head"], data["num_charges"], data["torn_bytes"]) == (head, 5, 0)
    assert [record["kind"] for record in data["records"]].count("charge") == 5
    event = from_dp_accounting_data(json.loads(foreign.stdout)["event"])
    accountant = dp_accounting.pld.PLDAccountant()
    assert accountant.compose(event).get_epsilon(1e-5) == pytest.approx(bound.epsilon, rel=1e-2)


def test_a_head_kept_elsewhere_tells_a_rollback(ledger: Path) -> None:
    hashes = [record.hash for record in read(ledger).records]
    done = invoke("verify", ledger, "--head", hashes[-2])
    assert done.exit_code == 0
    assert "head known: record 6, 1 records ago" in done.stdout
    ledger.write_bytes(b"".join(lines(ledger)[:-1]))
    assert invoke("verify", ledger, "--head", hashes[-2]).exit_code == 0
    done = invoke("verify", ledger, "--head", hashes[-1])
    assert done.exit_code == 1
    assert "must contain the head" in done.stderr and "rolled back" in done.stderr


def test_a_running_writer_is_not_disturbed(ledger: Path) -> None:
    with Ledger.open(ledger, unit="one user", relation=ADD_REMOVE) as book:
        assert [done.exit_code for done in everything(ledger)] == [0, 0, 0, 0]
        book.charge(STEP)
        assert "6 charges" in invoke("verify", ledger).stdout
        fd = os.open(ledger, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # the writer still has its lock
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


def test_reading_takes_no_lock(ledger: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a lock was taken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert [done.exit_code for done in everything(ledger)] == [0, 0, 0, 0]


def test_a_torn_tail_is_told_before_and_after_its_repair(ledger: Path) -> None:
    ledger.write_bytes(ledger.read_bytes()[:-5])
    verified, status, exported, foreign = everything(ledger)
    assert [done.exit_code for done in (verified, status, exported, foreign)] == [0, 0, 0, 0]
    assert "the last line is unfinished" in verified.stdout and "unfinished" in status.stdout
    assert json.loads(exported.stdout)["torn_bytes"] > 0
    Ledger.open(ledger, unit="one user", relation=ADD_REMOVE).close()
    verified, status, *_ = everything(ledger)
    assert "counted for unfinished lines: 1 charges (records 7)" in verified.stdout
    assert "5, of which 1 count unfinished lines" in status.stdout


@pytest.mark.parametrize("harm", ["foreign", "json", "empty", "beheaded", "hole", "edited", "forged"])
def test_what_does_not_verify_is_refused(ledger: Path, harm: str) -> None:
    whole = lines(ledger)
    edited = whole[3].replace(b'"sampling_rate":0.01', b'"sampling_rate":0.02')
    assert edited != whole[3]
    damaged = {
        "foreign": [b"\x89PNG\r\n\x1a\n\xff\xfe", b"\n"],
        "json": [b'{"a": [1, 2]}\n'],
        "empty": [],
        "beheaded": whole[1:],
        "hole": whole[:3] + whole[4:],
        "edited": [*whole[:3], edited, *whole[4:]],
        "forged": [*whole[:-1], whole[-1].replace(b'"seq":7', b'"seq":8')],
    }
    ledger.write_bytes(b"".join(damaged[harm]))
    verified, *others = everything(ledger)
    assert verified.exit_code == 1
    assert "must be an unbroken chain of records; got line" in verified.stderr
    assert {done.exit_code for done in others} == {4}
    assert all(done.stdout == "" for done in others)


def test_no_file_is_a_file_error(tmp_path: Path) -> None:
    done = invoke("verify", tmp_path / "missing")
    assert done.exit_code == 4
    assert not (tmp_path / "missing").exists()
    assert invoke("status", tmp_path).exit_code == 4


def test_forks_are_counted_where_runs_say_what_they_continue(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as book:
        book.attempt({}, event=STEP)
        old = book.charge(STEP).hash
        new = book.charge(STEP).hash
        assert "no run says" in invoke("status", path).stdout
        book.attempt({"head": new}, event=STEP)
        book.attempt({"head": old}, event=STEP)
    row = next(line for line in invoke("status", path).stdout.splitlines() if "│ forks" in line)
    assert row.split("│")[2].strip() == "1"


def test_another_relation_is_priced_as_such_or_refused(tmp_path: Path) -> None:
    event = FixedSize(5, 100, Gaussian(4.0))
    for name, relation in (("replace", REPLACE), ("odd", "differ by a cluster")):
        with Ledger.open(tmp_path / name, relation=relation) as book:
            book.charge(event)
    done = invoke("status", tmp_path / "replace", "--delta", 1e-5)
    assert done.exit_code == 0, done.stderr
    assert "replac" in done.stdout
    done = invoke("status", tmp_path / "odd", "--delta", 1e-5)
    assert done.exit_code == 2
    assert "relation of the ledger must be one of" in done.stderr
    assert invoke("status", tmp_path / "odd").exit_code == 0


@pytest.mark.parametrize(
    "event", [OncePerEpoch(4, BY_RECORD, Gaussian(1.0)), TruncatedPoisson(0.1, 9, 50, Gaussian(1.0))]
)
def test_events_without_a_word_for_them_are_refused_by_name(tmp_path: Path, event) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as book:
        book.charge(STEP)
        book.charge(event)
    done = invoke("export", path, "--format", "dp-accounting")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert type(event).__name__ in done.stderr and "export as json" in done.stderr


def test_dp_accounting_events_go_there_and_back() -> None:
    event = Composed(
        (
            Repeated(STEP, 3),
            FixedSize(2, 9, Gaussian(2.0)),
            Composed((Gaussian(3.0),)),
            NonPrivate(),
            Gaussian(0.0),
        )
    )
    told = json.loads(json.dumps(dp_accounting_data(event)))
    assert from_dp_accounting_data(told) == to_dp_accounting(event)
    assert told["events"][0]["event"]["class_name"] == "PoissonSampledDpEvent"
    with pytest.raises(ValueError, match="class_name must name an event of dp_accounting; got 'attr'"):
        from_dp_accounting_data({"class_name": "attr"})


def test_without_dp_accounting_its_export_says_what_to_install(ledger: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    done = invoke("export", ledger, "--format", "dp-accounting")
    assert done.exit_code == 2
    assert "pip install dp-accounting" in done.stderr
