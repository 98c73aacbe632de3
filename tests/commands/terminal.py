"""The command line as a person has it before them: in a pseudo-terminal, in a pipe, or as JSON."""

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
import threading
from dataclasses import dataclass

from silotune import cli

FORMS = ("terminal", "plain", "json")


@dataclass(frozen=True)
class Shown:
    """What a command came to.

    Attributes
    ----------
    code : int
        Exit code.
    text, errors : str
        Standard output and standard error; a terminal's are one, in `text`.
    """

    code: int
    text: str
    errors: str = ""

    @property
    def facts(self):
        """The one JSON object that it printed."""
        return json.loads(self.text)


def shown(form, *words):
    """Run a command in one of `FORMS`, within this process."""
    if form == "terminal":
        return _in_a_terminal(words)
    out, errors = io.StringIO(), io.StringIO()
    words = (*words, "--json") if form == "json" else words
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = _code(words)
    return Shown(code, out.getvalue(), errors.getvalue())


def _code(words):
    """The exit code; an error is shown as the installed command shows it."""
    old, sys.argv = sys.argv, ["silotune", *words]
    try:
        cli.main()
    except SystemExit as exc:
        return exc.code or 0
    finally:
        sys.argv = old
    return 0


def _in_a_terminal(words, *, columns=80):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    read = []

    def reading():
        with contextlib.suppress(OSError):  # the terminal's other side was closed
            while chunk := os.read(ours, 65536):
                read.append(chunk)

    thread = threading.Thread(target=reading, daemon=True)
    thread.start()
    try:
        with (
            os.fdopen(theirs, "w", encoding="utf-8") as screen,
            contextlib.redirect_stdout(screen),
            contextlib.redirect_stderr(screen),
        ):
            code = _code(words)
        thread.join(timeout=10)
    finally:
        os.close(ours)
    return Shown(code, b"".join(read).decode())
