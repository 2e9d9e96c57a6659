"""Copies of a function never drift apart, and no script needs another.

    python tests/test_copies.py --fix algos/grpo.py

copies what differs from the named file into all other scripts.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ALGOS = Path(__file__).resolve().parent.parent / "algos"
SCRIPTS = sorted(ALGOS.glob("*.py"))
EXEMPT = {"Args", "main", "train", "OWN"}


def definitions(source: str) -> dict[str, tuple[int, int]]:
    """Where each top-level function, class and constant stands: name -> first line and
    line after the last, with its decorators and the comments directly above it."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            tuples = (ast.Tuple, ast.List)
            parts = [x.elts if isinstance(x, tuples) else [x] for x in targets]
            names = [ast.unparse(x) for part in parts for x in part]
        else:
            continue
        decorators = getattr(node, "decorator_list", [])
        start = min([node.lineno, *(x.lineno for x in decorators)]) - 1
        while (
            start
            and lines[start - 1].startswith("#")
            and "-----" not in lines[start - 1]
        ):
            start -= 1
        end = node.end_lineno
        while end < len(lines) and lines[end].startswith(" "):
            end += 1  # a comment after the last statement of the body
        found |= dict.fromkeys(names, (start, end))
    return found


def own(source: str) -> set[str]:
    """The names in the script's OWN tuple, whose text may differ."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OWN":
            return set(ast.literal_eval(node.value))
    return set()


def drifted(a: str, b: str) -> list[str]:
    """Names that stand in both sources with different texts, in the order of a."""
    places, lines = [definitions(x) for x in (a, b)], [x.splitlines() for x in (a, b)]
    shared = [name for name in places[0] if name in places[1]]
    texts = [
        {name: own_lines[slice(*place[name])] for name in shared}
        for place, own_lines in zip(places, lines)
    ]
    free = EXEMPT | own(a) | own(b)
    return [x for x in shared if texts[0][x] != texts[1][x] and x not in free]


def fix(master: Path, others: list[Path]) -> list[str]:
    """Copy what differs from the master into the others; says what it changed."""
    changed, source = [], master.read_text("utf-8")
    places, lines = definitions(source), source.splitlines()
    for path in others:
        text = path.read_text("utf-8")
        for name in drifted(source, text):
            if name not in drifted(source, text):
                continue  # two names of one statement
            start, end = definitions(text)[name]
            copy = text.splitlines()
            copy[start:end] = lines[slice(*places[name])]
            text = "\n".join(copy) + "\n"
            changed.append(f"{path.name}: {name}")
        path.write_text(text, "utf-8")
    return changed


def check(paths: list[Path]) -> list[str]:
    """Every drift between two of the files."""
    sources = {path: path.read_text("utf-8") for path in paths}
    return [
        f"{name} differs in {a.name} and {b.name}"
        for i, a in enumerate(paths)
        for b in paths[i + 1 :]
        for name in drifted(sources[a], sources[b])
    ]


def imports(source: str) -> set[str]:
    """The modules that a source imports, first part of the name; '' for a relative
    one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add("" if node.level else node.module.partition(".")[0])
    return found


def test_copies_of_a_function_drift_apart():
    """A bug fixed in one script and left in its copies is the price of single-file code
    (in vwxyzjn/cleanrl a fix is repeated by hand): what has one name has one text. To
    mend it: python tests/test_copies.py --fix algos/<the right one>.py"""
    assert SCRIPTS
    assert not check(SCRIPTS)
    for path in SCRIPTS:  # a name in OWN that no longer exists protects the wrong thing
        source = path.read_text("utf-8")
        assert own(source) <= definitions(source).keys(), path.name


def test_script_imports_another_file_of_the_repository():
    """A script that needs a second file cannot be copied."""
    folders = [ALGOS.parent / name for name in ("algos", "benchmarks", "tests")]
    ours = {path.stem for folder in folders for path in folder.rglob("*.py")} | {""}
    ours -= sys.stdlib_module_names  # a task called math.py is not what they import
    ours |= {folder.name for folder in folders}
    for path in SCRIPTS:
        assert not imports(path.read_text("utf-8")) & ours, path.name
    assert imports("import a.b, c\nfrom .d import e\nfrom f.g import h") == {
        "a", "c", "", "f"
    }  # fmt: skip


def test_line_is_too_wide_to_be_read_beside_another():
    """Two scripts beside each other: 88 columns each."""
    for path in SCRIPTS:
        wide = [
            (number, line)
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
            if len(line) > 88
        ]
        assert not wide, path.name


ONE = '''
"""One."""

OWN = ("special",)
A, B = 1, 2  # both
TABLE = {"x": 1}
TABLE["y"] = 2


# why it is there
@staticmethod
def shared(x):
    """Doc."""
    return x + 1  # plus one
    # the end


# ---------- banner ----------


class Thing:
    size: int = 1


def special():
    return 1


def train():
    return 1


def only_here():
    return 1
'''
DRIFTS = {
    "code": ("x + 1", "x + 2", "shared"),
    "a comment inside": ("# plus one", "# add one", "shared"),
    "a comment above": ("# why it is there", "# why", "shared"),
    "a comment at the end": ("    # the end", "    # end", "shared"),
    "a docstring": ("Doc.", "Docs.", "shared"),
    "a decorator": ("@staticmethod", "@classmethod", "shared"),
    "a class": ("size: int = 1", "size: int = 2", "Thing"),
    "one of two constants": ("A, B = 1, 2", "A, B = 1, 3", "A"),
    "a constant alone": ("A, B = 1, 2", "B = 2", "B"),
    "an item of a constant": ('TABLE["y"] = 2', 'TABLE["y"] = 3', "TABLE['y']"),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_drift_is_not_seen_or_not_mended(tmp_path, name):
    """Code and comments both count; --fix mends what differs and nothing else, in
    place, and says so."""
    before, after, what = DRIFTS[name]
    assert before in ONE
    copy = "import os\n\n" + ONE.replace(before, after)
    copy = copy.replace("def special():\n    return 1", "def special():\n    return 2")
    copy = copy.replace("def train():\n    return 1", "def train():\n    return 3")
    copy = copy.replace("def only_here", "def only_there")
    (tmp_path / "one.py").write_text(ONE)
    (tmp_path / "two.py").write_text(copy)
    (tmp_path / "three.py").write_text(ONE)
    paths = [tmp_path / f"{x}.py" for x in ("one", "two", "three")]
    found = check(paths)
    assert f"{what} differs in one.py and two.py" in found
    assert f"{what} differs in two.py and three.py" in found
    assert not any("special" in x or "train" in x or "only" in x for x in found)
    command = [sys.executable, __file__, "--fix", str(paths[0])]
    if name == "code":  # the command line once, what it calls for all others
        process = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert process.stdout == "two.py: shared\n" and process.returncode == 0
    else:
        assert f"two.py: {what}" in fix(paths[0], paths[1:])
    assert not check(paths) and not fix(paths[0], paths[1:])
    mended = copy.replace(after, before, 1)
    assert (tmp_path / "two.py").read_text() == mended
    assert (
        (tmp_path / "one.py").read_text() == ONE == (tmp_path / "three.py").read_text()
    )


def test_name_of_its_own_is_overwritten(tmp_path):
    """OWN of either script exempts a name, Args, train and main are always exempt."""
    two = ONE.replace("x + 1", "x + 2").replace('("special",)', '("shared",)')
    two = two.replace("def special():\n    return 1", "def special():\n    return 2")
    (tmp_path / "one.py").write_text(ONE)
    (tmp_path / "two.py").write_text(two)
    paths = [tmp_path / "one.py", tmp_path / "two.py"]
    assert not check(paths) and not fix(*paths[:1], paths[1:])
    assert (tmp_path / "two.py").read_text() == two


def main() -> None:
    """--fix FILE copies from it into the other scripts of its folder; without a flag
    the drifts are listed."""
    if len(sys.argv) == 3 and sys.argv[1] == "--fix" and Path(sys.argv[2]).is_file():
        master = Path(sys.argv[2]).resolve()
        others = [x for x in sorted(master.parent.glob("*.py")) if x != master]
        changed = fix(master, others)
        print("\n".join(changed) or "nothing differs")
    elif len(sys.argv) == 1:
        found = check(SCRIPTS)
        print("\n".join(found) or "nothing differs")
        sys.exit(bool(found))
    else:
        sys.exit("usage: python tests/test_copies.py [--fix algos/grpo.py]")


if __name__ == "__main__":
    main()
