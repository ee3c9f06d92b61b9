# SPDX-License-Identifier: Apache-2.0
"""Lines as they are read: each in one way only, each checked, and equal events once."""

import hashlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import accountants.records as records_module
from accountants import (
    Composed,
    Gaussian,
    Ledger,
    LedgerCorrupt,
    PoissonSampled,
    Repeated,
    charged,
    from_dict,
    leaves,
    read,
    to_dict,
    verify,
)
from accountants.records import Chain, following, parse, to_line

STEP = PoissonSampled(0.01, Gaussian(1.0))
EVENT = to_dict(STEP)


def _chain(*payloads, kind="charge"):
    last = following(
        None, "header", {"format": 1, "id": "x", "unit": "record", "relation": "add-or-remove-one"}
    )
    lines = [to_line(last)]
    for payload in payloads:
        last = following(last, kind, payload)
        lines.append(to_line(last))
    return lines


def _resealed(line, old, new):
    """The line with a part replaced and its own hash computed again: only the form of it is wrong."""
    assert old in line
    body = line.replace(old, new, 1)[:-76] + b"}"
    return body[:-1] + b',"hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def test_sealing_anew_is_what_a_ledger_does():
    header, line = _chain({"event": EVENT, "context": {"step": 1}})
    assert _resealed(line, b'"step":1', b'"step":1') == line
    assert len(parse(header + _resealed(line, b'"step":1', b'"step":2'), "here")[0]) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"context":{"step":1}', b'"context":{"step": 1}'),
        (b'"context":{"step":1}', b'"context":{"step":1.0e0}'),
        (b'"context":{"step":1}', b'"context":{"step":NaN}'),
        (b'"context":{"step":1}', b'"context":{"step":1,"step":1}'),
        (b'"context":{"step":1}', b'"context":{"step":"\xc3\xa9"}'),
        (b'"context":{"step":1}', b'"context":{"step":1},"context":{"step":1}'),
        (b'"context":{"step":1}', b'"context":{"step":-0}'),
        (b'"context":{"step":1}', b'"context":' + b"[" * 5000 + b"]" * 5000),
        (b'"context":{"step":1}', b'"context":{"step":' + b"9" * 5000 + b"}"),
        (b'"sampling_rate":0.01', b'"sampling_rate":1e-2'),
        (b'"sampling_rate":0.01', b'"sampling_rate":0.01,"sampling_rate":0.01'),
        (b'"sampling_rate":0.01', b'"sampling_rate":1.5'),
        (b'"kind":"Gaussian"', b'"kind":"Laplace"'),
        (b'"noise_multiplier":1.0', b'"noise_multiplier":true'),
        (b'"noise_multiplier":1.0', b'"noise_multiplier":"1.0"'),
        (b'"noise_multiplier":1.0', b'"noise_multiplier":' + b"9" * 400),
        (b'"seq":1,', b'"seq":01,'),
        (b'"seq":1,', b'"seq":2,'),
        (b'"seq":1,', b'"seq":1.0,'),
        (b'"kind":"charge"', b'"kind":"spend"'),
        (b'"kind":"charge"', b'"kind":"header"'),
        (b'{"seq":1,"kind":"charge"', b'{"kind":"charge","seq":1'),
        (b'"event":{', b'"offer":{'),
        (b'"prev":"', b'"prev":"f'),
        (b'{"seq"', b' {"seq"'),
    ],
)  # fmt: skip
def test_a_line_in_another_form_is_refused_whatever_its_hash(tmp_path, old, new):
    header, *lines = _chain(*({"event": EVENT, "context": {"step": step}} for step in (0, 1, 2)))
    first = lines[0].replace(b'"step":0', b'"step":1') if old.startswith(b'"context"') else lines[0]
    line = _resealed(first, old, new)
    path = tmp_path / "ledger"
    for data in (header + line, header + line + lines[1]):
        path.write_bytes(data)
        for ask in (read, verify, Ledger.open):
            with pytest.raises(LedgerCorrupt, match="must be an unbroken chain of records; got line 2: "):
                ask(path)
    # and after an equal event was read: parts that were seen before are compared, not taken for granted
    same = to_line(
        following(parse(header + lines[0], "here")[0][-1], "charge", {"event": EVENT, "context": {"step": 1}})
    )
    if old in same:
        path.write_bytes(header + lines[0] + _resealed(same, old, new))
        with pytest.raises(LedgerCorrupt, match="got line 3: "):
            read(path)


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ({"kind": "Gaussian", "noise_multiplier": 10**400}, "at most 1e308; got an integer of 1329 bits"),
        (
            {"kind": "Repeated", "event": EVENT, "count": 10**400},
            "count must be an integer >= 0, at most 1e308",
        ),
        (
            {"kind": "FixedSize", "batch_size": 1, "num_records": 10**400, "event": EVENT},
            "num_records must be",
        ),
        ({"kind": "Composed", "events": [[EVENT]]}, "an event must be a mapping with a 'kind'"),
        ({"kind": "Composed", "events": EVENT}, "events must be a tuple of events"),
        ({"kind": "Composed", "events": [], "relations": "x"}, "must have exactly the fields"),
        (None, "a charge without an event"),
    ],
)
def test_events_beyond_all_numbers_are_refused_by_line(event, told):
    with pytest.raises(LedgerCorrupt, match=f"got line 2: .*{told}"):
        parse(b"".join(_chain({"event": event, "context": {}})), "here")


@pytest.mark.parametrize("depth", [98, 400, 700])
def test_nests_are_read_or_refused_by_line(depth):
    nest = EVENT
    for _ in range(depth):
        nest = {"kind": "Repeated", "event": nest, "count": 1}
    data = b"".join(_chain({"event": nest, "context": {}}))
    if depth < 100:
        assert leaves(charged(parse(data, "here")[0])) == ((STEP, 1),)
        return
    with pytest.raises(
        LedgerCorrupt, match=r"got line 2: events must be nested at most 100 deep; got a deeper nest"
    ):
        parse(data, "here")


def test_what_can_be_charged_can_be_read(tmp_path):
    """A nest at the limit goes to disk and comes back; one beyond it never gets there."""
    nest = STEP
    for _ in range(98):
        nest = Repeated(nest, 1)
    path = tmp_path / "ledger"
    with Ledger.open(path) as ledger:
        ledger.charge(nest)
        with pytest.raises(ValueError, match="nested at most 100 deep"):
            ledger.charge(Composed((nest,)))
    with Ledger.open(path) as ledger:
        assert leaves(ledger.events()) == ((STEP, 1),)


CONTEXTS = st.dictionaries(
    st.text(max_size=5),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    max_size=3,
)
EVENTS = st.sampled_from(
    [STEP, Gaussian(2.0), Repeated(STEP, 3), Composed((STEP, Gaussian(0.1))), Composed((), relation="a,\"context\":b")]
)  # fmt: skip


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(EVENTS, CONTEXTS), max_size=6))
def test_every_ledger_is_read_back_as_it_was_written(charges):
    lines = _chain(*({"event": to_dict(event), "context": context} for event, context in charges))
    records, torn = parse(b"".join(lines), "here")
    assert torn == b"" and [to_line(record) for record in records] == lines
    for record, (event, context) in zip(records[1:], charges, strict=True):
        assert (record.event, record.payload["context"]) == (event, context)
        assert record.payload["event"] == to_dict(event)
    assert sum(event.count for event in charged(records).events) == len(charges)
    cut = b"".join(lines)[:-7]
    assert parse(cut, "here")[1] == lines[-1][:-7] if len(lines) > 1 else True


def test_equal_events_are_parsed_once(tmp_path, monkeypatch):
    path, asked = tmp_path / "ledger", []
    path.write_bytes(b"".join(_chain(*({"event": EVENT, "context": {"step": i}} for i in range(500)))))
    monkeypatch.setattr(records_module, "from_dict", lambda data: asked.append(data) or from_dict(data))
    history = read(path)
    assert len(asked) == 1
    assert len({id(record.event) for record in history.records[1:]}) == 1
    assert dict(leaves(history.events())) == {STEP: 500}
    assert [record.payload["context"] for record in history.records[1:]] == [{"step": i} for i in range(500)]
    with Ledger.open(path) as ledger:
        assert len(asked) == 2
        assert ledger.num_charges == 500


def test_a_chain_is_read_line_by_line():
    """The first record is there before the second line was asked for: nothing waits for the whole file."""
    lines = _chain({"event": EVENT, "context": {}}, {"event": EVENT, "context": {}})
    given_lines = []

    def source():
        for line in lines:
            given_lines.append(line)
            yield line

    records = Chain("here").records(source())
    assert next(records).kind == "header" and len(given_lines) == 1
    assert next(records).event == STEP and len(given_lines) == 2


def test_the_format_of_a_line_is_that_of_old():
    """Pinned: ledgers outlive versions."""
    line = _chain({"event": EVENT, "context": {"step": 1}})[1]
    told = json.loads(line)
    body = {key: told[key] for key in ("seq", "kind", "payload", "prev")}
    assert list(told) == ["seq", "kind", "payload", "prev", "hash"]
    assert told["hash"] == hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
    assert (
        b'"payload":{"event":{"kind":"PoissonSampled","sampling_rate":0.01,"event":{"kind":"Gaussian",'
        in line
    )
