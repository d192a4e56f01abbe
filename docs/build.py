"""`make docs`: docs/cli.md from the commands themselves, and a check of every link between the project's pages."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

# Plain text of one width, whatever terminal this runs in.
os.environ.update(NO_COLOR="1", TERM="dumb", COLUMNS="110", TYPER_USE_RICH="0")

from typer.testing import CliRunner

from qvl.cli import LazyGroup, app, load_command

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEAD = """# The commands

Written by `make docs` from `qvl --help`. Do not edit.
"""


def main() -> int:
    """Writes docs/cli.md and returns 1 when a link leads nowhere."""
    (ROOT / "docs" / "cli.md").write_text(commands(), encoding="utf-8")
    broken = [problem for page in pages() for problem in broken_links(page)]
    for problem in broken:
        print(problem, file=sys.stderr)
    return 1 if broken else 0


def commands() -> str:
    """The help of `qvl` and of every command, as Markdown."""
    runs = [()]
    for name in LazyGroup(name="qvl").list_commands(None):
        runs.append((name,))
        runs += [(name, inner) for inner in getattr(load_command(name), "commands", {})]
    return HEAD + "".join(f"\n## qvl {' '.join(run)}".rstrip() + f"\n\n```text\n{help_of(run)}\n```\n" for run in runs)


def help_of(run: tuple[str, ...]) -> str:
    """What `qvl RUN --help` prints, without trailing spaces."""
    text = CliRunner().invoke(app, [*run, "--help"], prog_name="qvl").stdout
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def pages() -> list[Path]:
    """The Markdown pages of the project itself."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def broken_links(page: Path) -> list[str]:
    """Relative links of `page` to files or headings that do not exist."""
    found = []
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        path, _, heading = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / unquote(path)).resolve() if path else page
        if not target.exists():
            found.append(f"{page.relative_to(ROOT)}: {link} does not exist")
        elif heading and target.suffix == ".md" and heading not in headings(target):
            found.append(f"{page.relative_to(ROOT)}: {link} names no heading")
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


if __name__ == "__main__":
    sys.exit(main())
