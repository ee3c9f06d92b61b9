# SPDX-License-Identifier: Apache-2.0
"""A warm process that forks one child for each run, so that torch is loaded once for a thousand faults.

python tests/support/faults/server.py FOLDER FIRST COUNT SEED: faults FIRST to FIRST + COUNT of the seed, one verdict a line.
"""

import contextlib
import gc
import json
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from accountants import BudgetExhausted, LedgerLocked, LedgerNotDurable
from tests.support.faults.catalogue import STEPS, Fault, faults
from tests.support.faults.loop import Loop
from tests.support.faults.observer import Observer, Verdict, chain

FAULTS_PER_LEDGER = 12
EXPECTED = (torch.OutOfMemoryError, KeyboardInterrupt, ArithmeticError, LedgerNotDurable, BudgetExhausted)
RUN_SECONDS = 0.15


def start(fault: Fault, ledger: Path, pause: float = 0.0) -> tuple[int, int]:
    """Fork a child that runs the loop: its process number, and where it tells what it does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    code = 3
    try:
        code = _child(fault, ledger, writing, pause)
    finally:
        os._exit(code)


def _child(fault: Fault, ledger: Path, pipe: int, pause: float) -> int:
    write = os.write

    def tell(name: str, value: object) -> None:
        write(pipe, json.dumps([name, value]).encode() + b"\n")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = open(os.devnull, "w")
    try:
        Loop(fault, ledger, tell, pause).run()
    except LedgerLocked:
        tell("locked", True)
    except EXPECTED as error:
        tell("left", type(error).__name__)
        # The last word of an interrupted run may be the interruption itself.
        if fault.kind in ("clean", "bad example", "clock jump", "fork", "break", "second run"):
            tell("error", f"{type(error).__name__}: {error}")
    except BaseException as error:
        tell("error", f"{type(error).__name__}: {error}")
    return 0


def told(child: int, pipe: int) -> list[tuple[str, object]]:
    """Everything that the child told until its end."""
    with os.fdopen(pipe, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    os.waitpid(child, 0)
    return [tuple(json.loads(line)) for line in lines]


def strike(fault: Fault, ledger: Path, observer: Observer) -> Verdict:
    """Bring the fault about in runs on the ledger, and judge."""
    verdict = Verdict(fault.kind, fault.point)
    source = random.Random(fault.seed)
    if fault.kind == "torn line":
        _tear(fault, ledger, observer, verdict)
    elif fault.kind == "second run":
        _second(fault, ledger, observer, verdict)
    else:
        child, pipe = start(fault, ledger)
        if fault.point == "timer":
            verdict.struck = True
            number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
            time.sleep(source.uniform(0.0, RUN_SECONDS))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number[fault.kind.split()[0]])
        said = told(child, pipe)
        if fault.kind in ("bad example", "clock jump", "break", "fork"):
            verdict.struck = True
        _put_back(fault, ledger, verdict, said)
        observer.judge(verdict, said)
    return verdict


def _put_back(fault: Fault, ledger: Path, verdict: Verdict, said: list[tuple[str, object]]) -> None:
    """Restore a ledger that was taken away; nothing may have been released since."""
    kept = ledger.with_suffix(".kept")
    if fault.kind != "ledger taken away" or not kept.exists():
        return
    names = [name for name, _ in said]
    if "noise" in names[names.index("struck") :]:
        verdict.wrong.append("released after the ledger was taken away")
    kept.replace(ledger)


def _tear(fault: Fault, ledger: Path, observer: Observer, verdict: Verdict) -> None:
    """Cut the last record off at some byte, as a torn write leaves it, and run on."""
    if not ledger.exists():
        observer.judge(verdict, told(*start(_clean(fault), ledger)))
    data = ledger.read_bytes()
    length = len(data) - data.rstrip(b"\n").rfind(b"\n") - 1
    if b'"header"' not in data[-length:]:
        cut = 1 + fault.number % (length - 1)
        os.truncate(ledger, len(data) - cut)
        verdict.struck = True
    observer.judge(verdict, told(*start(_clean(fault), ledger)))


def _second(fault: Fault, ledger: Path, observer: Observer, verdict: Verdict) -> None:
    """Two runs on one ledger: one is refused, or comes after the other."""
    clean, path = _clean(fault), ledger
    if fault.point == "at the start" and fault.go_on:
        path = ledger.with_name(f"{ledger.name}-new-{fault.number}")
        observer = Observer(path)
    first = start(clean, path, 0.02 if fault.point == "while running" else 0.0)
    if fault.point == "while running":
        time.sleep(0.04)
    second = start(clean, path)
    said = [told(*first), told(*second)]
    ends = [[name for name, _ in one if name in ("locked", "written")] for one in said]
    if not any(end.count("written") == STEPS for end in ends) or any(
        "locked" in end and "written" in end for end in ends
    ):
        verdict.wrong.append(f"two runs ended as {ends}")
    verdict.struck = True
    observer.judge(verdict, said[0] + said[1])


def _clean(fault: Fault) -> Fault:
    return Fault("clean", "", 0, False, fault.number, fault.seed)


def rehearse(folder: Path) -> None:
    """Import what torch imports on first use, before anything is forked."""
    loop = Loop(Fault("clean", "", 0, False, 0, 0), folder / "rehearsal.jsonl", lambda *_: None)
    with loop.private:
        loop._steps()


def main() -> None:
    folder, first, count, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    gc.freeze()
    rehearse(folder)
    chosen = faults(first, count, seed)
    ledger = observer = None
    for number, fault in enumerate(chosen):
        if number % FAULTS_PER_LEDGER == 0:
            ledger = folder / f"ledger-{first + number}.jsonl"
            observer = Observer(ledger)
        assert ledger is not None and observer is not None
        print(json.dumps(asdict(strike(fault, ledger, observer))), flush=True)
        if number % FAULTS_PER_LEDGER == FAULTS_PER_LEDGER - 1 or number == len(chosen) - 1:
            last = Verdict("clean", "last run of a ledger")
            observer.judge(last, told(*start(_clean(fault), ledger)))
            if last.releases != STEPS or chain(ledger.read_bytes())[1]:
                last.wrong.append(f"a clean run released {last.releases}")
            print(json.dumps(asdict(last)), flush=True)


if __name__ == "__main__":
    main()
