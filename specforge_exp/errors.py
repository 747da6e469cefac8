"""The one exception that means: the user can mend this."""


class InputError(Exception):
    """A wrong option, file or environment; the message says what, where and which command helps.

    Entry scripts print it as one line, without a traceback, and exit with status 1.
    """
