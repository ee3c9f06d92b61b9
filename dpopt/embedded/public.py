# SPDX-License-Identifier: Apache-2.0
"""The public text of the embedded model: the standard library of the running Python, and nothing else.

Four kinds of document, all read from source files: docstrings (as records), the topics of `help()`, blocks of
comments, and source code. Law: no document comes from an installed package; `public_fingerprints()` holds the
fingerprints of all documents that the shipped model was trained on, whatever Python reads them back.
"""

import ast
import re
from collections.abc import Iterator
from importlib import resources
from typing import Literal, NamedTuple

from dpopt.embedded.docstrings import (
    Fingerprints,
    clean,
    docstrings_of,
    share,
    source_files,
    standard_library_folder,
    without_duplicates,
)

FINGERPRINTS_FILE = "public.fingerprints"
HELD_OUT_SHARE = 0.04
MIN_DOCSTRING_CHARS = 20
MIN_COMMENT_CHARS = 120
MAX_SOURCE_CHARS = 120_000

_NOT_PUBLIC = frozenset({"site-packages", "dist-packages"})
_NOT_CODE = _NOT_PUBLIC | {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "turtledemo"}
_COMMENTS = re.compile(r"(?:^[ \t]*#(?!!).*\n){2,}", re.MULTILINE)

Kind = Literal["docstring", "topic", "comment", "source"]


class Document(NamedTuple):
    """One public text, its kind, and the module it was read from."""

    kind: Kind
    module: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is kept from pretraining to measure the model; one answer for a whole module."""
        return share("held out:" + self.module) < HELD_OUT_SHARE


def public_documents() -> Iterator[Document]:
    """Yield the documents of the standard library, by kind and then by module; docstrings without near duplicates."""
    folder = standard_library_folder()
    docstrings = docstrings_of(folder, skip=_NOT_PUBLIC, min_chars=MIN_DOCSTRING_CHARS)
    for docstring in without_duplicates(docstrings, Fingerprints()):
        yield Document("docstring", docstring.module, docstring.record)
    for module, source in source_files(folder, skip=_NOT_PUBLIC):
        if module == "pydoc_data.topics":
            yield from topics(source)
        for comment in comments(source):
            yield Document("comment", module, comment)
    for module, source in source_files(folder, skip=_NOT_CODE):
        if len(source) <= MAX_SOURCE_CHARS:
            yield Document("source", module, source)


def topics(source: str) -> Iterator[Document]:
    """Yield the topics of `help()`, each a module of its own for `held_out`; none when the table is not a literal."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for title, text in ast.literal_eval(node.value).items():
                yield Document("topic", f"topics.{title}", clean(text, max_chars=len(text)))


def comments(source: str) -> Iterator[str]:
    """Yield the blocks of at least two comment lines of a source text, without their marks."""
    for block in _COMMENTS.findall(source):
        lines = [re.sub(r"^[ \t]*#+ ?", "", line) for line in block.splitlines()]
        text = clean("\n".join(lines))
        if len(text) >= MIN_COMMENT_CHARS:
            yield text


def public_fingerprints() -> Fingerprints:
    """Read the fingerprints of the public text of the shipped model, anew at each call and so free to grow."""
    file = resources.files("dpopt.embedded") / "model" / FINGERPRINTS_FILE
    return Fingerprints.from_bytes(file.read_bytes())
