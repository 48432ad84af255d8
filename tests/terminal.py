"""What a command prints, as tests read it."""

from typing import NamedTuple


def unboxed(text: str) -> str:
    """Text on one line, without the boxes that are drawn around it."""
    return " ".join(text.replace("│", " ").split())


class Run(NamedTuple):
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str

    def assert_refused(self, code: int, message: str) -> None:
        """It failed with this exit code, and said this and no traceback."""
        assert self.returncode == code, self.stderr
        assert message in unboxed(self.stderr)
        assert "Traceback" not in self.stderr
