"""The one error that a user of the example scripts can cause and repair."""


class UserError(Exception):
    """One sentence that names the file or option at fault and says what to do.

    The scripts print it on stderr and exit with code 2; every other exception is a bug.
    """
