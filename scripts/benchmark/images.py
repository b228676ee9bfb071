"""Images to measure with: made in seconds, always the same.

What counts is which clusters hold data and which differ, not what is in them: bytes come from
slices of one random block.
"""

import os
import random
import subprocess

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
CLUSTER = 64 * KIB


class Maker:
    """Makes the images of one workload, in one directory."""

    def __init__(self, directory):
        self.directory = directory
        self.random = random.Random(2009)
        self.noise = memoryview(self.random.randbytes(4 * MIB))

    def path(self, name):
        return self.directory / name

    def raw(self, name, size, runs):
        """A raw file with data in these runs of (offset, length) and holes between them."""
        with open(self.path(name), "wb") as file:
            file.truncate(size)
            for offset, length in runs:
                for at in range(offset, offset + length, MIB):
                    self.fill(file, at, min(MIB, offset + length - at))
            os.fsync(file.fileno())

    def changed_copy(self, name, source, clusters=(), how="--sparse=auto"):
        """A copy of a raw file in which these clusters hold something else."""
        run("cp", how, self.path(source), self.path(name))
        with open(self.path(name), "r+b") as file:
            for cluster in clusters:
                self.fill(file, cluster * CLUSTER, CLUSTER)
            os.fsync(file.fileno())

    def overlay(self, name, size, clusters, backing, backing_format):
        """A qcow2 overlay that holds these clusters."""
        self.raw("held.raw", size, [(cluster * CLUSTER, CLUSTER) for cluster in clusters])
        self.convert("held.raw", name)
        run("qemu-img", "rebase", "-u", "-b", backing, "-F", backing_format, self.path(name))
        self.path("held.raw").unlink()

    def convert(self, source, name, *options):
        """A raw file as qcow2; holes become clusters that are not allocated."""
        run("qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", self.path(source), self.path(name))

    def convert_both(self, *options):
        """The raw files old and new, as qcow2 in their place."""
        for name in ("old", "new"):
            self.convert(f"{name}.raw", f"{name}.qcow2", *options)
            self.path(f"{name}.raw").unlink()

    def some_clusters(self, size, share):
        count = size // CLUSTER
        return self.some(count, round(count * share))

    def some(self, count, how_many):
        return sorted(self.random.sample(range(count), how_many))

    def text(self):
        """From now on bytes that can be compressed to about a half."""
        self.noise = memoryview(self.random.randbytes(2 * MIB).hex().encode())

    def fill(self, file, at, length):
        start = self.random.randrange(len(self.noise) - length)
        os.pwrite(file.fileno(), self.noise[start:start + length], at)


def dense_runs(size):
    """Data in seven of eight MiB."""
    return [(at, 7 * MIB) for at in range(0, size, 8 * MIB)]


def fresh_copy(source, target):
    """A copy of an overlay, on disk already: who syncs later does not pay for it."""
    run("cp", "--sparse=auto", source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def into_page_cache(directory):
    """Reads the data of all files, holes left out."""
    for path in filter(os.path.isfile, directory.iterdir()):
        with open(path, "rb", buffering=0) as file:
            for start, end in data_runs(file.fileno(), path.stat().st_size):
                for at in range(start, end, MIB):
                    os.pread(file.fileno(), min(MIB, end - at), at)


def data_runs(descriptor, size):
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # no data follows
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def run(*command):
    """Runs a command that must succeed; returns what it printed."""
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {ended.returncode}\n{ended.stdout}")
    return ended.stdout
