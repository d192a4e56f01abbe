"""The loop of conversations in a terminal or a pipe: lines in, commands and pictures told apart, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from qvl.cli import failure
from qvl.errors import ConfigError, QvlError
from qvl.suggest import nearest

LEAVING: Final = ("quit", "exit", "/quit", "/exit")
SHOWN: Final = "a path or URL of a picture, film or PDF anywhere in a line shows it; quotes keep spaces in a name"
Answer: TypeAlias = Callable[[list[str], str], Awaitable[None]]
Commands: TypeAlias = Mapping[str, tuple[str, Callable[[str], object]]]
_REMOTE: Final = ("http://", "https://", "data:")
_MEDIA: Final = re.compile(
    r"\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif|hei[cf]|jxl|pdf|mp4|mov|mkv|webm|avi|m4v)(?:#page=[\w,-]+)?$", re.I
)
_WORD: Final = re.compile(r""""[^"]*"|'[^']*'(?!\w)|(?:\\.|\S)+""")


def converse(runner: asyncio.Runner, prompt: str, answer: Answer, commands: Commands | None = None) -> bool:
    """Answer the lines of stdin until one is quit, exit, or there is no more; return True if all were answered.

    On a terminal, Ctrl-C stops an answer and not the program; from a pipe it ends the program, as elsewhere.

    Args:
        runner: the event loop of every answer.
        prompt: what stands before a line on a terminal.
        answer: gets the pictures of a line and its text, either of which may be empty.
        commands: by name without the slash: the help line, and what is called with the text after the name.

    Raises:
        KeyboardInterrupt: Ctrl-C, where stdin is not a terminal.
    """
    commands = dict(commands or {})
    told = True
    typed = sys.stdin.isatty()
    if typed:
        _edit_lines()
    while (line := _read(prompt, typed)) is not None:
        if line.lower() in LEAVING:
            break
        try:
            if not (name := _command(line)):
                pictures, text = read_line(line)
                if pictures or text:
                    runner.run(_awaited(answer, pictures, text))
            elif name == "help":
                _help(commands)
            elif name in commands:
                commands[name][1](line.partition(" ")[2].strip())
            else:
                names = [f"/{known}" for known in ("help", *commands, "quit")]
                raise ConfigError(f"unknown command /{name}", hint=nearest(f"/{name}", names))
        except QvlError as exc:
            failure.report(exc)
            told = False
        except KeyboardInterrupt:
            if not typed:
                raise
            print("\n(stopped)", file=sys.stderr)
    return told


async def _awaited(answer: Answer, pictures: list[str], text: str) -> None:
    await answer(pictures, text)


def read_line(line: str) -> tuple[list[str], str]:
    """Return the pictures that a line names, and its text without them.

    A word is a picture if it is an http(s) or data: URL, or ends as pictures, films and PDFs do; a whole line also if a
    file of any name is there. Where a name is part of a sentence ("compare a.png with b.png"), "picture 1" takes its
    place.
    """
    whole = _name(line)
    if whole.startswith(_REMOTE) and " " not in whole:
        return [whole], ""
    if os.path.isfile(os.path.expanduser(whole)):
        return [os.path.expanduser(whole)], ""
    pictures: list[str] = []
    kept: list[str] = []
    end = 0
    for found in _WORD.finditer(line):
        word = found.group()
        name = _name(word)
        tail = ""
        if not is_picture(name):
            name = name.rstrip("?!.,;:)")
            tail = _name(word)[len(name) :]
        if not is_picture(name):
            continue
        pictures.append(name if name.startswith(_REMOTE) else os.path.expanduser(name))
        before = line[end : found.start()]
        kept.append(before)
        sentence = "".join(kept).rstrip()
        if tail or (sentence and sentence[-1] not in ".?!:,;"):
            kept.append(f"picture {len(pictures)}{tail}")
        end = found.end()
    return pictures, " ".join("".join((*kept, line[end:])).split()) if pictures else line


def is_picture(name: str) -> bool:
    """True if a word is the path or URL of a picture, film or PDF by its look, even if no such file exists."""
    return name.startswith(_REMOTE) or _MEDIA.search(name) is not None


def _name(word: str) -> str:
    """Return a word as a shell would read it, since terminals drop files in as quoted or escaped names."""
    if os.name == "nt":
        return word.strip("\"'")
    try:
        return " ".join(shlex.split(word)) if word[:1] in "\"'" or "\\" in word else word
    except ValueError:
        return word


def _command(line: str) -> str:
    """Return the name of the command that a line is; "" for text, and for a path that begins with a slash."""
    found = re.match(r"/([a-z]+)(?:\s|$)", line)
    return found[1] if found and not os.path.exists(line) else ""


def _read(prompt: str, typed: bool) -> str | None:
    """Return the next line without outer whitespace; None at the end."""
    while True:
        try:
            if typed and sys.stdout.isatty():
                return input(prompt).strip()
            print(prompt if typed else "", end="", flush=True, file=sys.stderr)
            line = sys.stdin.readline()
            return line.strip() if line else None
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as exc:
            raise ConfigError("a line is not UTF-8", hint="send text, and pictures by path or URL") from exc
        except KeyboardInterrupt:
            if not typed:
                raise
            print("\n(quit or Ctrl-D leaves)", file=sys.stderr)


def _edit_lines() -> None:
    """Let the lines be edited, remembered, and paths completed, where Python has readline."""
    try:
        import readline
    except ModuleNotFoundError:
        return
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")


def _help(commands: Commands) -> None:
    print(SHOWN)
    for name, (text, _) in commands.items():
        print(f"/{name:<14} {text}")
    print("quit            leave, as Ctrl-D does; Ctrl-C stops an answer")
