"""What `rtl` raises when the caller can put things right."""


class InputError(ValueError):
    """Bad input: the message is one line that names the argument, its value, what was expected and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def expect(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raises InputError for an argument of another type: "run is a str, expected rtl.Run(folder)"."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is a {type(value).__name__}, expected {expected}")
