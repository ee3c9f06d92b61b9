# SPDX-License-Identifier: Apache-2.0
"""Makes one fault happen inside a training process, by standing between the library and what it calls."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from hashlib import sha256
from pathlib import Path

import torch

import dpopt.mechanisms.gaussian as gaussian
import dpopt.training as training
from accountants import Ledger
from dpopt import GaussianMechanism
from tests.support.faults.catalogue import Fault

Tell = Callable[[str, object], None]


def digest(values: torch.Tensor) -> str:
    return sha256(values.detach().numpy().tobytes()).hexdigest()[:24]


@dataclass
class Striker:
    """Knows the step that is running, and strikes once, at the fault's step and point."""

    fault: Fault
    ledger: Path
    tell: Tell
    step: int = -1
    done: bool = False
    noises: int = 0
    write: Callable = field(default=os.write)
    sync: Callable = field(default=os.fdatasync)

    def at(self, point: str) -> None:
        fault = self.fault
        due = self.step == fault.step or point == "opening"
        if self.done or not due or point != fault.point:
            return
        self.done = True
        self.tell("struck", point)
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # the handler runs here
        elif fault.kind == "out of memory":
            raise torch.OutOfMemoryError("a fault")
        elif fault.kind == "exception":
            raise ArithmeticError("a fault")

    def arm(self) -> None:
        """Put the watchers in place."""
        self._around(Ledger, "attempt", "opening")
        self._around(Ledger, "charge", "before charge")
        self._release()
        os.write, os.fdatasync = self._write, self._sync
        self._watch_noise()
        self._watch_gradients()
        if self.fault.kind == "clock jump":
            _jump(random.Random(self.fault.seed))

    def _release(self) -> None:
        real = GaussianMechanism.release

        def watched(*arguments, **options):
            self.at("before noise")
            self.noises = 0
            return real(*arguments, **options)

        GaussianMechanism.release = watched

    def _around(self, owner: type, name: str, point: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments, **options):
            self.at(point)
            return real(*arguments, **options)

        setattr(owner, name, watched)

    def _watch_noise(self) -> None:
        real = gaussian.add_normal

        def watched(total, *arguments, **options):
            # Told from here on: a process that dies while it draws has drawn.
            self.tell("place", self.noises)
            real(total, *arguments, **options)
            self.tell("noise", digest(total))
            self.noises += 1
            self.at("during noise")

        gaussian.add_normal = watched

    def _watch_gradients(self) -> None:
        real, striker = training.write_gradients, self

        class Slow(dict):
            def items(self):
                for number, item in enumerate(super().items()):
                    if number:
                        striker.at("during grad")
                    yield item

        def watched(parameters, released):
            self.at("before grad")
            real(Slow(parameters), released)

        training.write_gradients = watched

    def _storage(self, call: str) -> bool:
        fault = self.fault
        due = self.step == fault.step and not self.done and (fault.kind, fault.point) == ("disk full", call)
        self.done = self.done or due
        if due:
            self.tell("struck", call)
        return due

    def _write(self, fd: int, data: bytes) -> int:
        part = bytes(data)[: 1 + self.fault.seed % (len(data) - 1)]
        if self._storage("write"):
            raise OSError(ENOSPC, "No space left on device")
        if self._storage("half write"):
            self.write(fd, part)
            raise OSError(ENOSPC, "No space left on device")
        if self.fault.point == "half written" and self.step == self.fault.step:
            self.write(fd, part)
            self.at("half written")
        return self.write(fd, data)

    def _sync(self, fd: int) -> None:
        if self._storage("fdatasync"):
            raise OSError(EIO, "Input/output error")
        self.at("before sync")
        self.sync(fd)
        self.at("after sync")

    def take_away(self) -> None:
        """Harm the ledger under its writer, with a copy kept aside for the repair."""
        if self.fault.kind != "ledger taken away" or self.done or self.step != self.fault.step:
            return
        self.done = True
        data, aside = self.ledger.read_bytes(), self.ledger.with_suffix(".kept")
        aside.write_bytes(data)
        self.tell("struck", self.fault.point)
        if self.fault.point == "removed":
            self.ledger.unlink()
        elif self.fault.point == "emptied":
            self.ledger.write_bytes(b"")
        else:
            other = self.ledger.with_suffix(".other")
            other.write_bytes(data)
            other.replace(self.ledger)


def _jump(source: random.Random) -> None:
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, lambda: source.uniform(-1e9, 1e10))
    for name in ("time_ns", "monotonic_ns", "perf_counter_ns"):
        setattr(time, name, lambda: source.randrange(-(10**18), 10**19))
