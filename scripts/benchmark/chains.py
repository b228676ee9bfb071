"""Long chains: what hundreds of layers cost beside one layer that holds the same data, and opening them.

Each layer holds its share of all clusters, at random places, so that neighbours come from different
files.
"""

import contextlib
import shutil
from typing import Callable, NamedTuple

from . import images, processes, reads
from .images import CLUSTER, GIB
from .rebases import demand_same
from .report import Row

LAYERS = 500
TO_NEW = ["rebase", "-b", "new.raw", "-F", "raw"]


class Chains(NamedTuple):
    name: str
    what: str
    take: Callable  # yields rows
    layers: int = LAYERS
    runs: int = 5

    def measure(self, program, scratch, runs, is_quick):
        directory = scratch / self.name
        directory.mkdir()
        try:
            size, layers = (GIB // 8, self.layers // 4) if is_quick else (GIB, self.layers)
            make(images.Maker(directory), size, layers)
            images.into_page_cache(directory)
            yield from self.take(program, directory, runs, layers)
        finally:
            shutil.rmtree(directory)


def make(make, size, layers):
    """deep.qcow2 on so many layers, flat.qcow2 on one, and new.raw, in which 1 % differs."""
    count = size // CLUSTER
    places = make.some(count, count)
    make.random.shuffle(places)
    share = count // layers
    make.raw("base.raw", size, [])
    below, backing_format = "base.raw", "raw"
    for number in range(layers):
        name = f"layer{number}.qcow2"
        make.overlay(name, size, sorted(places[number * share:][:share]), below, backing_format)
        below, backing_format = name, "qcow2"
    below = make.path(below)
    images.run("qemu-img", "convert", "-O", "raw", below, make.path("one.raw"))
    make.changed_copy("new.raw", "one.raw", make.some_clusters(size, 0.01))
    make.convert("one.raw", "one.qcow2")
    for name, backing in (("deep.qcow2", below), ("flat.qcow2", make.path("one.qcow2"))):
        images.run("qemu-img", "create", "-f", "qcow2", "-b", backing, "-F", "qcow2", make.path(name))


def rebase(program, directory, runs, layers):
    measured = {"deep": [], "flat": []}
    for _ in range(runs):
        for name, taken in measured.items():
            images.fresh_copy(directory / f"{name}.qcow2", directory / "cow.qcow2")
            taken.append(processes.timed([program, *TO_NEW, "cow.qcow2"], directory))
            demand_same(directory, "flat.qcow2", "cow.qcow2")
    yield Row(f"rebase, {layers} layers", *measured.values(), beside="1 layer")


def opening(program, directory, runs, layers):
    command = ["map", "--start-offset=0", "--max-length=65536", "deep.qcow2"]
    pairs = [[processes.timed([each, *command], directory) for each in (program, "qemu-img")] for _ in range(runs)]
    yield Row(f"open {layers} layers", *zip(*pairs))


def reading(program, directory, runs, layers):
    """4 KiB at random places, by one reader, from a mount of each."""
    read = reads.random_direct(1)
    with contextlib.ExitStack() as servers:
        deep, flat = (servers.enter_context(reads.ours(program, directory, f"{name}.qcow2")) for name in ("deep", "flat"))
        qemu = servers.enter_context(reads.qemu(directory, "deep.qcow2"))
        reads.demand_same(deep.path, qemu.path)
        for _ in range(runs):
            for export in (deep, flat, qemu):
                export.runs.append(reads.taken(export, read))
    name = f"random-1, {layers} layers"
    yield Row(name, deep.runs, qemu.runs, "reads", reads.SMALL_READS)
    yield Row(name, deep.runs, flat.runs, "reads", reads.SMALL_READS, beside="1 layer")


def all_of_it(*arguments):
    for take in (opening, rebase, reading):
        yield from take(*arguments)


WORKLOADS = [
    Chains("chain-64", "64 layers that hold 1 GiB: reading 4 KiB at random places", reading, layers=64),
    Chains("chain-500", "500 layers that hold 1 GiB: opening, a rebase, reading 4 KiB at random places", all_of_it),
]
