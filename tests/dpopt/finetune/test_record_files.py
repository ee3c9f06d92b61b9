# SPDX-License-Identifier: Apache-2.0
"""Files become records, one for one; what cannot be read is refused with its place and a remedy."""

from pathlib import Path

import pytest

from dpopt.finetune.record_files import (
    InputError,
    RecordFormat,
    Template,
    TextRecord,
    read_records,
    refuse_overlap,
    refuse_repeated,
)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_each_format_gives_one_record_per_row(tmp_path: Path) -> None:
    expected = [TextRecord("", "first, one"), TextRecord("", 'second "two"')]
    rows = '{"text": "first, one", "other": 1}\r\n{"text": "second \\"two\\""}'
    assert read_records([written(tmp_path, "a.jsonl", rows)]) == expected
    table = '\ufefftext,other\n"first, one",1\n"second ""two""",2\n'
    assert read_records([written(tmp_path, "a.csv", table)]) == expected
    assert read_records([written(tmp_path, "a.txt", 'first, one\nsecond "two"\n')]) == expected


def test_only_a_line_feed_ends_a_record(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "one\u2028still one\x0cand still\ntwo")
    assert [record.text for record in read_records([path])] == ["one\u2028still one\x0cand still", "two"]
    path = written(tmp_path, "a.csv", 'text,n\n"two\nlines",1\n')
    assert [record.text for record in read_records([path])] == ["two\nlines"]


def test_files_are_read_in_order_with_their_duplicates(tmp_path: Path) -> None:
    first, second = written(tmp_path, "a.txt", "x\ny\n"), written(tmp_path, "b.txt", "x\n")
    assert [record.text for record in read_records([second, first])] == ["x", "x", "y"]


def test_templates_join_fields(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"q": "How {many}?", "a": 3}\n')
    form = RecordFormat(Template(" {a}!"), Template("{{{q}}}"))
    assert read_records([path], form) == [TextRecord("{How {many}?}", " 3!")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", r"expected a file ending in .jsonl, .csv, .txt; got .*a.json; convert it"),
        ("a.txt", "", r"expected at least one record in .*a.txt; got none; check the file"),
        ("a.txt", "a\n\nb\n  \n", r"got 2 empty \(line 2, 4\); remove these lines"),
        ("a.txt", b"good\nb\xe9d\n", r"expected UTF-8 in .*a.txt; got the byte 0xe9 in line 2; convert"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"got Expecting value in .*a.jsonl, line 2; correct"),
        ("a.jsonl", "[1]\n", r"expected a JSON object in .*line 1; got a list; write"),
        (
            "a.jsonl",
            '{"body": "a"}\n',
            r"expected the field 'text' in .*line 1; got the fields \['body'\]; pass",
        ),
        ("a.jsonl", '{"text": null}\n', r"in the field 'text' of .*line 1; got NoneType; correct"),
        ("a.jsonl", '{"text": "a"}\n\n', r"got 1 empty \(line 2\); remove"),
        ("a.csv", "text,b\n1,2\n3\n", r"expected 2 columns in .*line 3; got 1; quote"),
        ("a.csv", "text,text\n1,2\n", r"expected a first line with one name per column"),
        ("a.csv", 'text,b\n"1,2\n', r"expected CSV in .*; got 'unexpected end of data' in the row .* line 2"),
        ("a.csv", "name,b\n1,2\n", r"expected the field 'text' in .*line 2; got the fields \['b', 'name'\]"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_records([written(tmp_path, name, content)])


def test_errors_do_not_quote_records(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "a secret" oops}\n')
    with pytest.raises(InputError) as caught:
        read_records([path])
    assert "secret" not in str(caught.value)


def test_missing_and_repeated_files_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "x\n")
    with pytest.raises(InputError, match=r"expected a file at .*none.txt; got none; check the path"):
        read_records([tmp_path / "none.txt"])
    with pytest.raises(InputError, match=r"expected each file once; got .* twice; name it once"):
        refuse_repeated([path, tmp_path / "b" / ".." / "a.txt"])
    with pytest.raises(InputError, match=r"expected a readable file at .*; got Is a directory"):
        (tmp_path / "folder.txt").mkdir()
        read_records([tmp_path / "folder.txt"])


def test_fields_of_text_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected no fields for a .txt file"):
        read_records([written(tmp_path, "a.txt", "x\n")], RecordFormat())


def test_validation_records_in_the_training_data_are_refused() -> None:
    a, b = TextRecord("", "a"), TextRecord("", "b")
    refuse_overlap([a], [b])
    with pytest.raises(InputError, match=r"not in the training data; got 1 that are; remove them"):
        refuse_overlap([a], [a, b])


@pytest.mark.parametrize("pattern", ["{a", "{a.b}", "{a[0]}", "{a!r}", "{a:5}", "{}"])
def test_templates_with_more_than_names_are_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=r"expected"):
        Template(pattern)
