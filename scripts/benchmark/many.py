"""Many overlays, one new base: 100 siblings in one command, and one of them alone.

qemu-img takes one overlay at a time and compares all of both files for each. Nobody wants to wait for
a hundred of them: a few are measured, and stand for the rest.
"""

import shutil
from typing import NamedTuple

from . import images, processes
from .images import CLUSTER, GIB, dense_runs
from .rebases import demand_same
from .report import Row

OVERLAYS = 100
QEMU_TAKES = 5
DIFFERING = 20
TO_NEW = ["rebase", "-b", "new.raw", "-F", "raw"]


class Many(NamedTuple):
    name: str
    what: str
    runs: int = 5

    def measure(self, program, scratch, runs, is_quick):
        directory = scratch / self.name
        directory.mkdir()
        try:
            make(images.Maker(directory), 2 * GIB // (8 if is_quick else 1))
            images.into_page_cache(directory)
            one, hundred, qemu_one, qemu_hundred = [], [], [], []
            for _ in range(runs):
                one.append(rebased(program, directory, ["one.qcow2"]))
                hundred.append(rebased(program, directory, [f"ours{number}.qcow2" for number in range(OVERLAYS)]))
                few = [rebased("qemu-img", directory, [f"qemu{number}.qcow2"]) for number in range(QEMU_TAKES)]
                qemu_one.append(few[0])
                qemu_hundred.append(total(few, OVERLAYS / QEMU_TAKES))
            for number in (0, OVERLAYS // 2, OVERLAYS - 1):
                demand_same(directory, f"ours{number}.qcow2", "qemu0.qcow2")
            yield Row(f"{self.name}: 1", one, qemu_one)
            yield Row(f"{self.name}: {OVERLAYS}", hundred, qemu_hundred)
        finally:
            shutil.rmtree(directory)


def make(make, size):
    make.raw("old.raw", size, dense_runs(size))
    make.changed_copy("new.raw", "old.raw", make.some(size // CLUSTER, DIFFERING))
    images.run("qemu-img", "create", "-f", "qcow2", "-b", "old.raw", "-F", "raw", make.path("cow.qcow2"))


def rebased(program, directory, overlays):
    for overlay in overlays:
        images.fresh_copy(directory / "cow.qcow2", directory / overlay)
    return processes.timed([program, *TO_NEW, *overlays], directory)


def total(runs, times):
    """All of these one after the other, so many times."""
    seconds, cpu = (times * sum(numbers) for numbers in ((r.seconds for r in runs), (r.cpu for r in runs)))
    return processes.Run(seconds, cpu, max(run.peak for run in runs))


WORKLOADS = [
    Many("many", f"{OVERLAYS} overlays on a 2 GiB file, {DIFFERING} clusters of which differ in the new one, in one "
                 f"command, and one alone; of qemu-img {QEMU_TAKES} are measured and multiplied"),
]
