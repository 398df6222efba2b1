"""Commands as documents tell them to a reader, checked against the programs themselves.

Goes in: the text of a document. Comes out: its `mint`, `kubectl` and `helm` commands as words; `check_command` fails
where the program has no such command or option. Nothing is run but `--help`.
"""

import functools
import re
import shlex
import subprocess

import typer
from helm_tools import require_tool

from pipelines.cli import app


def list_commands(text: str) -> list[list[str]]:
    """Commands of indented lines (lines that end with a backslash go on), without what comes behind a pipe."""
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = []
    for line in joined.splitlines():
        if re.match(r"    (mint|kubectl|helm) ", line):
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;&")
            lexer.whitespace_split = True
            words = list(lexer)
            end = next((at for at, word in enumerate(words) if word[0] in "|<>;&"), len(words))
            commands.append(words[:end])
    return commands


@functools.cache
def show_help(program: str, *subcommand: str) -> str:
    arguments = [require_tool(program), *subcommand, *(["--help"] if subcommand != ("options",) else [])]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout


def check_command(words: list[str]) -> None:
    """Fails unless the program has this command with these options."""
    program, *arguments = words
    if program == "mint":
        group = typer.main.get_command(app)
        try:
            group.commands[arguments[0]].make_context(arguments[0], arguments[1:])  # type: ignore[attr-defined]
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from None
        return
    # Options before the subcommand are global ones, each with a value.
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    while arguments[0].startswith("-"):
        arguments = arguments[1 if "=" in arguments[0] else 2 :]
    num_words = 3 if arguments[:2] == ["create", "secret"] else 2 if arguments[0] in ("create", "rollout") else 1
    subcommand = tuple(arguments[:num_words])
    shown = show_help(program, *subcommand) + (show_help(program, "options") if program == "kubectl" else "")
    missing = [flag for flag in flags if not re.search(rf"(^|\s){flag}\b", shown)]
    assert not missing, f"{program} {' '.join(subcommand)} has no {', '.join(missing)}"
