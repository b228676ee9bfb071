"""Write workloads: a fresh overlay, written through `rebasefs mount --rw` and through qemu-storage-daemon's
writable FUSE export.

The overlay holds nothing (or all, where clusters are written for the second time) and stands on a raw file
of 1 GiB that is in the page cache. Each run gets an overlay of its own. What is written is not synced within
the time that is taken, so that no disk is measured; afterwards both overlays must read the same.
"""

import mmap
import os
import random
from typing import Callable, NamedTuple

from . import images, reads
from .images import GIB, KIB, MIB
from .report import Row

SMALL_WRITES = 20_000


def sequential(flags=0):
    """Writes all of the file, 1 MiB at a time."""
    def write(descriptor, size, block):
        for at in range(0, size, MIB):
            os.pwrite(descriptor, block, at)
    write.flags, write.length = flags, MIB
    return write


def small(flags=0):
    """Writes 4 KiB at random places."""
    def write(descriptor, size, block):
        for page in random.Random(7).choices(range(size // len(block)), k=SMALL_WRITES):
            os.pwrite(descriptor, block, page * len(block))
    write.flags, write.length = flags, 4 * KIB
    return write


def timed(write):
    """How a file is written, as what is measured of its server."""
    def run(path):
        block = mmap.mmap(-1, write.length)  # page-aligned, as O_DIRECT wants it
        block.write(random.Random(write.length).randbytes(write.length))
        descriptor = os.open(path, os.O_RDWR | write.flags)
        start = reads.time.perf_counter()
        write(descriptor, os.fstat(descriptor).st_size, block)
        seconds = reads.time.perf_counter() - start
        os.fsync(descriptor)
        os.close(descriptor)
        return seconds
    return run


class Write(NamedTuple):
    name: str
    what: str
    write: Callable
    unit: str = "MiB"
    is_second: bool = False  # whether all clusters are there already
    runs: int = 5

    def measure(self, program, scratch, runs, is_quick):
        directory = scratch / "written"
        size = GIB // (8 if is_quick else 1)
        if not directory.exists():
            directory.mkdir()
            images.Maker(directory).raw("base.raw", size, [(0, size)])
        images.into_page_cache(directory)
        ours, qemu = [], []
        for _ in range(runs):
            ours.append(self.run(directory, "ours.qcow2", lambda d, image: reads.ours(program, d, image, "--rw")))
            qemu.append(self.run(directory, "qemu.qcow2", lambda d, image: reads.qemu(d, image, is_writable=True)))
            for image in ("ours.qcow2", "qemu.qcow2"):
                images.run("qemu-img", "check", "-q", directory / image)
            images.run("qemu-img", "compare", "-q", directory / "ours.qcow2", directory / "qemu.qcow2")
        amount = size // MIB if self.unit == "MiB" else SMALL_WRITES
        sizes = [os.stat(directory / image).st_blocks * 512 for image in ("ours.qcow2", "qemu.qcow2")]
        yield Row(self.name, ours, qemu, self.unit, amount, tuple(sizes))

    def run(self, directory, image, exported):
        place = directory / image
        images.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", place)
        with exported(directory, image) as export:
            if self.is_second:
                timed(sequential())(export.path)
            return reads.taken(export, timed(self.write))


WORKLOADS = [
    Write("write-seq", "writing sequentially, 1 MiB at a time, into an empty overlay", sequential()),
    Write("write-direct", "the same with O_DIRECT", sequential(os.O_DIRECT)),
    Write("write-again", "writing sequentially, 1 MiB at a time, for the second time", sequential(), is_second=True),
    Write("write-4k", "writing 4 KiB at random places of an empty overlay", small(), "writes"),
    Write("write-4k-again", "the same for the second time, O_DIRECT", small(os.O_DIRECT), "writes", is_second=True),
]
