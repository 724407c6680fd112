"""Processes that stand still because of a signal."""

import os
import signal
import subprocess
import sys

from trainer.health.process_table import children, rank_of
from trainer.health.stopped import LOOKS, StoppedProcesses


def test_a_process_counts_as_lost_when_it_was_found_stopped_so_many_times_in_a_row() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"RANK": "7"}) as process:
        pid, stopped = process.pid, StoppedProcesses()
        assert pid in children(os.getpid())
        for _ in range(LOOKS):
            assert stopped.look([pid]) == []
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        assert [stopped.look([pid]) for _ in range(LOOKS)] == [[]] * (LOOKS - 1) + [[pid]]
        assert rank_of(pid) == "7"
        process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, pid, os.WCONTINUED | os.WNOWAIT)
        assert stopped.look([pid]) == []
        process.communicate(b"\n")
    assert (stopped.look([pid]), rank_of(pid)) == ([], None)
