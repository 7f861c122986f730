"""The one exception that the command line turns into a line of text instead of a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """Something that the user can put right: a path, an option, a file, a missing package.

    The message is one line and names what came and what was expected. `cips` prints it and leaves with status
    2; as a library error it is an ordinary ValueError.

    Attributes:
        quiet: another process of the same run prints the message.
    """

    quiet: bool = False
