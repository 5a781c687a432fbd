"""What the documentation names exists: files, make's targets, the program's commands and their flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinsmith.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = "src tests bench examples scripts docs deploy engine api service store wire text cli".split()
FILE = re.compile(rf"(?<![\w/.~-])(?:{'|'.join(ROOMS)})/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)#\s]+)")
CODE = re.compile(r"^```.*?^```|^ {4,}.*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def code(page: Path) -> Iterator[str]:
    """The lines of what stands there as code, without comments."""
    for found in CODE.findall(page.read_text()):
        for line in found.strip("`").splitlines():
            yield line.partition(" #")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for link in LINK.findall(text):
        assert "://" in link or (page.parent / link).exists(), link
    for name in FILE.findall(text):
        assert (ROOT / name).exists() or (ROOT / "src" / "tinsmith" / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(page):
        program, _, rest = line.removeprefix(".venv/bin/").partition(" ")
        if program == "make":
            assert targets.issuperset(rest.split()[:1]), line
        if program == "tinsmith" and re.match(r"[a-z]", rest):
            words = rest.split()
            commands = [word for word in words[:2] if re.fullmatch(r"[a-z|]+", word)]
            for first in commands[0].split("|"):
                with pytest.raises(SystemExit) as end:
                    main([first, *commands[1:], "--help"])
                told = capsys.readouterr()
                assert end.value.code == 0, f"{line}: {told.err}"
                for flag in re.findall(r"--[a-z][a-z-]*", rest):
                    assert flag in told.out, f"{line}: {flag}"
