"""The one error that a user of the example scripts can cause and repair."""

# A sentence may quote names and values out of a file, which are as long as the file's author likes.
_LONGEST = 2000


class UserError(Exception):
    """One sentence that names the file or option at fault and says what to do.

    The scripts print it on stderr and exit with code 2; every other exception is a bug.

    Whatever a sentence quotes, it stays one line without control characters and of bounded length.
    """

    def __init__(self, sentence: str) -> None:
        # An error in a loader process arrives behind that process's traceback.
        super().__init__(one_line(sentence.rpartition("uda.errors.UserError: ")[2]))


def one_line(text: str) -> str:
    """A text, shortened if it is long, with escapes (\\x1b) for what a terminal would obey."""
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value out of a file for a sentence: a number or a text itself, else its type."""
    short = value is None or isinstance(value, float | str)
    if isinstance(value, int):  # whose digits take quadratic time
        short = value.bit_length() <= 64
    return str(value) if short else f"a value of type {type(value).__name__}"
