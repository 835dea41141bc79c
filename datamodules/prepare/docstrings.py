"""Texts that every Python has: its language reference and the docstrings of its standard library."""

from __future__ import annotations

import ast
import contextlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def library_texts() -> dict[str, str]:
    """Name -> text: a chapter of the reference (``reference/while``), or all docstrings of a module (``zipfile``).

    Files are parsed, and nothing is run but the module that holds the reference. Other versions of Python have slightly
    other texts.
    """
    root, texts = Path(sysconfig.get_paths()["stdlib"]), dict[str, str]()
    for file in sorted(root.glob("*.py")):
        text = "\n\n".join(docstrings(ast.parse(file.read_text(encoding="utf-8"))))
        texts |= {file.stem: text} if text else {}
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        texts |= {f"reference/{name}": text for name, text in sorted(topics.items())}
    return texts


def docstrings(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Of a module or class and what it defines, in the order of the file.

    >>> list(docstrings(ast.parse("'''A.'''\\ndef f():\\n  'B.'\\nclass C:\\n  def g(self):\\n    'D.'")))
    ['A.', 'B.', 'D.']
    """
    yield from filter(None, [ast.get_docstring(node)])
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from docstrings(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from filter(None, [ast.get_docstring(child)])
