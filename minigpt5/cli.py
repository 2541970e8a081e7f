"""What every command line of the project does around its ``main``: errors, exit codes, ``--debug``."""

import logging
import os
import select
import sys
from collections.abc import Callable, Sequence

from minigpt4.errors import InputError

INPUT_ERROR = 2
"""Exit code for input that cannot be used; argparse exits with the same for an unknown flag."""
INTERRUPTED = 130
OUTPUT_CLOSED = 141
"""Exit code when nobody reads the output any longer, as of programs that the signal for it ends: ``… | head``."""


def quieten_libraries() -> None:
    """Silence what a library says of other runs than these, in this process."""
    # peft imports bitsandbytes where it is installed; that warns of kernels which only 4-bit layers would use, and
    # at every call of an 8-bit layer of the precision in which such layers compute.
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    An :class:`InputError` is printed as one ``error:`` line without a traceback, unless ``--debug`` is among the
    arguments. Any other exception is a defect of the program and keeps its traceback.

    Args:
        main: takes the arguments and returns an exit code; None counts as 0.
        argv: arguments without the program's name; None takes ``sys.argv[1:]``.
    """
    quieten_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = main(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _discard_unread_output():
            raise
        return OUTPUT_CLOSED
    except InputError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _discard_unread_output() -> bool:
    """Return whether nobody reads standard output; what is still to be written then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in output.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True
