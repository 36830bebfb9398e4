"""The one error that a user of the example scripts can cause and repair."""


class UserError(Exception):
    """One sentence that names the file or option at fault and says what to do.

    The scripts print it on stderr and exit with code 2; every other exception is a bug.
    """

    def __init__(self, sentence: str) -> None:
        # An error in a loader process arrives behind that process's traceback.
        super().__init__(one_line(sentence.rpartition("uda.errors.UserError: ")[2].strip()))


def one_line(text: str) -> str:
    """A text with escapes (\\n, \\x1b) for line breaks and for what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
