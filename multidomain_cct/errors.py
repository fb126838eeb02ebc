"""The one exception that is a person's to mend."""


class UserError(Exception):
    """What a person has to change. The message is one line: where, what was found, what is allowed, what to do."""
