"""The one exception that means: the user can mend this; and what any other says, in one line."""


class InputError(Exception):
    """A wrong option, file or environment; the message says what, where and which command helps.

    Entry scripts print it as one line, without a traceback, and exit with status 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
