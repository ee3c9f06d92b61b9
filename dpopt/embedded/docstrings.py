# SPDX-License-Identifier: Apache-2.0
"""Docstrings of installed packages, read from their source files and never by importing them.

One record is one docstring of a function, a method or a class: a one-line header with its name and arguments,
a blank line, the cleaned text. Law: the records of a package depend on its source files alone, in the order of
their module names; a file that cannot be read, decoded or parsed gives no record.

Two records are *near duplicates* when they open with the same letters, or when at least half of the long lines
of one are lines of records seen before. `Fingerprints` holds what was seen as hashes, so the public text of the
embedded model is compared with private records without being shipped.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

MIN_CHARS = 80
MAX_CHARS = 2000
OPENING_CHARS = 80
LONG_LINE_CHARS = 24
HASH_BYTES = 6

_NOT_A_WORD = re.compile(r"[\W_]+")
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Docstring(NamedTuple):
    """One docstring: the module and qualified name it documents, its header and its cleaned text."""

    module: str
    name: str
    header: str
    text: str

    @property
    def record(self) -> str:
        """The header, a blank line and the text: what a language model is trained on."""
        return f"{self.header}\n\n{self.text}"


class Fingerprints:
    """Hashes of the openings and of the long lines of the texts seen so far."""

    def __init__(self, hashes: Iterable[bytes] = ()) -> None:
        """Start from the given hashes, or from nothing."""
        self._seen = set(hashes)

    def __len__(self) -> int:
        return len(self._seen)

    def resembles(self, text: str) -> bool:
        """Whether the text is a near duplicate of what was seen."""
        opening, lines = fingerprint(text)
        known = sum(line in self._seen for line in lines)
        return opening in self._seen or (bool(lines) and 2 * known >= len(lines))

    def add(self, text: str) -> None:
        """Record the text as seen."""
        opening, lines = fingerprint(text)
        self._seen.add(opening)
        self._seen.update(lines)

    def copy(self) -> "Fingerprints":
        """Fingerprints that grow apart from these."""
        return Fingerprints(self._seen)

    def to_bytes(self) -> bytes:
        """Return the hashes in ascending order, `HASH_BYTES` each."""
        return b"".join(sorted(self._seen))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Fingerprints":
        """Read what `to_bytes` wrote."""
        if len(data) % HASH_BYTES:
            raise ValueError(
                f"fingerprints must be whole hashes of {HASH_BYTES} bytes; got {len(data)} bytes; "
                "run python -m dpopt.embedded.pretrain to write the file again"
            )
        return cls(data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES))


def digest(text: str) -> bytes:
    """Return the hash of a text, `HASH_BYTES` long, the same on every machine."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=HASH_BYTES).digest()


def share(text: str) -> float:
    """Return a number in [0, 1) from the hash of a text, the same on every machine."""
    return int.from_bytes(digest(text)) / 256**HASH_BYTES


def fingerprint(text: str) -> tuple[bytes, frozenset[bytes]]:
    """Return the hash of the opening letters of a text, and the hashes of its long lines."""
    lines = [_NOT_A_WORD.sub("", line.lower()) for line in text.splitlines()]
    opening = "".join(lines)[:OPENING_CHARS]
    long_lines = frozenset(digest(line) for line in lines if len(line) >= LONG_LINE_CHARS)
    return digest("opening:" + opening), long_lines


def without_duplicates(docstrings: Iterable[Docstring], seen: Fingerprints) -> Iterator[Docstring]:
    """Yield the docstrings that resemble nothing in `seen` and no earlier docstring; `seen` grows with them."""
    for docstring in docstrings:
        if not seen.resembles(docstring.text):
            seen.add(docstring.text)
            yield docstring


def package_folder(package: str) -> Path:
    """Find the folder of the source files of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"docstrings are read from an installed package; got {package!r}, which is not installed; "
            f"pip install {package}, or pass packages= without it"
        )
    return Path(spec.submodule_search_locations[0])


def standard_library_folder() -> Path:
    """Find the folder of the source files of the Python standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(folder: Path, *, skip: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the (module, source) pairs of the Python files under a folder, by module; not under a name in `skip`."""
    paths = ((path.relative_to(folder), path) for path in folder.rglob("*.py"))
    for relative, path in sorted(pair for pair in paths if not skip.intersection(pair[0].parts)):
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield ".".join(relative.with_suffix("").parts), source


def docstrings_of(
    folder: Path, *, root: str = "", skip: frozenset[str] = frozenset(), min_chars: int = MIN_CHARS
) -> Iterator[Docstring]:
    """Yield the docstrings of the Python files under a folder, in order of module and line."""
    for module, source in source_files(folder, skip=skip):
        yield from parse_docstrings(source, f"{root}.{module}" if root else module, min_chars=min_chars)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: syntax trees are many objects without cycles, and a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse_docstrings(source: str, module: str, *, min_chars: int = MIN_CHARS) -> Iterator[Docstring]:
    """Yield the docstrings of one source text, in order of line; none when it does not parse."""
    if '"""' not in source and "'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node, name in _scopes(tree, ""):
        text = clean(ast.get_docstring(node, clean=False) or "")
        if len(text) >= min_chars:
            yield Docstring(module=module, name=name, header=_header(node, name), text=text)


def clean(text: str, *, max_chars: int = MAX_CHARS) -> str:
    """Remove indentation and trailing blanks, and cut the text at a line end within `max_chars`."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    if len(text) > max_chars:
        text = text[:max_chars].rpartition("\n")[0].rstrip()
    return text


def _scopes(
    tree: ast.AST, prefix: str
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, str]]:
    """Yield the functions and classes of a module with their qualified names; not those inside functions."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, _SCOPES):
            name = f"{prefix}{child.name}"
            yield child, name
            if isinstance(child, ast.ClassDef):
                yield from _scopes(child, f"{name}.")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _scopes(child, prefix)


def _header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    """Return the line that introduces a record: `class Name`, or `name(first, second, *rest)` without defaults."""
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"{name}({', '.join(argument for argument in names if argument not in ('self', 'cls'))})"
