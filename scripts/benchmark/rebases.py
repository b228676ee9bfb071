"""Rebase workloads: what `qemu-img rebase` does, and `rebasefs rebase` beside it.

A workload makes cow.qcow2 and its files in a directory, and returns the new backing file and its
format as they are given to both programs.
"""

import contextlib
import shutil
from typing import Callable, NamedTuple

from . import images, processes
from .images import CLUSTER, GIB, MIB, TIB, dense_runs
from .report import Row


def dense(make, scale):
    size = 2 * GIB // scale
    make.raw("old.raw", size, dense_runs(size))
    make.changed_copy("new.raw", "old.raw", make.some_clusters(size, 0.02))
    make.overlay("cow.qcow2", size, make.some_clusters(size, 0.20), "old.raw", "raw")
    return "new.raw", "raw"


def sparse(make, scale):
    # In qcow2, where qemu-img takes a minute; it reads the holes of a raw file page by page, half an hour.
    size = TIB // scale
    held = [(place * MIB, MIB) for place in make.some(size // MIB, 300)]
    make.raw("old.raw", size, held)
    differing = [offset // CLUSTER for offset, _ in make.random.sample(held, 20)]
    make.changed_copy("new.raw", "old.raw", differing)
    make.convert_both()
    make.overlay("cow.qcow2", size, make.some(size // CLUSTER, 20), "old.qcow2", "qcow2")
    return "new.qcow2", "qcow2"


def sibling(make, scale):
    size = 2 * GIB // scale
    make.raw("base.raw", size, dense_runs(size))
    for name in ("old.qcow2", "new.qcow2"):
        make.overlay(name, size, make.some_clusters(size, 0.01), "base.raw", "raw")
    make.overlay("cow.qcow2", size, make.some_clusters(size, 0.20), "old.qcow2", "qcow2")
    return "new.qcow2", "qcow2"


def ancestor(make, scale):
    size = 2 * GIB // scale
    make.raw("base.raw", size, dense_runs(size))
    make.overlay("middle.qcow2", size, make.some_clusters(size, 0.01), "base.raw", "raw")
    make.overlay("cow.qcow2", size, make.some_clusters(size, 0.20), "middle.qcow2", "qcow2")
    return "base.raw", "raw"


def flatten(make, scale):
    size = 2 * GIB // scale
    make.raw("old.raw", size, dense_runs(size))
    make.overlay("cow.qcow2", size, make.some_clusters(size, 0.20), "old.raw", "raw")
    return "", None


def compressed(make, scale):
    size = 512 * MIB // scale
    make.text()
    make.raw("old.raw", size, dense_runs(size))
    make.changed_copy("new.raw", "old.raw", make.some_clusters(size, 0.01))
    make.convert_both("-c")
    make.overlay("cow.qcow2", size, make.some_clusters(size, 0.20), "old.qcow2", "qcow2")
    return "new.qcow2", "qcow2"


def same(make, scale):
    size = 2 * GIB // scale
    make.raw("old.raw", size, dense_runs(size))
    make.changed_copy("new.raw", "old.raw")
    make.overlay("cow.qcow2", size, make.some_clusters(size, 0.20), "old.raw", "raw")
    return "new.raw", "raw"


def reflink(make, scale):
    size = 2 * GIB // scale
    make.raw("old.raw", size, dense_runs(size))
    make.changed_copy("new.raw", "old.raw", make.some_clusters(size, 0.01), how="--reflink=always")
    make.overlay("cow.qcow2", size, make.some_clusters(size, 0.20), "old.raw", "raw")
    return "new.raw", "raw"


class Rebase(NamedTuple):
    name: str
    what: str
    make: Callable
    runs: int = 5
    filesystem: Callable = contextlib.nullcontext  # of the scratch directory

    def measure(self, program, scratch, runs, is_quick):
        with self.filesystem(scratch) as scratch:
            yield from self.measure_in(scratch, program, runs, is_quick)

    def measure_in(self, scratch, program, runs, is_quick):
        directory = scratch / self.name
        directory.mkdir()
        try:
            backing, backing_format = self.make(images.Maker(directory), 8 if is_quick else 1)
            options = ["-b", backing] + (["-F", backing_format] if backing_format else [])
            images.into_page_cache(directory)
            yield self.pairs(directory, runs, {
                "ours.qcow2": [program, "rebase", *options, "ours.qcow2"],
                "qemu.qcow2": ["qemu-img", "rebase", *options, "qemu.qcow2"],
            })
        finally:
            shutil.rmtree(directory)

    def pairs(self, directory, runs, commands):
        measured = {overlay: [] for overlay in commands}
        for _ in range(runs):
            for overlay, command in commands.items():
                images.fresh_copy(directory / "cow.qcow2", directory / overlay)
                measured[overlay].append(processes.timed(command, directory))
        demand_same(directory, *commands)
        sizes = tuple((directory / overlay).stat().st_blocks * 512 for overlay in commands)
        return Row(self.name, *measured.values(), sizes=sizes)


@contextlib.contextmanager
def btrfs(scratch):
    """A file system that shares extents. Only root can mount one."""
    disk, mountpoint = scratch / "btrfs", scratch / "btrfs.mnt"
    with open(disk, "wb") as file:
        file.truncate(12 * GIB)
    images.run("mkfs.btrfs", "-q", disk)
    mountpoint.mkdir()
    images.run("mount", "-o", "loop", disk, mountpoint)
    try:
        yield mountpoint
    finally:
        images.run("umount", mountpoint)
        disk.unlink()


def demand_same(directory, ours, qemu):
    """A time counts only if the work was done: the guest's bytes kept, the image sound."""
    for overlay in (ours, qemu):
        images.run("qemu-img", "compare", directory / "cow.qcow2", directory / overlay)
    images.run("qemu-img", "check", directory / ours)


WORKLOADS = [
    Rebase("dense", "two raw files of 2 GiB, 7/8 data, 2 % of the clusters differ; the overlay holds 20 %", dense),
    Rebase("sparse", "two qcow2 files of 1 TiB that hold 300 MiB each, 20 clusters differ", sparse, runs=2),
    Rebase("sibling", "from one overlay (1 %) of a 2 GiB file to another of the same file", sibling),
    Rebase("ancestor", "onto the backing file of the backing file (2 GiB), leaving out 1 %", ancestor),
    Rebase("flatten", "onto no backing file; the old one has 2 GiB, 7/8 data", flatten),
    Rebase("compressed", "two zlib-compressed qcow2 files of 512 MiB, 1 % of the clusters differ", compressed),
    Rebase("same", "onto a bit-for-bit copy of the 2 GiB backing file", same),
    Rebase("reflink", "onto a copy on Btrfs that shares all but 1 % of its extents with the 2 GiB backing file",
           reflink, filesystem=btrfs),
]
