# SPDX-License-Identifier: Apache-2.0
"""The training loop that faults strike: a real one, of examples whose losses are zero.

So what is released is the noise alone, and noise that came twice shows.
"""

import os
import time
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from accountants import LedgerLocked
from dpopt import FlatClipper, GaussianMechanism, PoissonSampling, PrivateTraining
from tests.support.faults.catalogue import STEPS, Fault
from tests.support.faults.strikes import Striker, Tell, digest

RECORDS = 96
_BAD = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38}


class Watched:
    """A data set that knows which of its records were looked at."""

    def __init__(self, bad: float | None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(RECORDS, 3, generator=generator)
        if bad is not None:
            self.inputs[::3] = bad
        self.seen: list[int] = []

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> torch.Tensor:
        self.seen.append(index)
        return self.inputs[index]


def tiny() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def private_run(model: nn.Module, ledger: Path | None) -> PrivateTraining:
    return PrivateTraining(
        model,
        clipper=FlatClipper(1.0),
        mechanism=GaussianMechanism(1.0),
        sampling=PoissonSampling(0.5, RECORDS / 2),
        accountant_name="rdp",
        ledger=ledger,
    )


class Loop:
    """One run of `STEPS` steps on a ledger, with a fault armed; it tells all that it draws and releases."""

    def __init__(self, fault: Fault, ledger: Path, tell: Tell, pause: float = 0.0) -> None:
        self.fault, self.tell, self.pause = fault, tell, pause
        self.striker = Striker(fault, ledger, tell)
        self.model = tiny()
        self.data = Watched(_BAD.get(fault.point) if fault.kind == "bad example" else None)
        self.private = private_run(self.model, ledger)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def run(self) -> None:
        self.striker.arm()
        with self.private:
            self.tell("opened", os.getpid())
            if self.fault.kind == "break":
                self._steps(leave_after=self.fault.step)
            self._steps()

    def _steps(self, leave_after: int | None = None) -> None:
        for batch in self.private.batches(self.data, steps=STEPS):
            self._whole_step(batch.examples)
            if self.striker.step == leave_after:
                break

    def _whole_step(self, examples: tuple) -> None:
        self.striker.step += 1
        drawn, self.data.seen = self.data.seen, []
        self.tell("batch", sha256(repr(drawn).encode()).hexdigest()[:24])
        before = [p.grad for p in self.model.parameters()]
        try:
            self._step(examples)
        except BaseException:
            self._look(before)
            if not self.fault.go_on:
                raise
            self._answer(examples)

    def _answer(self, examples: tuple) -> None:
        """Run the same batch again where it was not released, as the documentation says; else take the next."""
        if self.private.sum.num_drawn is not None:
            self.private.discard()
            self._step(examples)

    def _look(self, before: list) -> None:
        """Tell of gradients of which a part is new."""
        new = [p.grad is not old for p, old in zip(self.model.parameters(), before, strict=True)]
        gone = [p.grad is None for p in self.model.parameters()]
        if any(new) and not all(new) and not all(gone):
            self.tell("half", str(new))

    def _step(self, examples: tuple) -> None:
        self.striker.at("in forward")
        self._fork("in forward")
        if examples:
            outputs = self.model(torch.stack(examples))
            losses = outputs.sum(1) * 0.0
            losses.register_hook(lambda gradient: self.striker.at("in backward"))
            self.private.accumulate(losses)
        self._fork("before charge")
        self.private.release()
        gradients = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.tell("written", digest(gradients))
        if not gradients.isfinite().all():
            self.tell("not finite", True)
        self.striker.at("between steps")
        self._fork("between steps")
        self.optimizer.step()
        self.striker.take_away()
        time.sleep(self.pause)

    def _fork(self, point: str) -> None:
        """A child of the run must be able to neither charge nor release."""
        fault = self.fault
        if fault.kind != "fork" or fault.point != point or self.striker.step != fault.step:
            return
        child = os.fork()
        if child == 0:
            self._forked()
        os.waitpid(child, 0)

    def _forked(self) -> None:
        try:
            if self.private.sum.num_drawn is None:
                self.private.sum.begin(self.private.draw(RECORDS) and 1)
            for use in (self.private.release, lambda: self.private.ledger.charge(self.private.event)):
                try:
                    use()
                    self.tell("forked use", "released or charged")
                except (RuntimeError, LedgerLocked):
                    self.tell("refused", "fork")
        finally:
            os._exit(0)
