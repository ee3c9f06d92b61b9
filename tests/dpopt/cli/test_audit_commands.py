# SPDX-License-Identifier: Apache-2.0
"""`dpopt audit RUN`: from what a run left in its folder to a verdict, a report and an exit code."""

import html
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dpopt import FlatClipper, GaussianMechanism, PoissonSampling, PrivateTraining
from dpopt.audit import Canaries, Evidence
from dpopt.audit.reports import audit_run
from dpopt.cli.commands import app

NUM = 200


def trained(folder, noise, seed=3):
    mechanism = GaussianMechanism(noise)
    model = nn.Linear(2 + NUM, 1)
    audit = Canaries(NUM, where={"weight": range(2, 2 + NUM)}, untouched=True)
    private = PrivateTraining(
        model, clipper=FlatClipper(1.0), mechanism=mechanism, sampling=PoissonSampling(1.0, 4.0),
        ledger=folder / "privacy.ledger.jsonl", audit=audit, insecure_seed=seed,
    )  # fmt: skip
    data = list(torch.cat((torch.ones(4, 2), torch.zeros(4, NUM)), 1))
    with private:
        for batch in private.batches(data, steps=3):
            private.accumulate((model(torch.stack(batch.examples)).squeeze(1) - 1).square())
            private.release()
    return folder


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("honest"), 3.0)


def audited(*args):
    return CliRunner().invoke(app, ["audit", *map(str, args)])


def told(result):
    return " ".join((result.output + result.stderr).split())


def test_an_honest_run(honest):
    result = audited(honest, "--delta", "1e-5")
    assert result.exit_code == 0, result.output
    assert "Not refuted" in told(result)
    data = json.loads((honest / "audit.json").read_text())
    assert any("seed" in text for text in data["claim"]["assumptions"])
    assert data["claim"]["delta"] == 1e-5 and data["verdict"]["exit_code"] == 0
    assert (honest / "audit.html").read_text().startswith("<!doctype html>")


def test_the_report_of_the_run_tells_of_its_last_audit(honest):
    from dpopt.reports.report import page

    own = honest / "report.html"
    own.write_text(page("A run", ["<h1>A run</h1>"]))
    for _ in range(2):
        assert audited(honest, "--delta", "1e-5").exit_code == 0
    text = own.read_text()
    assert (
        text.count("<h2>Audit</h2>") == 1
        and 'href="audit.html"' in text
        and text.endswith("</body></html>\n")
    )
    assert json.loads((honest / "audit.json").read_text())["verdict"]["sentence"] in html.unescape(text)
    own.unlink()


def test_two_runs_and_another_folder(honest, tmp_path):
    other = trained(tmp_path / "other", 3.0, seed=4)
    result = audited(
        "run", honest, other / "privacy.ledger.jsonl", "--delta", "1e-5", "--out", tmp_path / "new"
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "new" / "audit.json").read_text())["evidence"][0]["num_records"] == 2 * NUM


def test_a_run_counts_once(honest):
    result = audited(honest, honest / "privacy.ledger.jsonl", "--delta", "1e-5")
    assert result.exit_code == 2 and "name each run once" in told(result)


def test_the_delta_of_the_report_is_taken(honest, tmp_path):
    result = audited(honest)
    assert result.exit_code == 2 and "--delta 1e-5" in told(result)
    (honest / "report.json").write_text('{"delta": 1e-6}')
    try:
        assert audited(honest, "--out", tmp_path).exit_code == 0
    finally:
        (honest / "report.json").unlink()
    assert json.loads((tmp_path / "audit.json").read_text())["claim"]["delta"] == 1e-6


def test_less_noise_than_recorded_is_refuted(tmp_path, monkeypatch):
    real = GaussianMechanism.release

    def quiet(self, *arguments):
        return real(GaussianMechanism(0.6), *arguments)

    monkeypatch.setattr(GaussianMechanism, "release", quiet)
    result = audited(trained(tmp_path, 3.0), "--delta", "1e-5")
    assert result.exit_code == 1, result.output
    assert "Refuted" in told(result) and "NOT as it must" in told(result)


def test_a_huge_claim_is_beyond_the_power_of_few_canaries(tmp_path, honest, monkeypatch):
    whole = audit_run.read_evidence

    def few(ledger):
        one = whole(ledger)[0]
        return (Evidence(one.scores[:30], one.included[:30], "loss"),)

    monkeypatch.setattr(audit_run, "read_evidence", few)
    result = audited(honest, "--delta", "1e-5", "--out", tmp_path)
    assert result.exit_code == 3, result.output
    assert "No power" in told(result)


def test_a_run_without_canaries_is_refused_with_the_way(tmp_path):
    result = audited(tmp_path, "--delta", "1e-5")
    assert result.exit_code == 2 and "dpopt finetune --audit canaries=1000" in told(result)
    assert audited(tmp_path / "nowhere").exit_code == 2
    (tmp_path / "x.jsonl").write_text("")
    result = audited(tmp_path / "x.jsonl", "--delta", "1e-5")
    assert result.exit_code == 2 and "canaries=1000" in told(result)
    assert not (tmp_path / "audit.json").exists()
