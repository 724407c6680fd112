"""Processes that wait for others wake up when these end."""

import os
import signal
import subprocess

from launch import signals


def test_the_end_of_a_child_whose_signal_another_thread_took_is_seen() -> None:
    with signals.held():
        child = subprocess.Popen(["true"])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        while signal.sigtimedwait([signal.SIGCHLD], 0.2) is not None:
            pass
        assert signals.next_signal(None) == signal.SIGCHLD
        assert child.wait() == 0
        assert signals.next_signal(0.0) is None
