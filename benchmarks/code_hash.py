"""A hash of programs that comments, docstrings and layout do not change.

Results carry the one of what they measured, so that the READMEs can say which are of
older code. Imports nothing that a machine with a GPU may lack.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json


def skeleton(node) -> object:
    """A syntax tree as lists, without docstrings, the same in each Python version."""
    if isinstance(node, list):
        return [
            skeleton(x)
            for x in node
            if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))
        ]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [pair for pair in ast.iter_fields(node) if pair[1] not in (None, [])]
    return [type(node).__name__, *([name, skeleton(value)] for name, value in fields)]


def code_hash(sources: list[str]) -> str:
    """Hash of Python programs that comments, docstrings and layout do not change."""
    return hash_of(tuple(sources))


@functools.cache  # 0.3 s each
def hash_of(sources: tuple[str, ...]) -> str:
    """What code_hash() gives."""
    trees = [skeleton(ast.parse(source)) for source in sources]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:16]
