"""The table as a picture for a page: a line a workload, the ratio on a logarithmic scale."""

from html import escape
from math import ceil, floor, log10
from statistics import median

LEFT, WIDTH, RIGHT = 230, 560, 130  # names, the scale, figures
TOP, LINE, BOTTOM = 110, 28, 46
MOST_DECADES = 4  # beyond that, a dot stands at the edge, and its figure says where it belongs

# Colours are written out: viewers other than browsers know no variables.
STYLE = """
.page{fill:#ffffff}text{fill:#1f2328;font:14px system-ui,sans-serif}.title{font-size:17px;font-weight:600}
.weak{fill:#59636e}.small{font-size:12px}.end{text-anchor:end}.middle{text-anchor:middle}
.scale{stroke:#d9dee3}.one{stroke:#1f2328;stroke-dasharray:4 3}
.fast{fill:#0969da;stroke:#0969da}.slow{fill:#c2410c;stroke:#c2410c}.span{stroke-width:4;stroke-opacity:.4;stroke-linecap:round}
@media (prefers-color-scheme:dark){.page{fill:#0d1117}text{fill:#e6edf3}.weak{fill:#9aa4af}
.scale{stroke:#2d343c}.one{stroke:#e6edf3}.fast{fill:#4c9dff;stroke:#4c9dff}.slow{fill:#ff9d45;stroke:#ff9d45}}
"""


def document(rows, machine):
    """The rows of the table that were measured, and what they were measured on."""
    lines = [(label(row), ratios(row)) for row in rows]
    low, high = decades([ratio for _, all_of_them in lines for ratio in all_of_them])
    bottom = TOP + LINE * len(lines)
    width, height = LEFT + WIDTH + RIGHT, bottom + BOTTOM

    def x(ratio):
        place = (log10(ratio) - low) / (high - low)
        return round(LEFT + WIDTH * min(max(place, 0), 1), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>rebasefs beside QEMU</title><style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        '<text class="title" x="20" y="34">Time of rebasefs / time of QEMU, or of what is named</text>',
        *about(machine),
        *scale(low, high, x, bottom),
    ]
    for number, (name, found) in enumerate(lines):
        parts += one_line(name, found, x, TOP + LINE * number + LINE // 2)
    return "\n".join([*parts, "</svg>", ""])


def about(machine):
    first = " ".join(machine.split())
    for number, words in enumerate(wrapped(first, 124)[:2]):
        yield f'<text class="weak small" x="20" y="{54 + 16 * number}">{escape(words)}</text>'


def wrapped(text, room):
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 1 > room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def label(row):
    return row.name if row.beside == "QEMU" else f"{row.name} / {row.beside}"


def ratios(row):
    return [max(ours.seconds / other.seconds, 1e-9) for ours, other in zip(row.ours, row.other)]


def decades(found):
    """The powers of ten that the scale begins and ends with; 1 lies between them."""
    low = floor(min([log10(ratio) for ratio in found] + [-0.1]))
    high = ceil(max([log10(ratio) for ratio in found] + [0.3]))
    return max(low, high - MOST_DECADES), high


def scale(low, high, x, bottom):
    for power in range(low, high + 1):
        for step in (1, 2, 5):
            ratio = step * 10.0**power
            if log10(ratio) > high:
                continue
            place = x(ratio)
            kind = "one" if ratio == 1 else "scale"
            yield f'<line class="{kind}" x1="{place}" x2="{place}" y1="{TOP - 4}" y2="{bottom}"/>'
            if step == 1 or high - low <= 2:
                yield f'<text class="weak small middle" x="{place}" y="{bottom + 18}">{ratio:g}</text>'
    yield f'<text class="weak small end" x="{x(1) - 10}" y="{TOP - 12}">← rebasefs is faster</text>'
    yield f'<text class="weak small" x="{x(1) + 10}" y="{TOP - 12}">the other is faster →</text>'
    yield f'<text class="weak small middle" x="{LEFT + WIDTH / 2}" y="{bottom + 36}">a dot is the median, a bar reaches from the lowest to the highest ratio</text>'


def one_line(name, found, x, y):
    middle = median(found)
    kind = "fast" if middle < 1 else "slow"
    short = name if len(name) <= 28 else name[:27] + "…"
    times = f"{1 / middle:,.3g}× faster" if middle < 1 else f"{middle:,.3g}× slower"
    times = "as fast" if 0.99 < middle < 1.01 else times
    told = f"{name}: {middle:.3g} ({min(found):.3g} – {max(found):.3g})"
    yield f'<g><title>{escape(told)}</title><text class="end" x="{LEFT - 14}" y="{y + 5}">{escape(short)}</text>'
    yield f'<line class="{kind} span" x1="{x(min(found))}" x2="{x(max(found))}" y1="{y}" y2="{y}"/>'
    yield f'<circle class="{kind}" cx="{x(middle)}" cy="{y}" r="5"/>'
    yield f'<text x="{LEFT + WIDTH + 14}" y="{y + 5}">{times}</text></g>'
