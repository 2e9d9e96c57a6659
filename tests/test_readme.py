"""What the READMEs tell a reader to type works as it stands there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, load_script

INSTALL = "pip install -r requirements.txt && "
MAIN = [INSTALL + "python algos/grpo.py", INSTALL + "pytest"]
PAGES = "README.md", "benchmarks/README.md"
each_page = pytest.mark.parametrize("page", PAGES)


def readme(page: str = "README.md") -> str:
    """The text of a README."""
    return (ROOT / page).read_text("utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in these languages."""
    fenced = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S)
    return [body for language, body in fenced if language in languages]


def commands(text: str) -> list[str]:
    """The command lines of the sh and bash blocks, continued lines joined, and those
    in inline code."""
    lines = "\n".join(blocks(text, "sh", "bash")).replace("\\\n", " ").splitlines()
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    inline = [
        x for x in re.findall(r"`([^`]+)`", outside) if "algos/" in x and " " in x
    ]
    return [line.removeprefix("$ ").strip() for line in lines] + inline


def calls(command: str) -> list[tuple[str, list[str]]]:
    """Each algos/<script>.py in a command line, with its flags."""
    found, words = [], shlex.split(command, comments=True)
    for i, word in enumerate(words):
        if match := re.fullmatch(r"(?:\./)?algos/(\w+)\.py", word):
            runs = words[i - 1].startswith("python") if i else False
            if runs or "torchrun" in words[:i]:
                ends = ("&&", "||", "|", ";", "&", ">", ">>", "2>", "...")
                flags = words[i + 1 :]
                stop = [k for k, flag in enumerate(flags) if flag in ends]
                found.append((match[1], flags[: min(stop, default=len(flags))]))
    return found


def test_main_command_is_missing():
    """The two commands that CI runs are there verbatim, each a line of its own in a
    block that one can copy."""
    lines = commands(readme())
    for command in MAIN:
        assert command in lines


@each_page
def test_command_does_not_parse(page):
    """A flag that was renamed, a value that is not allowed, a script that is not there:
    each `algos/<script>.py` command is read by that script's own Args."""
    found = [call for command in commands(readme(page)) for call in calls(command)]
    assert found or page != "README.md"
    for name, flags in found:
        assert (ROOT / "algos" / f"{name}.py").is_file(), name
        try:
            tyro.cli(load_script(name).Args, args=flags)
        except SystemExit as stop:
            assert stop.code == 0, f"algos/{name}.py {' '.join(flags)}"


def test_command_is_overlooked():
    """The extraction sees continued lines, torchrun, comments and pipes."""
    text = "```sh\npython algos/a.py --x 1 \\\n    --y 2  # z\n```\n"
    text += "```bash\ncd b && torchrun --n 2 algos/b.py --x 1 | tee log\n```\n"
    text += "then `python algos/c.py --z` and `algos/d.py`\n"
    text += "```python\npython = 'algos/e.py'\n```\n"
    found = [call for command in commands(text) for call in calls(command)]
    assert found == [
        ("a", ["--x", "1", "--y", "2"]),
        ("b", ["--x", "1"]),
        ("c", ["--z"]),
    ]
    assert commands(f"```sh\n{MAIN[0]}\n```") == MAIN[:1]


def test_python_snippet_does_not_run(tmp_path, monkeypatch):
    """Every Python block runs as it stands, in a folder of its own; one that is a task
    plug-in also gives problems, and pays for their worked answers and not for none."""
    found = blocks(readme(), "python", "py")
    (tmp_path / "algos").symlink_to(ROOT / "algos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    grpo = load_script("grpo")
    for i, snippet in enumerate(found):
        names = {"__name__": "snippet"}
        exec(compile(snippet, f"README.md, Python block {i + 1}", "exec"), names)
        if {"problems", "reward"} <= names.keys():
            Path(f"task_{i}.py").write_text(snippet, "utf-8")
            train, held_out, reward = grpo.load_task(grpo.Args(task=f"task_{i}.py"))
            for problem in train[:5] + held_out[:5]:
                assert reward(problem, "") == 0.0
                assert not problem.solution or reward(problem, problem.solution) == 1.0


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(path: Path) -> set[str]:
    """The anchors of a Markdown file."""
    outside = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    return {slug(x) for x in re.findall(r"^#+ (.+)$", outside, re.M)}


@each_page
def test_link_or_picture_leads_nowhere(page):
    """Every relative link, picture and anchor has its target, inside the repository."""
    outside = re.sub(r"^```.*?^```", "", readme(page), flags=re.M | re.S)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", outside)
    links += re.findall(r"(?:src|href)=[\"']([^\"']+)", outside)
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", outside, re.M)
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        start = ROOT / page
        target = Path(os.path.normpath(start.parent / path)) if path else start
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_named_test_is_gone_or_of_another_report():
    """A row with a test names one that is there, whose docstring has the report."""
    rows = re.findall(
        r"^\|.*\]\((https\S+)\) \| `(tests/\w+\.py)::(\w+)`", readme(), re.M
    )
    assert rows
    for report, path, name in rows:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        named = [x for x in tree.body if getattr(x, "name", "") == name]
        assert named and report in ast.get_docstring(named[0]), name


@each_page
def test_placeholder_is_left(page):
    """No number that was still to be filled in."""
    assert not re.findall(r"@@\w+@@|TODO|FIXME|XXX", readme(page))


@pytest.mark.parametrize("kind", ["link", "anchor", "picture", "snippet", "flag"])
def test_broken_readme_is_not_seen(tmp_path, monkeypatch, kind):
    """The checks above do fail on what they are there for."""
    wrong = {
        "link": "[x](no/such/file.py)",
        "anchor": "[x](README.md#no-such-part)",
        "picture": '<img src="no/such.png">',
        "snippet": "```python\nraise ValueError\n```",
        "flag": "```sh\npython algos/grpo.py --no-such-flag 1\n```",
    }
    (tmp_path / "README.md").write_text(f"# R\n{wrong[kind]}\n")
    (tmp_path / "algos").symlink_to(ROOT / "algos")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises((AssertionError, ValueError)):
        if kind in ("link", "anchor", "picture"):
            test_link_or_picture_leads_nowhere("README.md")
        elif kind == "snippet":
            (tmp_path / "elsewhere").mkdir()
            test_python_snippet_does_not_run(tmp_path / "elsewhere", monkeypatch)
        else:
            test_command_does_not_parse("README.md")
