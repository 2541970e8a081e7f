import argparse
import subprocess
import sys

import pytest

from minigpt4.errors import InputError
from minigpt5.cli import run_command


def _fail(_):
    raise InputError("--flag x: no such thing; give y")


def test_input_errors_are_one_line_and_exit_2(capsys):
    assert run_command(_fail, []) == 2
    assert capsys.readouterr().err == "error: --flag x: no such thing; give y\n"


def test_libraries_for_other_runs_say_nothing_on_the_error_stream():
    code = "from minigpt5.cli import run_command; run_command(lambda _: __import__('peft') and None, [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_debug_keeps_the_traceback():
    with pytest.raises(InputError):
        run_command(_fail, ["--debug"])


def test_unknown_flags_exit_2():
    with pytest.raises(SystemExit) as stop:
        run_command(lambda arguments: argparse.ArgumentParser().parse_args(arguments) and None, ["--nonsense"])
    assert stop.value.code == 2


def test_results_and_interrupts_become_exit_codes(capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    assert run_command(lambda _: None, []) == 0
    assert run_command(lambda _: 3, []) == 3
    assert run_command(interrupt, []) == 130
    assert "interrupted" in capsys.readouterr().err


def test_own_defects_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda _: 1 // 0, [])


@pytest.mark.parametrize("lines", [1, 100_000], ids=["flushed at the end", "more than is buffered"])
def test_output_that_nobody_reads_ends_a_command_quietly(lines):
    """As in ``python -m minigpt5.tinyworld score STORE | head``."""
    code = f"import sys; from minigpt5.cli import run_command; sys.stdin.read(); sys.exit(run_command({_PRINT}))"
    program = [sys.executable, "-c", code.replace("LINES", str(lines))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        run.stdin.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141


_PRINT = "lambda _: print('\\n' * LINES)"


def test_another_closed_pipe_than_the_output_is_a_defect():
    def lose_worker(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(lose_worker, [])
