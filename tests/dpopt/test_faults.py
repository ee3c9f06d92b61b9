# SPDX-License-Identifier: Apache-2.0
"""Faults in real training runs, judged by what the processes said they drew: no charge is lost, no noise comes twice."""

import json
import subprocess
import sys

import pytest

from tests.support.faults.catalogue import KINDS, STORAGE, faults
from tests.support.faults.harness import HERE, ROOT, added, environment, verdicts
from tests.support.faults.observer import chain

FEW, MANY = 40, 1000


def check(found):
    wrong = [verdict for verdict in found if verdict.wrong]
    assert wrong == []
    total = added(found)["all"]
    assert (total.under, total.repeats, total.halves) == (0, 0, 0)
    assert total.over <= sum(verdict.struck for verdict in found)
    assert total.releases > 0
    return total


def test_guarantee_no_fault_loses_a_charge_or_repeats_noise(tmp_path):
    found = verdicts(tmp_path, 0, FEW, 1)
    total = check(found)
    assert total.struck >= 0.7 * FEW
    assert {verdict.kind for verdict in found} == {*KINDS, "clean"}


@pytest.mark.slow
@pytest.mark.parametrize("slice_", range(4))
def test_guarantee_no_fault_of_a_thousand_loses_a_charge_or_repeats_noise(tmp_path, slice_):
    count = MANY // 4
    check(verdicts(tmp_path, slice_ * count, count, 2))


def test_the_faults_are_the_same_for_the_same_seed():
    assert faults(10, 50, 3) == faults(10, 50, 3)
    assert faults(0, 50, 3) != faults(0, 50, 4)
    points = {(fault.kind, fault.point) for fault in faults(0, 400, 1)}
    assert {("disk full", point) for point in STORAGE} <= points


PROOF = """
import json, sys
from pathlib import Path
import dpopt.release.randomness_tiers as tiers
from accountants import Ledger
from tests.support.faults.catalogue import Fault
from tests.support.faults.observer import Observer
from tests.support.faults.server import rehearse, strike

def tried(name):
    observer, found = Observer(Path(name)), []
    for number in range(2):
        fault = Fault("kill", "between steps", 1, False, number, number)
        verdict = strike(fault, observer.path, observer)
        found.append([verdict.under, verdict.repeats, len(verdict.wrong)])
        if name == "repeating":
            observer.path.unlink()
            observer.charges = observer.drawn = observer.excess = observer.epsilon = 0
    return [sum(column) for column in zip(*found)]

rehearse(Path("."))
told = {"as it is": tried("as it is")}
charge, Ledger.charge = Ledger.charge, lambda self, event, *, context=None: self._last
told["forgetful"] = tried("forgetful")
Ledger.charge, tiers.secret_key = charge, lambda: tiers.insecure_key(1)
told["repeating"] = tried("repeating")
print(json.dumps(told))
"""


def test_the_observer_sees_a_library_that_loses_charges_or_repeats_noise(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROOF],
        env={**environment(), "PYTHONPATH": f"{ROOT}:{HERE}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["as it is"] == [0, 0, 0]
    assert told["forgetful"][0] > 0
    assert told["repeating"][0] == 0 and told["repeating"][1] > 0


FULL = """
mount -t tmpfs -o size=16k tmpfs "$1" || exit 77
cd "$1" && python="$2" && "$python" -W ignore -c '
import json, os, sys
from pathlib import Path
from tests.support.faults.catalogue import Fault
from tests.support.faults.server import rehearse, start, told
rehearse(Path(sys.argv[1]))
said, path = [], Path("ledger.jsonl")
for number in range(20):
    said += told(*start(Fault("any", "", 0, False, number, number), path))
os.write(1, json.dumps([said, path.read_text()]).encode())
' "$3"
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_stops_the_run(tmp_path):
    (disk := tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", disk, sys.executable, tmp_path]
    try:
        done = subprocess.run(
            command,
            env={**environment(), "PYTHONPATH": f"{ROOT}:{HERE}"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare failed" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("no disk of our own may be mounted here")
    assert done.returncode == 0, done.stderr
    said, text = json.loads(done.stdout)
    charges, broken = chain(text.encode())
    releases = sum(name == "place" and value == 0 for name, value in said)
    assert broken == ""
    assert 5 < releases <= charges <= releases + 20
    assert ["left", "LedgerNotDurable"] in said
    assert not [value for name, value in said if name == "error"]
