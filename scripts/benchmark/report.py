"""The table: medians, ratios, memory, size."""

from statistics import median
from typing import NamedTuple

HEADING = [
    "| workload | rebasefs | {beside} | ratio | lowest – highest | processor time | peak memory | overlay afterwards |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
]

LEGEND = """Seconds are medians. The ratio is rebasefs / the other, the median over the pairs of runs (below 1: rebasefs
is faster). Processor time: medians, rebasefs / QEMU; for reads, that of the server. Memory (resident) and size of the overlay: rebasefs / QEMU, the highest of all runs. `many: 100` is one run of rebasefs, and of qemu-img 5 that were measured, times 20."""


class Row(NamedTuple):
    name: str
    ours: list  # of Run
    other: list  # of Run
    unit: str = ""  # what there is to do, for a rate beside the seconds: "MiB", "reads"
    amount: int = 0
    sizes: tuple = ()  # of the overlays afterwards, in bytes
    beside: str = "QEMU"  # what the others are runs of


def heading(beside):
    return [line.format(beside=beside) for line in HEADING]


def line(row):
    ratios = [ours.seconds / other.seconds for ours, other in zip(row.ours, row.other)]
    spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
    cpu = " / ".join(f"{median(run.cpu for run in runs):.2f} s" for runs in (row.ours, row.other))
    peaks = " / ".join(size(max(run.peak for run in runs)) for runs in (row.ours, row.other))
    sizes = " / ".join(map(size, row.sizes)) or "–"
    name = row.name if row.beside == "QEMU" else f"{row.name}; beside {row.beside}"
    cells = [name, time(row, row.ours), time(row, row.other), f"**{median(ratios):.2f}**", spread, cpu, peaks, sizes]
    return f"| {' | '.join(cells)} |"


def time(row, runs):
    seconds = median(run.seconds for run in runs)
    rate = f" ({row.amount / seconds:,.0f} {row.unit}/s)" if row.amount else ""
    return f"{seconds:.3f} s{rate}" if seconds < 1 else f"{seconds:.2f} s{rate}"


def size(count):
    return f"{count / (1 << 20):,.0f} MiB"
