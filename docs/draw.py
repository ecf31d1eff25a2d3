"""Draws the pictures of the documentation: `python docs/draw.py` writes docs/pictures/*.svg.

They stand in the pages as inline SVG and take the page's colours, light or dark; on their own they are dark on light.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "pictures"
INK, FAINT = "var(--md-default-fg-color,#1d2733)", "var(--md-default-fg-color--light,#5b6875)"
BLUE, ORANGE, GREEN, PURPLE = "#3d8bd4", "#d9822b", "#2f9e5b", "#9a6dd7"
MINUS = "\N{MINUS SIGN}"


def text(x: float, y: float, words: str, size: float = 14, anchor: str = "middle", fill: str = INK) -> str:
    """A line of text on the base line y."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" style="fill:{fill}">{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 0.16) -> str:
    """A rounded box, lightly filled."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"'
    return f'<rect {place} fill="{colour}" fill-opacity="{opacity:g}" stroke="{colour}" stroke-width="1.3"/>'


def line(points: str, colour: str = FAINT, width: float = 1.4, arrow: bool = False) -> str:
    """A path, with an arrow head where it ends."""
    head = ' marker-end="url(#head)"' if arrow else ""
    return f'<path d="{points}" style="stroke:{colour}" stroke-width="{width:g}" fill="none"{head}/>'


def picture(width: int, height: int, label: str, *parts: str) -> str:
    """A whole SVG; every line of it is one element."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>'
    )
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}"'
    return "\n".join([start + ' font-family="system-ui,sans-serif">', head, *parts, "</svg>", ""])


def bits(value: int, count: int, x: float, y: float, kept: int) -> list[str]:
    """A register: one cell per bit, the first `kept` of them blue, the others orange."""
    parts = []
    for i, bit in enumerate(format(value, f"0{count}b")):
        parts.append(box(x + 21 * i, y, 19, 24, BLUE if i < kept else ORANGE, 0.2))
        parts.append(text(x + 21 * i + 9.5, y + 17, bit, 13))
    return parts


def shift() -> str:
    """An accumulator becomes a code: a shift instead of a multiplication."""
    total, places = 9_876, 7
    code = round(total / 2**places)
    return picture(
        440,
        218,
        f"The 18-bit accumulator {total}, shifted right by {places}, becomes the 8-bit code {code}",
        text(20, 22, f"accumulator {total:,}, in units of 2⁻¹³", anchor="start"),
        *bits(total, 18, 30, 34, 18 - places),
        line("M145 66L145 138", BLUE, 1.6, arrow=True),
        text(157, 92, f"{total:,} &gt;&gt; {places} = {total / 2**places}", anchor="start"),
        text(157, 112, "these bits round it, half to even", 13, anchor="start", fill=FAINT),
        line("M345 98L345 70", ORANGE, 1.4, arrow=True),
        text(20, 162, f"code {code}, in units of 2⁻⁶", anchor="start"),
        *bits(code, 8, 61, 174, 8),
        text(240, 191, "saturated to 8 bits", 13, anchor="start", fill=FAINT),
    )


def lattice() -> str:
    """Partial sums stay on the lattice, whatever the order."""
    step, origin, axis = 17, 24, 88
    ticks = [line(f"M{origin + step * i} {axis - 7}V{axis + 7}", INK) for i in range(14)]
    ticks += [line(f"M{300 + 2 * step * i} {axis - 7}V{axis + 7}", INK) for i in range(4)]
    ticks += [line(f"M{317 + 2 * step * i} {axis - 4}V{axis + 4}", ORANGE) for i in range(3)]

    def arcs(steps: list[int], colour: str, side: int) -> list[str]:
        found, at = [], 0
        for s in steps:
            a, b = origin + step * at, origin + step * (at + s)
            y = axis + side * 10
            found.append(
                line(f"M{a} {y}Q{(a + b) / 2} {y + side * (22 + 4 * abs(s))} {b} {y}", colour, 1.6, arrow=True)
            )
            at += s
        return found

    return picture(
        440,
        178,
        "Sums of integers in units of s_in times s_w: every order of summation meets the same lattice points",
        text(origin, 20, f"6 {MINUS} 4 + 9 = 11", anchor="start", fill=BLUE),
        *arcs([6, -4, 9], BLUE, -1),
        line(f"M{origin - 10} {axis}H256M288 {axis}H428", INK),
        text(272, axis + 5, "…"),
        *ticks,
        *arcs([9, -4, 6], GREEN, 1),
        text(origin, 166, f"9 {MINUS} 4 + 6 = 11", anchor="start", fill=GREEN),
        text(origin, axis + 26, "0", 13),
        text(300, axis - 16, "2²⁴", 14),
        text(364, axis + 32, "from here on every", 12.5, fill=ORANGE),
        text(364, axis + 48, "second one is missing", 12.5, fill=ORANGE),
        text(430, 166, "units of s_in · s_w", 12.5, "end", FAINT),
    )


def placement() -> str:
    """Where quantizers stand: one per tensor, fused with the ReLU, carried through pooling."""
    centre, parts = 105, []

    def operation(y: float, name: str) -> None:
        parts.extend([box(centre - 60, y, 120, 32, BLUE), text(centre, y + 21, name)])

    def arrow(y: float, end: float) -> None:
        parts.append(line(f"M{centre} {y}V{end}", INK, 1.4, arrow=True))

    def quantizer(y: float, words: str) -> None:
        parts.extend([box(centre - 11, y - 10, 22, 20, ORANGE, 0.9), text(centre, y + 5, "Q", 13, fill="#fff")])
        parts.append(text(centre + 22, y + 5, words, 13, "start", FAINT))

    def beside(y: float, *words: str) -> None:
        parts.extend(text(centre + 72, y + 17 * i, w, 13, "start", FAINT) for i, w in enumerate(words))

    parts.append(text(centre, 18, "x"))
    arrow(24, 76)
    quantizer(44, "the network's input")
    operation(78, "Conv")
    beside(91, "weight: int8, one 2ᵏ per channel", "bias: int32, units of s_x · s_w")
    arrow(110, 138)
    beside(130, "no quantizer: a ReLU follows")
    operation(140, "ReLU")
    arrow(172, 226)
    quantizer(196, "one for Conv and ReLU together")
    operation(228, "MaxPool")
    beside(249, "passes its input's encoding on")
    arrow(260, 294)
    operation(296, "Conv")
    arrow(328, 382)
    quantizer(352, "its own: nothing to fuse with")
    operation(384, "Add")
    beside(405, "exponents may differ")
    arrow(416, 440)
    operation(442, "ReLU")
    arrow(474, 524)
    quantizer(496, "one for Add and ReLU together")
    parts.append(line(f"M{centre} 277H22V400H43", INK, 1.4, arrow=True))
    return picture(440, 536, "Quantizers in a residual block", *parts)


def zero_points() -> str:
    """An odd zero point breaks ties the other way when it is added before rounding."""
    parts: list[str] = []
    for left, zero in ((16, 2), (236, 3)):
        colour = GREEN if zero % 2 == 0 else ORANGE
        parts.append(text(left + 94, 22, f"zero point {zero}: {'even' if zero % 2 == 0 else 'odd'}", fill=colour))
        for y, title, ends, goal in (
            (62, "round(0.5) + z", (0, 1), 0),
            (142, "round(0.5 + z)", (zero, zero + 1), round(zero + 0.5)),
        ):
            at = [left + 30, left + 158]
            parts.append(line(f"M{left + 10} {y + 22}H{left + 178}", INK))
            parts += [line(f"M{a} {y + 16}V{y + 28}", INK) for a in at]
            parts += [text(a, y + 44, str(end), 13) for a, end in zip(at, ends, strict=True)]
            result = goal + zero if y == 62 else goal
            parts.append(text(left + 94, y, f"{title} = {result}"))
            parts.append(f'<circle cx="{left + 94}" cy="{y + 22}" r="4.5" fill="{colour}"/>')
            target = at[goal - ends[0]]
            parts.append(
                line(f"M{left + 94} {y + 16}Q{(left + 94 + target) / 2} {y + 4} {target} {y + 15}", colour, 1.6, True)
            )
    parts.append(line("M220 10V196", FAINT, 0.8))
    return picture(440, 206, "Rounding half to even before and after an even and an odd zero point is added", *parts)


def method() -> str:
    """Which method: questions from top to bottom, answers to the right."""
    parts: list[str] = []

    def block(x: int, y: int, colour: str, *words: str) -> None:
        parts.append(box(x, y, 178, 48, colour))
        first = y + 29 - 9 * (len(words) - 1)
        parts.extend(text(x + 89, first + 18 * i, w, 12.5) for i, w in enumerate(words))

    def step(points: str, x: int, y: int, word: str) -> None:
        parts.append(line(points, FAINT, arrow=True))
        parts.append(text(x, y, word, 12.5, fill=FAINT))

    questions = ["Is the accuracy kept?"], ["Weights of 8 bits?"], ["Activations of 8 bits?"], ["Minutes to spend?"]
    for row, words in enumerate(questions):
        y = 10 + 92 * row
        block(10, y, ORANGE, *words)
        step(f"M188 {y + 24}H236", 211, y + 17, "yes")
        step(f"M99 {y + 48}V{y + 90}", 112, y + 74, "no")
    block(238, 10, GREEN, "Stop; or fewer bits:", "pow2quant search")
    block(238, 102, ORANGE, "Depthwise layers", "or ReLU6?")
    step("M416 126H464", 440, 142, "yes")
    block(466, 102, GREEN, "equalize, output_mse,", "bias_correction")
    step("M416 126C450 126 430 72 464 72", 424, 88, "no")
    block(466, 40, GREEN, "more calibration data;", "see the weakest layer")
    block(238, 194, GREEN, "auto; or output_mse,", "adaround, bias_correction")
    block(238, 286, GREEN, "auto; or output_mse,", "qdrop, bias_correction")
    block(10, 378, GREEN, "pow2quant qat", "--mode full")
    label = "Which method: the questions and answers that the list below has in words"
    return picture(654, 436, label, *parts)


COLOURS = {"ptq": BLUE, "qat": ORANGE, "validate": GREEN, "export --to c": PURPLE}


def panel(rows: list[dict[str, Any]], key: str, title: str, top: float) -> list[str]:
    """A measure of every command over the number of weights, on two logarithmic axes."""
    left, width, height = 70, 350, 160
    values = [row[key] for row in rows]
    ticks = [c * 10**e for e in range(6) for c in (1, 2, 5) if min(values) * 0.75 <= c * 10**e <= max(values) * 1.4]
    low, high = math.log10(min(*values, *ticks)), math.log10(max(*values, *ticks))
    first, last = (math.log10(pick(row["weights"] for row in rows)) for pick in (min, max))

    def place(weights: float, value: float) -> tuple[float, float]:
        x = left + width * (math.log10(weights) - first) / (last - first)
        return round(x, 1), round(top + height * (high - math.log10(value)) / (high - low), 1)

    parts = [text(left, top - 14, title, anchor="start")]
    for tick in ticks:
        _, y = place(10**first, tick)
        parts += [line(f"M{left} {y}H{left + width}", FAINT, 0.4), text(left - 8, y + 4, f"{tick:,}", 12, "end")]
    for exponent in range(math.ceil(first), math.floor(last) + 1):
        x, _ = place(10**exponent, 1)
        parts.append(line(f"M{x} {top}V{top + height}", FAINT, 0.4))
        parts.append(text(x, top + height + 17, f"{10**exponent:,}", 12))
    for command, colour in COLOURS.items():
        points = sorted(place(row["weights"], row[key]) for row in rows if row["command"] == command)
        parts.append(line("M" + "L".join(f"{x} {y}" for x, y in points), colour, 2))
        parts += [f'<circle cx="{x}" cy="{y}" r="3.2" fill="{colour}"/>' for x, y in points]
    return parts


def sizes() -> str:
    """Time and memory of every command over network size; `benchmarks/sizes.py` measures."""
    rows = json.loads((FOLDER.parent / "sizes.json").read_text(encoding="utf-8"))
    parts = [*panel(rows, "seconds", "CPU time, s", 34), *panel(rows, "mebibytes", "peak of memory, MiB", 250)]
    parts.append(text(245, 447, "weights", 12))
    for i, (command, colour) in enumerate(COLOURS.items()):
        parts += [line(f"M{70 + 84 * i} 476h16", colour, 3), text(91 + 84 * i, 480, command, 12.5, "start")]
    return picture(440, 492, "CPU time and peak of memory of four commands over the number of weights", *parts)


PICTURES = {
    "shift": shift,
    "lattice": lattice,
    "placement": placement,
    "zero-points": zero_points,
    "method": method,
    "sizes": sizes,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
