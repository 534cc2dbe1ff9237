"""The errors that a user can cause: each becomes one line on the terminal and an exit code, never a traceback."""


class AlexNetError(Exception):
    """Something outside the program is wrong: a file, a data set, a checkpoint, a disk. Exit code 1.

    The message is one line that says what is wrong and what to do.
    """

    exit_code = 1


class UsageError(AlexNetError):
    """The command line or a configuration value is wrong. Exit code 2."""

    exit_code = 2
