"""Draw README's figure: ordinary arrows against rewired ones; `python docs/figures/wiring.py` writes both svg files.

One file is for light pages and one for dark ones; README chooses by the reader's theme.
"""

import re
from pathlib import Path

PALETTES = {
    "light": {"ink": "#1f2328", "pale": "#59636e", "kept": "#0969da", "page": "#ffffff", "skip": "#bc4c00"},
    "dark": {"ink": "#e6edf3", "pale": "#9198a1", "kept": "#4493f8", "page": "#0d1117", "skip": "#f0883e"},
}
WIDTH, HEIGHT = 888, 372
BRANCHES, FIRST, UNIT = 4, 52, 196  # x of s_0, and from a state to the next
BRANCH, PLUS = 68, 132  # from a state to its branch and to the sum behind it
STATE, SUM = 20, 9  # radii
ROWS = {"ordinary": 112, "rewired": 296}  # y of the states


def draw(theme: str) -> str:
    """Return the svg for a theme of PALETTES."""
    colors = PALETTES[theme]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"',
        ' font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="15" role="img"',
        ' aria-label="Ordinary residual chain: every sum takes the state just before its branch, and every state is '
        "kept for the backward pass. Rewired chain: every sum takes the state one earlier, and only the last two "
        'states are kept.">',
        *(marker(name, colors[name]) for name in ("ink", "skip")),
        *row("ordinary", colors),
        *row("rewired", colors),
        text(FIRST - STATE, 24, "<b>ordinary</b>   s[i+1] = F[i](s[i]) + s[i]", colors["ink"]),
        text(WIDTH - 32, 24, "backward pass: every state is kept", colors["pale"], anchor="end"),
        text(FIRST - STATE, 204, "<b>rewired</b>   s[i+1] = F[i](s[i]) + s[i−1]", colors["ink"]),
        text(
            WIDTH - 32,
            204,
            "backward pass: the last two are kept, s[i−1] = s[i+1] − F[i](s[i])",
            colors["pale"],
            anchor="end",
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def row(wiring: str, colors: dict[str, str]) -> list[str]:
    """Return states, branches, sums and arrows of one chain."""
    y, parts = ROWS[wiring], []
    for i in range(BRANCHES):
        parts += skip(i, max(i - 1, 0) if wiring == "rewired" else i, y, colors)
        x = FIRST + i * UNIT
        for begin, end in ((STATE, BRANCH - 24), (BRANCH + 24, PLUS - SUM), (PLUS + SUM, UNIT - STATE)):
            parts.append(arrow(f"M{x + begin} {y}H{x + end - 2}", colors, "ink"))
        parts.append(box(x + BRANCH, y, colors))
        parts.append(text(x + BRANCH, y + 5, f"F[{i}]", colors["ink"], anchor="middle"))
        parts += plus(x + PLUS, y, colors)
    for i in range(BRANCHES + 1):
        kept = wiring == "ordinary" or i >= BRANCHES - 1
        parts += state(FIRST + i * UNIT, y, f"s[{i}]", kept, colors)
    return parts


def skip(i: int, source: int, y: int, colors: dict[str, str]) -> list[str]:
    """Return the arrow from a state to the i-th sum; long ones lie above and below in turn, so that none cross."""
    side = 1 if source < i and i % 2 else -1
    x, end, rise = FIRST + source * UNIT, FIRST + i * UNIT + PLUS, 74 if source < i else 46
    path = f"M{x} {y + side * STATE}C{x} {y + side * rise} {end} {y + side * rise} {end} {y + side * (SUM + 3)}"
    return [arrow(path, colors, "skip")]


def state(x: int, y: int, label: str, kept: bool, colors: dict[str, str]) -> list[str]:
    """Return a state: filled if it is kept for the backward pass, dashed if it is computed again."""
    look = (
        f'fill="{colors["kept"]}" stroke="{colors["kept"]}"'
        if kept
        else f'fill="none" stroke="{colors["pale"]}" stroke-dasharray="4 3"'
    )
    circle = f'<circle cx="{x}" cy="{y}" r="{STATE}" {look} stroke-width="1.5"/>'
    return [circle, text(x, y + 5, label, colors["page"] if kept else colors["ink"], anchor="middle")]


def box(x: int, y: int, colors: dict[str, str]) -> str:
    """Return a branch."""
    return (
        f'<rect x="{x - 24}" y="{y - 17}" width="48" height="34" rx="5" fill="none" '
        f'stroke="{colors["ink"]}" stroke-width="1.5"/>'
    )


def plus(x: int, y: int, colors: dict[str, str]) -> list[str]:
    """Return a sum."""
    look = f'fill="none" stroke="{colors["ink"]}" stroke-width="1.5"'
    return [f'<circle cx="{x}" cy="{y}" r="{SUM}" {look}/>', f'<path d="M{x - 5} {y}h10M{x} {y - 5}v10" {look}/>']


def arrow(path: str, colors: dict[str, str], color: str) -> str:
    """Return a line with a head."""
    width = 2 if color == "skip" else 1.5
    return f'<path d="{path}" fill="none" stroke="{colors[color]}" stroke-width="{width}" marker-end="url(#{color})"/>'


def marker(name: str, color: str) -> str:
    """Return the head of arrows of a colour."""
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
    )


def text(x: int, y: int, words: str, color: str, *, anchor: str = "start") -> str:
    """Return text in which [i] is an index and <b>…</b> bold."""
    words = words.replace("<b>", '<tspan font-weight="600">').replace("</b>", "</tspan>")
    words = re.sub(r"\[(.+?)\]", r'<tspan dy="4" font-size="11">\1</tspan><tspan dy="-4">&#8203;</tspan>', words)
    return f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}" xml:space="preserve">{words}</text>'


def main() -> None:
    """Write wiring-light.svg and wiring-dark.svg beside this file."""
    for theme in PALETTES:
        Path(__file__).with_name(f"wiring-{theme}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
