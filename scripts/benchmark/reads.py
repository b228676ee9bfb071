"""Read workloads: one image exported by `rebasefs mount` and by qemu-storage-daemon's FUSE export.

Beside them a server that answers from memory and has no image at all shows what FUSE itself costs: the
floor. A workload is a way to prepare a file and a way to read all or some of it. The image is an overlay
that holds 20 % on a raw file of 2 GiB; both servers stand throughout, so that neither is cold.
"""

import contextlib
import mmap
import os
import random
import subprocess
import time
from multiprocessing import get_context
from typing import Callable, NamedTuple

from . import images, machine, processes
from .images import KIB, MIB
from .rebases import dense
from .report import Row

SMALL_READS = 20_000


def sequential(path, flags=0):
    """Reads all of the file, 1 MiB at a time; returns the seconds from opening to closing."""
    buffer = mmap.mmap(-1, MIB)  # page-aligned, as O_DIRECT wants it
    start = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY | flags)
    at = 0
    while count := os.preadv(descriptor, [buffer], at):
        at += count
    os.close(descriptor)
    return time.perf_counter() - start


def sequential_direct(path):
    return sequential(path, os.O_DIRECT)


def drop_pages(path):
    """Lets the kernel forget the pages of the export; those of the files under it stay."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def random_direct(readers):
    """4 KiB reads that no page cache answers, by so many processes at once."""
    def read(path):
        context = get_context("fork")
        barrier = context.Barrier(readers + 1)
        work = lambda seed: read_randomly(path, SMALL_READS // readers, seed, barrier)  # noqa: E731
        processes = [context.Process(target=work, args=(seed,)) for seed in range(readers)]
        for process in processes:
            process.start()
        barrier.wait()
        start = time.perf_counter()
        for process in processes:
            process.join()
        seconds = time.perf_counter() - start
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{path}: a reader failed")
        return seconds
    return read


def read_randomly(path, count, seed, barrier):
    buffer = mmap.mmap(-1, 4 * KIB)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    pages = os.fstat(descriptor).st_size // len(buffer)
    offsets = [page * len(buffer) for page in random.Random(seed).choices(range(pages), k=count)]
    barrier.wait()
    for offset in offsets:
        os.preadv(descriptor, [buffer], offset)


def nothing(_):
    """No preparation."""


class Read(NamedTuple):
    name: str
    what: str
    prepare: Callable  # not timed
    read: Callable  # returns seconds
    unit: str = "MiB"
    runs: int = 5

    def measure(self, program, scratch, runs, is_quick):
        with exported(program, scratch / "exported", is_quick) as (ours, qemu, null):
            for _ in range(runs):
                for export in (ours, qemu, null):
                    self.prepare(export.path)
                    export.runs.append(taken(export, self.read))
            amount = os.stat(qemu.path).st_size // MIB if self.unit == "MiB" else SMALL_READS
            yield Row(self.name, ours.runs, qemu.runs, self.unit, amount)
            yield Row(self.name, ours.runs, null.runs, self.unit, amount, beside="the null server")


def taken(export, read):
    processes.forget_peak(export.server)
    before = processes.cpu(export.server)
    seconds = read(export.path)
    return processes.Run(seconds, processes.cpu(export.server) - before, processes.peak(export.server))


class Export(NamedTuple):
    path: str
    server: int
    runs: list


@contextlib.contextmanager
def exported(program, directory, is_quick):
    """The image (made when it is needed first) as a file of rebasefs and as one of QEMU, and the floor."""
    if not directory.exists():
        directory.mkdir()
        dense(images.Maker(directory), 8 if is_quick else 1)
        (directory / "new.raw").unlink()
    images.into_page_cache(directory)
    with ours(program, directory) as first, qemu(directory) as second, null(directory, first) as third:
        demand_same(first.path, second.path)
        yield first, second, third


@contextlib.contextmanager
def ours(program, directory, image="cow.qcow2", *options):
    mountpoint = directory / f"{image}.mnt"
    mountpoint.mkdir(exist_ok=True)
    server = subprocess.Popen([program, "mount", "--foreground", *options, directory / image, mountpoint])
    with ended_at_exit(server):
        wait_until(mountpoint.is_mount, server)
        yield Export(str(mountpoint / "disk.raw"), server.pid, [])


@contextlib.contextmanager
def null(directory, ours):
    mountpoint = directory / "null.mnt"
    mountpoint.mkdir(exist_ok=True)
    server = subprocess.Popen([machine.example("null-server"), mountpoint, str(os.stat(ours.path).st_size)])
    try:
        wait_until(mountpoint.is_mount, server)
        machine.same_read_ahead(ours.path, mountpoint)
        yield Export(str(mountpoint / "disk.raw"), server.pid, [])
    finally:
        images.run("umount", mountpoint)
        server.wait()


@contextlib.contextmanager
def qemu(directory, image="cow.qcow2", is_writable=False):
    read_only, writable = ("off", "on") if is_writable else ("on", "off")
    file = directory / "qemu.raw"
    file.touch()
    server = subprocess.Popen([
        "qemu-storage-daemon",
        "--blockdev", f"qcow2,node-name=disk,read-only={read_only},file.driver=file,file.filename={directory}/{image}",
        "--export", f"fuse,id=export,node-name=disk,writable={writable},mountpoint={file}"])
    with ended_at_exit(server):
        wait_until(lambda: file.stat().st_size > 0, server)
        yield Export(str(file), server.pid, [])


@contextlib.contextmanager
def ended_at_exit(server):
    """Both servers unmount on SIGTERM."""
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def wait_until(condition, server):
    while not condition():
        if server.poll() is not None:
            raise SystemExit(f"{server.args[0]} ended with {server.returncode}")
        time.sleep(0.01)


def demand_same(first, second):
    """A rate counts only if the bytes are right."""
    with open(first, "rb") as one, open(second, "rb") as other:
        while block := one.read(MIB):
            if block != other.read(MIB):
                raise SystemExit(f"{first} and {second} differ")
        if other.read(1):
            raise SystemExit(f"{first} is shorter than {second}")


WORKLOADS = [
    Read("seq", "sequentially, 1 MiB at a time, no pages of the mount in memory", drop_pages, sequential),
    Read("seq-again", "sequentially, 1 MiB at a time, for the second time", sequential, sequential),
    Read("seq-direct", "sequentially, 1 MiB at a time, O_DIRECT", nothing, sequential_direct),
    Read("random-1", "4 KiB at random places, O_DIRECT, one reader", nothing, random_direct(1), "reads"),
    Read("random-4", "4 KiB at random places, O_DIRECT, four readers", nothing, random_direct(4), "reads"),
]
