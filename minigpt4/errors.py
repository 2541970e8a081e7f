"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file, line, key or flag and says what to do about it. The command lines print it
    without a traceback (unless ``--debug``) and exit with code 2.
    """
