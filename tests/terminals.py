"""A terminal for programs under test: what a user would see, and keys to press."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pyte


def _enter() -> None:
    """A new session begins at its terminal, with the reaction to SIGHUP that a shell leaves it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children inherit to ignore it


class Terminal:
    """Runs a command on a pseudo-terminal; `screen` is what it shows.

    keys: "\\r" is Enter, "\\x03" Ctrl-C, "\\x04" Ctrl-D, "\\x1b" Esc.
    """

    def __init__(
        self, command: list[str], env: dict[str, str], rows: int = 40, columns: int = 100
    ) -> None:
        self.raw = b""
        self._screen = pyte.HistoryScreen(columns or 80, rows or 24, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        self.modes = termios.tcgetattr(follower)
        self.process = subprocess.Popen(
            command,
            env={"TERM": "xterm", **env},
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            preexec_fn=_enter,
        )
        self._follower = follower  # kept open: what is left to read stays

    @property
    def screen(self) -> str:
        """The lines that are or were on the screen, without spaces and empty lines at their end."""
        self._update(0)
        past = ["".join(line[i].data for i in sorted(line)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*past, *self._screen.display]).rstrip()

    def press(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def wait_for(self, pattern: str, timeout: float = 20) -> str:
        """The screen, once the pattern is found in it."""
        return self.wait_until(lambda: re.search(pattern, self.screen), timeout, pattern)

    def wait_until(self, condition: object, timeout: float = 20, what: str = "") -> str:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"not seen: {what}\n{self.screen}")
            self._update(0.05)
        return self.screen

    def ended(self, timeout: float = 20) -> int:
        """The exit code; everything is still shown."""
        end = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < end:
            self._update(0.05)
        self._update(0)
        return self.process.wait(0.1)

    def has_its_modes_back(self) -> bool:
        """Whether the terminal echoes and edits lines as before the program."""
        return termios.tcgetattr(self._follower)[:4] == self.modes[:4]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._leader)
        os.close(self._follower)

    def _update(self, timeout: float) -> None:
        while select.select([self._leader], [], [], timeout)[0]:
            data = os.read(self._leader, 65536)
            self.raw += data
            self._stream.feed(data)
            if b"\x1b[6n" in data:  # where is the cursor?
                cursor = self._screen.cursor
                self.press(f"\x1b[{cursor.y + 1};{cursor.x + 1}R")
            timeout = 0
