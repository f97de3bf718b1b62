"""What `rtl` raises when the caller can put things right."""


class InputError(ValueError):
    """Bad input: the message is one line that names the argument, its value, what was expected and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
