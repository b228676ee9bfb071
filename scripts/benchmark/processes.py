"""Running a program to its end: how long it took, its processor time, the most memory it had resident."""

import ctypes
import os
import signal
import subprocess
import time
from typing import NamedTuple

PR_SET_CHILD_SUBREAPER = 36

# Linux counts the memory of whoever called exec into the peak of what was executed. A shell between
# us and the program is as small as a process can be; the program then becomes our child, and
# wait4 tells about it alone.
LAUNCH = '"$@" >"$LOG" 2>&1 & echo $!'


class Run(NamedTuple):
    seconds: float
    cpu: float  # seconds of processor time
    peak: int  # bytes resident


def timed(command, directory):
    """Runs a command that must succeed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    log = directory / "log"
    start = time.perf_counter()
    launched = subprocess.run(
        ["sh", "-c", LAUNCH, "sh", *command], stdout=subprocess.PIPE, text=True, check=True,
        cwd=directory, env={**os.environ, "LOG": str(log)})
    status, usage = ended(int(launched.stdout))
    seconds = time.perf_counter() - start
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {code}\n{log.read_text()}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def ended(process):
    """Waits for a child, which does not outlive us."""
    try:
        _, status, usage = os.wait4(process, 0)
        return status, usage
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise


def cpu(process):
    """The seconds of processor time that a running process has used."""
    with open(f"/proc/{process}/stat") as file:
        user, system = file.read().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def forget_peak(process):
    """From now on, `peak` counts anew."""
    with open(f"/proc/{process}/clear_refs", "w") as file:
        file.write("5")


def peak(process):
    """The most memory that a running process had resident, in bytes."""
    with open(f"/proc/{process}/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
