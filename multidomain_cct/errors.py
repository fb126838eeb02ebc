"""The one exception that becomes one line."""


class UserError(Exception):
    """What a person has to change. The message is one line: where, what was found, what is allowed, what to do.

    It ends a command with exit code 2 and no traceback; every other exception is our own fault, or the machine's, and
    keeps its own.
    """
