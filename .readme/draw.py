# SPDX-License-Identifier: MIT-0
"""Draws the value functions of people and of KTO: python draw.py value.svg"""

import math
import sys

BLACK, GREY, ORANGE = "#222222", "#6b6b6b", "#c04f00"
LIGHT_BLUE, BLUE, DARK_BLUE = "#4a9ad0", "#0072b2", "#003350"
WIDTH, HEIGHT, TOP = 210, 235, 96  # The size of each plot and its upper edge, in pixels.
svg = []


def people(gain):
    """Tversky and Kahneman, 1992: a loss weighs 2.25 times as much as the same gain."""
    return gain**0.88 if gain >= 0 else -2.25 * (-gain) ** 0.88


def kto(distance, beta=0.1, weight=1, desirable=True):
    """The distance is r - z0: it is a gain for a desirable row, a loss for an undesirable row."""
    gain = distance if desirable else -distance
    return weight / (1 + math.exp(-beta * gain))


def kto_moved(gain):
    """KTO's value, moved so that no gain is worth 0 and scaled so that a gain of 1 is worth 1."""
    return (kto(gain, beta=1) - 0.5) / (kto(1, beta=1) - 0.5)


def text(x, y, words, color=BLACK, anchor="start", more=""):
    words = words.replace("-", "\N{MINUS SIGN}")
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    svg.append(f'<text {place} fill="{color}" {more}>{words}</text>')


class Plot:
    def __init__(self, left, y_max, x_ticks, y_ticks, x_title, y_title, title, notes):
        self.left, self.x_max, self.y_min, self.y_max = left, x_ticks[-1], y_ticks[0], y_max
        text(left - 44, 28, title, more='font-size="17" font-weight="bold"')
        text(left - 44, 51, notes[0])
        text(left - 44, 69, notes[1])
        for x in x_ticks:
            text(self.pixel(x, 0)[0], TOP + HEIGHT + 18, f"{x}", anchor="middle")
        for y in y_ticks:
            text(left - 6, self.pixel(0, y)[1] + 4, f"{y}", anchor="end")
        text(left + WIDTH / 2, TOP + HEIGHT + 41, x_title, anchor="middle")
        turn = f'transform="translate({left - 33} {TOP + HEIGHT / 2}) rotate(-90)"'
        text(0, 0, y_title, anchor="middle", more=turn)

        # The dashed line marks the reference point, the other line marks value 0.
        self.line([-self.x_max, self.x_max], [0, 0], GREY)
        self.line([0, 0], [self.y_min, y_max], GREY, 'stroke-dasharray="3 3"')

    def pixel(self, x, y):
        right = (x + self.x_max) / (2 * self.x_max)
        down = (self.y_max - y) / (self.y_max - self.y_min)
        return self.left + right * WIDTH, TOP + down * HEIGHT

    def line(self, xs, ys, color, more=""):
        pixels = [self.pixel(x, y) for x, y in zip(xs, ys)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        svg.append(f'<polyline points="{points}" fill="none" stroke="{color}" {more}/>')

    def curve(self, color, function, **settings):
        xs = [self.x_max * step / 50 for step in range(-50, 51)]
        self.line(xs, [function(x, **settings) for x in xs], color, 'stroke-width="2.5"')

    def dot(self, x, y, color):
        x, y = self.pixel(x, y)
        svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')

    def label(self, x, y, words, color=BLACK, anchor="start"):
        text(*self.pixel(x, y), words, color, anchor)


notes = ["KTO's curve is moved to 0 at z0, and", "scaled so that a gain of 1 is worth 1."]
x_title = "loss or gain; for KTO beta (r - z0)"
plot = Plot(56, 4, [-4, -2, 0, 2, 4], [-8, -4, 0, 4], x_title, "value", "People and KTO", notes)
plot.curve(BLACK, people)
plot.curve(BLUE, kto_moved)
plot.dot(-1, people(-1), BLACK)
plot.dot(-1, kto_moved(-1), BLUE)
plot.label(-0.2, 2.6, "reference", GREY, "end")
plot.label(-0.2, 1.8, "point", GREY, "end")
plot.label(2.6, 3.3, "people", BLACK, "end")
plot.label(2.2, 1.0, "KTO", BLUE)
plot.label(0.3, -2.5, "A loss of 1 costs")
plot.label(0.3, -3.4, "people 2.25")
plot.label(0.3, -4.3, "and KTO 1.", BLUE)

notes = ["A larger beta makes the curve flat sooner.", "Where it is flat, a row teaches little."]
x_title, y_title = "r - z0, in nats", "value of a desirable row"
plot = Plot(336, 1.1, [-30, 0, 30], [0, 0.5, 1], x_title, y_title, "What beta does", notes)
for beta, color, y in [(0.05, LIGHT_BLUE, 0.8), (0.1, BLUE, 0.93), (0.5, DARK_BLUE, 1.01)]:
    plot.curve(color, kto, beta=beta)
    plot.label(31, y, f"beta = {beta}")

notes = ["A larger lambda makes the curve of", "its class taller (beta = 0.1)."]
plot = Plot(676, 2.4, [-30, 0, 30], [0, 1, 2], x_title, "value", "What lambda does", notes)
for weight in [1, 2]:
    plot.curve(BLUE, kto, weight=weight)
    plot.curve(ORANGE, kto, weight=weight, desirable=False)
    plot.label(30, weight + 0.01, f"lambda_d = {weight}", BLUE, "end")
    plot.label(-30, weight + 0.01, f"lambda_u = {weight}", ORANGE)
plot.label(30, 2.24, "desirable", BLUE, "end")
plot.label(-30, 2.24, "undesirable", ORANGE)

with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write('<svg xmlns="http://www.w3.org/2000/svg" width="900" height="390" ')
    file.write('viewBox="0 0 900 390" role="img" font-family="sans-serif" font-size="13">\n')
    file.write('<rect width="900" height="390" fill="white"/>\n')
    file.write("\n".join(svg) + "\n</svg>\n")
