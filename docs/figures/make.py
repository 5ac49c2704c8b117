"""Draw the figures of the concept pages, in light and dark, from the committed files of a demo run.

    python docs/figures/make.py

Writes direction, tokens and distillation as `<name>-light.svg` and `<name>-dark.svg`. Standard library
only, so that the same files come out everywhere; a test compares them with what is committed.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "example"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
INK = {"light": ("#1f2933", "#5b6673", "#e4e2dc"), "dark": ("#e6e4df", "#a4acb5", "#3d434a")}
TEAL, ORANGE, VIOLET, GREY, ROSE = "#0d9488", "#d97706", "#8b5cf6", "#7b8794", "#c2556a"  # as in the report
WIDTH = 480  # narrow, so that the text stays readable on a phone

Point = tuple[float, float]


class Drawing:
    """An SVG that is written from top to bottom. `ink` is for text, `soft` for notes, `line` for axes."""

    def __init__(self, theme: str, height: int, title: str) -> None:
        self.ink, self.soft, self.line = INK[theme]
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
            f' font-family="{FONT}" font-size="14">',
            f"<title>{escape(title)}</title>",
        ]

    def text(self, x: float, y: float, text: str, fill: str = "", *, anchor: str = "start", extra: str = ""):
        """Write one line of text."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill or self.ink}" text-anchor="{anchor}"{extra}>'
            f"{escape(text)}</text>"
        )

    def heading(self, y: float, text: str) -> None:
        """Write a line in bold."""
        self.text(0, y, text, extra=' font-weight="600" font-size="15"')

    def segment(self, a: Point, b: Point, stroke: str = "", *, width: float = 1, extra: str = "") -> None:
        """Draw a straight line."""
        self.parts.append(
            f'<path d="M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" stroke="{stroke or self.line}"'
            f' stroke-width="{width}" fill="none"{extra}/>'
        )

    def curve(self, points: Iterable[Point], stroke: str, *, width: float = 2, extra: str = "") -> None:
        """Draw a line through points."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(
            f'<path d="M{path}" stroke="{stroke}" stroke-width="{width}" fill="none"'
            f' stroke-linejoin="round"{extra}/>'
        )

    def band(self, upper: list[Point], lower: list[Point], fill: str) -> None:
        """Fill the area between two lines."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *reversed(lower)])
        self.parts.append(f'<path d="M{path}Z" fill="{fill}" fill-opacity="0.2"/>')

    def dot(self, at: Point, fill: str, *, hollow: bool = False) -> None:
        """Draw a point."""
        look = f'fill="none" stroke="{fill}" stroke-width="2"' if hollow else f'fill="{fill}"'
        self.parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4.5" {look}/>')

    def box(self, at: Point, size: Point, stroke: str, *, fill: str = "none", extra: str = "") -> None:
        """Draw a rectangle with round corners."""
        self.parts.append(
            f'<rect x="{at[0]:.1f}" y="{at[1]:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}" rx="4"'
            f' fill="{fill}" stroke="{stroke}"{extra}/>'
        )

    def arrow(self, a: Point, b: Point, stroke: str) -> None:
        """Draw a line with a tip at `b`."""
        self.segment(a, b, stroke, width=1.6)
        angle = math.atan2(b[1] - a[1], b[0] - a[0])
        for turn in (2.6, -2.6):
            tip = b[0] + 8 * math.cos(angle + turn), b[1] + 8 * math.sin(angle + turn)
            self.segment(b, tip, stroke, width=1.6)

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def scale(domain: Point, pixels: Point) -> Callable[[float], float]:
    """Map `domain` linearly to `pixels`."""
    share = (pixels[1] - pixels[0]) / (domain[1] - domain[0])
    return lambda value: pixels[0] + (value - domain[0]) * share


def direction(theme: str) -> None:
    """Draw stage 1: a candidate per layer with interval and controls, and the answers of the best three."""
    rows = [row for row in _table("sweep.csv") if row["steering_refusal"]]
    d = Drawing(
        theme, 622, "One candidate direction per layer, and how the answers chose between the best three"
    )
    d.heading(16, "A candidate per layer: how far does it push a")
    d.heading(35, "harmless prompt towards a refusing first token?")
    x, y = scale((0, 29), (46, WIDTH - 8)), scale((-4.6, 0.35), (325, 60))
    for value in (-4, -3, -2, -1, 0):
        d.segment(
            (46, y(value)), (WIDTH - 8, y(value)), extra=' stroke-dasharray="4 4"' if value == 0 else ""
        )
        d.text(38, y(value) + 5, f"{value}".replace("-", "\u2212"), d.soft, anchor="end")
    d.text(WIDTH - 8, y(0) - 7, "0: a refusing token is as likely as not", d.soft, anchor="end")
    for layer in (0, 5, 10, 15, 20, 25, 29):
        d.text(x(layer), 345, str(layer), d.soft, anchor="middle")
    d.text(0, 368, "refusal score (nats) when added, by layer; last fifth not run", d.soft)

    def points(name: str) -> list[Point]:
        return [(x(float(r["layer"])), y(float(r[name]))) for r in rows if r[name]]

    d.band(points("steering_refusal_high"), points("steering_refusal_low"), TEAL)
    d.curve(points("steering_refusal"), TEAL)
    for at in points("steering_refusal"):
        d.dot(at, TEAL)
    for name, colour in (("steering_refusal_random", ROSE), ("steering_refusal_shuffled", VIOLET)):
        for at in points(name):
            d.dot(at, colour, hollow=True)
    legend = (("candidate, 95 %", TEAL, False), ("random", ROSE, True), ("shuffled labels", VIOLET, True))
    at = 0.0
    for label, colour, hollow in legend:
        d.dot((at + 6, 388), colour, hollow=hollow)
        d.text(at + 16, 393, label, d.soft)
        at += 30 + 7.4 * len(label)

    d.heading(428, "The first token is not the answer: how many of 16")
    d.heading(447, "harmful prompts get an answer that refuses?")
    rates = _table("calibration.csv")
    coeffs = sorted({row["coeff"] for row in rates})
    best = max(rates, key=lambda row: float(row["refusal_rate"]))["layer"]  # the first of equal ones
    colours = dict(
        zip(dict.fromkeys((best, *(row["layer"] for row in rates))), (TEAL, ORANGE, GREY), strict=True)
    )
    column, w = scale((0, len(coeffs)), (20, WIDTH)), 27
    height = scale((0, 1), (0, 100))
    d.segment((20, 594), (WIDTH, 594))
    for i, coeff in enumerate(coeffs):
        d.text(column(i + 0.5), 614, f"coefficient {coeff}", d.soft, anchor="middle")
        for j, (layer, colour) in enumerate(colours.items()):
            rate = next(float(r["refusal_rate"]) for r in rates if (r["coeff"], r["layer"]) == (coeff, layer))
            left = column(i + 0.5) + (j - 1.5) * (w + 4)
            d.box((left, 594 - height(rate)), (w, height(rate)), colour, fill=colour)
            d.text(left + w / 2, 589 - height(rate), f"{16 * rate:.0f}", d.soft, anchor="middle")
    for j, (layer, colour) in enumerate(colours.items()):
        d.text(30 + 78 * j, 468, f"layer {layer}", colour, extra=' font-weight="600"')
    d.save(HERE / f"direction-{theme}.svg")


def tokens(theme: str) -> None:
    """Draw stage 2: the most voted tokens with and without steering, and how much of the change S carries."""
    data = json.loads((EXAMPLE / "tokens.json").read_text(encoding="utf-8"))
    chosen = [t for t in data["tokens"] if t["text"].strip("\ufffd")][:20]
    d = Drawing(theme, 700, "The most voted safety tokens, and the share of the change that all fifty carry")
    d.heading(16, "The 20 most voted of 50 tokens: mean probability")
    x = scale((math.log10(1e-4), math.log10(0.08)), (168, WIDTH - 14))
    for value, label in ((1e-4, "0.0001"), (1e-3, "0.001"), (1e-2, "0.01")):
        d.segment((x(math.log10(value)), 48), (x(math.log10(value)), 462))
        d.text(x(math.log10(value)), 482, label, d.soft, anchor="middle")
    d.dot((180, 36), GREY)
    d.text(190, 41, "base", d.soft)
    d.dot((240, 36), ORANGE)
    d.text(250, 41, "steered", d.soft)
    d.text(160, 41, "votes", d.soft, anchor="end")
    for i, token in enumerate(chosen):
        y = 62 + 20.5 * i
        base, steered = (x(math.log10(max(token[p], 1e-4))) for p in ("p_base", "p_steered"))
        d.segment((base, y), (steered, y), d.soft, width=1.5)
        d.dot((base, y), GREY)
        d.dot((steered, y), ORANGE)
        text = token["text"].replace(" ", "\u2423").replace("\n", "\u21b5")
        d.text(0, y + 5, text, extra=' font-size="13.5"')
        d.text(160, y + 5, str(token["votes"]), d.soft, anchor="end")

    d.heading(520, "How much of KL(teacher, base) do fifty carry?")
    coverage = json.loads((EXAMPLE / "attribution.json").read_text(encoding="utf-8"))["coverage"]["texts"][0]
    at, limit = coverage["ks"].index(50), scale((0, 0.5), (200, WIDTH - 58))
    colours = {"best possible": GREY, "S": TEAL, "random candidates": ORANGE}
    names = {"random candidates": "random, candidates", "random": "random, vocabulary"}
    for i, name in enumerate(
        ("best possible", "S", "random candidates", "matched in base probability", "random")
    ):
        family = next(c for c in coverage["curves"] if c["name"] == name)["kl_share"]
        y, end = 540 + 32 * i, limit(family["mean"][at])
        colour = colours.get(name, VIOLET if name.startswith("matched") else ROSE)
        d.text(0, y + 15, names.get(name, name))
        d.box((200, y), (max(1.0, end - 200), 20), colour, fill=colour)
        low, high = limit(family["low"][at]), limit(family["high"][at])
        if high - low > 4:
            d.segment((low, y + 10), (high, y + 10), d.ink, width=1.5)
        d.text(max(end, high) + 6, y + 15, f"{family['mean'][at]:.1%}".replace("%", " %"), d.soft)
    d.save(HERE / f"tokens-{theme}.svg")


def distillation(theme: str) -> None:
    """Draw stage 3: what is compared in a step, and the probability of S while the demo trains."""
    d = Drawing(
        theme, 610, "What a step of localized distillation compares, and the mass on S while training"
    )
    d.heading(16, "One step")
    for y, colour, lines in (
        (32, TEAL, ("student", "answers", "harmful prompts")),
        (192, VIOLET, ("student", "answers", "harmless prompts")),
    ):
        d.box((0, y), (142, 84), colour)
        for i, line in enumerate(lines):
            d.text(71, y + 26 + 20 * i, line, anchor="middle")
    for y, colour, words, compared, where in (
        (30, ORANGE, "teacher = base + direction", (3, 4, 9, 15, 16, 20), "the 50 tokens of S alone"),
        (190, GREY, "the base as it is", range(22), "the whole vocabulary"),
    ):
        d.text(190, y + 12, words, colour, extra=' font-weight="600"')
        d.text(190, y + 32, "reads the same tokens", d.soft)
        for i in range(22):  # the vocabulary as a strip; S is a few of its tokens
            counts = i in compared
            fill = colour if counts else "none"
            d.box((190 + 12.6 * i, y + 42), (10, 22), colour if counts else d.line, fill=fill)
        d.text(190, y + 86, f"compared on {where}", d.soft)
        d.arrow((146, y + 44), (182, y + 44), d.soft)
    d.text(0, 152, "loss = divergence on S, harmful prompts")
    d.text(0, 172, "+ weight \u00d7 divergence, harmless prompts (not in the paper)")

    d.heading(336, "The demo: probability of S, by step")
    lines = (EXAMPLE / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    x, y = scale((1, len(history)), (46, WIDTH - 8)), scale((0, 0.45), (560, 372))
    for value in (0, 0.1, 0.2, 0.3, 0.4):
        d.segment((46, y(value)), (WIDTH - 8, y(value)))
        d.text(38, y(value) + 5, f"{value:g}", d.soft, anchor="end")
    for step in (1, 15, 30, 45, 60, 75):
        d.text(x(step), 580, str(step), d.soft, anchor="middle")
    d.text(0, 602, "each step has other prompts, hence the noise", d.soft)
    shown = (
        ("mass_on_s_teacher", ORANGE, "teacher, harmful"),
        ("mass_on_s_student", TEAL, "student, harmful"),
        ("mass_on_s_anchor", VIOLET, "student, harmless"),
    )
    for i, (name, colour, label) in enumerate(shown):
        d.curve([(x(row["step"]), y(row[name])) for row in history], colour)
        d.text(20 + 152 * i, 358, label, colour, extra=' font-weight="600"')
    d.save(HERE / f"distillation-{theme}.svg")


def _table(name: str) -> list[dict[str, str]]:
    with (EXAMPLE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Write every figure in both themes."""
    for theme in INK:
        direction(theme)
        tokens(theme)
        distillation(theme)


if __name__ == "__main__":
    main()
