# SPDX-License-Identifier: Apache-2.0
"""Reading docstrings from source text, and telling near duplicates."""

from pathlib import Path

import pytest

from dpopt.embedded.docstrings import (
    HASH_BYTES,
    Docstring,
    Fingerprints,
    clean,
    docstrings_of,
    parse_docstrings,
    share,
    without_duplicates,
)
from dpopt.embedded.public import comments, topics

SOURCE = '''
class Shape(Base):
    """A shape.

        It has a boundary.
    """

    def area(self, unit, /, *others, scale=1, **options):
        """Return the area of the shape in the given unit."""
        def inner():
            """Never read, since it is inside a function."""

if True:
    async def wait(seconds: float = 1.0) -> None:
        """Wait for the given number of seconds."""
'''


def test_functions_methods_and_classes_are_read() -> None:
    found = list(parse_docstrings(SOURCE, "geometry", min_chars=5))
    assert [docstring.header for docstring in found] == [
        "class Shape",
        "Shape.area(unit, *others, scale, **options)",
        "wait(seconds)",
    ]
    assert found[0].text == "A shape.\n\nIt has a boundary."
    assert found[2].record == "wait(seconds)\n\nWait for the given number of seconds."


def test_short_docstrings_and_broken_sources_give_nothing() -> None:
    assert list(parse_docstrings(SOURCE, "geometry", min_chars=1000)) == []
    assert list(parse_docstrings('def broken(:\n    """Text."""', "geometry", min_chars=1)) == []


def test_unreadable_files_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b'def f():\n    """caf\xe9 \xff"""\n')
    (tmp_path / "null.py").write_bytes(b'def f():\n    """a\x00b"""\n')
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "more.py").write_text(SOURCE)
    (tmp_path / "good.py").write_text(SOURCE)
    found = list(docstrings_of(tmp_path, root="top", skip=frozenset({"tests"}), min_chars=5))
    assert {docstring.module for docstring in found} == {"top.good"}


def test_long_text_is_cut_at_a_line_end() -> None:
    text = clean("First line.\n    second\n\n\n\n    third   \n", max_chars=14)
    assert text == "First line."
    assert clean("a\n\n\n\n\nb ") == "a\n\nb"


def test_near_duplicates_are_dropped() -> None:
    lines = [f"this is the long line of text number {number}." for number in "abcdef"]
    first, reflowed = "\n".join(lines), " ".join(lines).upper()
    half = "\n".join(["A new opening that was not seen before.", *lines[:3]])
    new = "\n".join(["Another opening that was not seen either.", "a second line that nobody saw.", lines[5]])
    texts = [Docstring("m", "f", "f()", text) for text in (first, reflowed, half, new)]
    assert [docstring.text for docstring in without_duplicates(texts, Fingerprints())] == [first, new]


def test_fingerprints_survive_bytes() -> None:
    seen = Fingerprints()
    seen.add("Return the number of items that were seen.")
    again = Fingerprints.from_bytes(seen.to_bytes())
    assert len(again) == len(seen) == len(seen.to_bytes()) // HASH_BYTES
    assert again.resembles("return the number of items, that were seen")
    with pytest.raises(
        ValueError, match=r"fingerprints must be whole hashes of 6 bytes; got 5 bytes; run python"
    ):
        Fingerprints.from_bytes(b"12345")


def test_share_is_the_same_everywhere() -> None:
    assert share("networkx") == share("networkx")
    assert 0.4 < sum(share(str(number)) for number in range(500)) / 500 < 0.6


def test_comments_and_topics_are_read() -> None:
    block = "".join(
        f"    # line {number} of a comment that explains something at length\n" for number in range(3)
    )
    assert [text.splitlines()[0] for text in comments(f"x = 1\n{block}y = 2  # short\n")] == [
        "line 0 of a comment that explains something at length"
    ]
    assert [(topic.module, topic.text) for topic in topics("topics = {'if': 'The if statement.'}")] == [
        ("topics.if", "The if statement.")
    ]
