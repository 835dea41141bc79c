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
    """Return name -> text: a chapter of the reference (``reference/while``), or a module's docstrings (``zipfile``).

    Files are parsed and not run, except for the module that holds the reference. Other versions of Python have slightly
    different texts.
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
    """Yield the docstrings of a module or class and of what it defines, in the order of the file.

    >>> list(docstrings(ast.parse("'''A.'''\\ndef f():\\n  'B.'\\nclass C:\\n  def g(self):\\n    'D.'")))
    ['A.', 'B.', 'D.']
    """
    yield from filter(None, [ast.get_docstring(node)])
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from docstrings(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from filter(None, [ast.get_docstring(child)])
