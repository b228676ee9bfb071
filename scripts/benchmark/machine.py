"""The machine: are tools and space there, what it is, and how busy."""

import contextlib
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30

TOOLS = {
    "cargo": "https://rustup.rs",
    "qemu-img": "apt-get install qemu-utils",
    "qemu-storage-daemon": "apt-get install qemu-system-common",
    "cp": "apt-get install coreutils",
    "umount": "apt-get install mount",
}


def demand_tools():
    missing = [f"  {tool}: {how}" for tool, how in TOOLS.items() if not shutil.which(tool)]
    if not os.path.exists("/dev/fuse"):
        missing.append("  /dev/fuse: modprobe fuse")
    if missing:
        sys.exit("scripts/bench needs\n" + "\n".join(missing))


def demand_space(scratch, is_quick):
    """The largest workload, and all its files in the page cache, so that no disk is measured."""
    needed = (2 if is_quick else 10) * GIB
    free = shutil.disk_usage(scratch).free
    if free < needed:
        sys.exit(f"{scratch}: {needed // GIB} GiB of space are needed, {free / GIB:.1f} are free; "
                 "set TMPDIR to another place")
    available = int(field("/proc/meminfo", "MemAvailable").split()[0]) * 1024
    if available < needed:
        print(f"warning: {available / GIB:.1f} GiB of memory are available, not {needed // GIB}: "
              "this will measure the disk", file=sys.stderr)


def build():
    """Builds the release; returns the program."""
    return built(["cargo", "build", "--release", "--locked", "--bin", "rebasefs", "--message-format=json"])


def built(command):
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit("scripts/bench: the release does not build")
    messages = map(json.loads, ended.stdout.splitlines())
    return [m["executable"] for m in messages if m.get("executable")][-1]


@functools.cache
def example(name):
    """Builds an example; returns the program."""
    return built(["cargo", "build", "--release", "--locked", "--example", name, "--message-format=json"])


def same_read_ahead(path, other):
    """Lets the kernel read as far ahead in the second mount as in the first."""
    setting = "/sys/class/bdi/{}:{}/read_ahead_kb"
    first, second = (setting.format(os.major(device), os.minor(device))
                     for device in (os.stat(each).st_dev for each in (path, other)))
    with contextlib.suppress(PermissionError):
        Path(second).write_text(Path(first).read_text())


def described(scratch):
    memory = int(field("/proc/meminfo", "MemTotal").split()[0]) / (1 << 20)
    cpu = field("/proc/cpuinfo", "model name") or platform.machine()
    filesystem = output("df", "--output=fstype", scratch).split()[-1]
    qemu = re.search(r"version (\S+)", output("qemu-img", "--version"))[1]
    commit = output("git", "-C", ROOT, "describe", "--always", "--dirty")
    return (f"{date.today()}: {os.cpu_count()} × {cpu}, {memory:.0f} GiB, Linux {platform.release()}, "
            f"files on {filesystem}; QEMU {qemu}; rebasefs at {commit}")


def load():
    return "Load average at the end: " + " ".join(f"{load:.1f}" for load in os.getloadavg())


def field(path, name):
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return ""


def output(*command):
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return ended.stdout.strip() or "unknown"
