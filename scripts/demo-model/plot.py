"""Draws a loss curve: python3 plot.py OUT/loss.csv loss.svg. Standard library only."""

import csv
import math
import sys

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 300, 60, 40
COLORS = {256: "#1b9e77", 512: "#66a61e", 1024: "#7570b3", 2048: "#e7298a", 4096: "#e6ab02", 8192: "#d95f02", 16384: "#a6761d", 32768: "#666666"}


def main():
    source, target = sys.argv[1:3]
    with open(source) as file:
        rows = [(int(r["tokens"]), int(r["length"]), max(float(r["loss"]), 1e-4)) for r in csv.DictReader(file)]
    most = rows[-1][0]
    x = lambda tokens: LEFT + tokens / most * (WIDTH - LEFT - 10)
    y = lambda loss: 10 + (1 - math.log10(loss)) / 5 * (HEIGHT - BOTTOM - 10)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for power in range(1, -5, -1):
        at = y(10.0 ** power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/><text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0 ** power:g}</text>')
    for tokens in range(0, most + 1, 100_000_000):
        parts.append(f'<text x="{x(tokens):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tokens // 1_000_000}M</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">training tokens; loss in nats a written token, by length of the conversations</text>')
    for index, (length, color) in enumerate(COLORS.items()):
        # a dot is a line of no length with round ends: that is a quarter of a circle's text
        dots = "".join(f"M{x(tokens):.1f} {y(loss):.1f}h0" for tokens, one, loss in rows if one == length)
        parts.append(f'<path d="{dots}" stroke="{color}" stroke-width="3.2" stroke-linecap="round"/>')
        parts.append(f'<text x="{WIDTH - 60}" y="{28 + 14 * index}" fill="{color}">{length}</text>')
    with open(target, "w") as file:
        file.write("\n".join([*parts, "</svg>", ""]))


if __name__ == "__main__":
    main()
