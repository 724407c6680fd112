"""What a run still needs while it saves is not ended by what asks the run to stop."""

import signal
import subprocess
import sys

import pytest

from trainer.stop_signal import ASKING, kept_from_children

# Echoes its input, as a helper that serves requests does; by itself each of the signals would end it.
SERVING = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); print(sys.stdin.readline(), end='')"


@pytest.mark.parametrize("number", ASKING)
def test_a_helper_serves_after_every_signal_that_asks_to_stop(number: signal.Signals) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with kept_from_children():
        helper = subprocess.Popen(
            [sys.executable, "-c", SERVING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    helper.send_signal(number)
    output, _ = helper.communicate("still here\n")
    assert (output, helper.returncode) == ("still here\n", 0)
