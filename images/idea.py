"""Draw the picture of the idea on the front page: images -> shallow model -> CLCNet -> deep model for the few.

    python images/idea.py

Writes idea.png and idea.svg beside this file. The thumbnails are scikit-learn's handwritten digits; which of them are
hard is made up here: the picture shows the idea and measures nothing.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT = 13.0, 4.2  # inches, and the units of all positions below
Point = tuple[float, float]

BLUE, ORANGE, GREY, INK = "#2b6ca3", "#d9822b", "#8a8f98", "#22262b"
HARD = (2, 9, 12)  # places of the hard images among the sixteen


def thumbnails() -> np.ndarray:
    """Sixteen digits, (16, 8, 8) from 0 to 1; the hard ones are turned and noisy."""
    generator = np.random.default_rng(42)
    digits = load_digits().images[:16] / 16
    for place in HARD:
        turned = rotate(digits[place], 35, reshape=False, order=1)
        digits[place] = np.clip(0.8 * turned + generator.uniform(0, 0.3, turned.shape), 0, 1)
    return digits


def draw_thumbnail(axes: Axes, digit: np.ndarray, x: float, y: float, size: float, hard: bool) -> None:
    """One image with its lower left corner at (x, y), framed if it is hard."""
    axes.imshow(digit, cmap="gray_r", extent=(x, x + size, y, y + size), vmin=0, vmax=1, interpolation="nearest")
    colour, width = (ORANGE, 2.2) if hard else (GREY, 0.8)
    axes.add_patch(plt.Rectangle((x, y), size, size, fill=False, edgecolor=colour, linewidth=width))


def draw_box(axes: Axes, centre: Point, size: Point, title: str, text: str, colour: str) -> None:
    """A rounded box with a bold title and a line or two below it."""
    corner = (centre[0] - size[0] / 2, centre[1] - size[1] / 2)
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor="white", edgecolor=colour, linewidth=2))
    axes.text(centre[0], centre[1] + 0.2, title, ha="center", va="center", fontsize=14, fontweight="bold", color=colour)
    axes.text(centre[0], centre[1] - 0.22, text, ha="center", va="center", fontsize=10.5, color=INK)


def draw_arrow(axes: Axes, start: Point, end: Point, width: float, colour: str) -> None:
    """An arrow whose line is as wide as the share of images that takes it."""
    style = {"arrowstyle": "-|>,head_width=0.45,head_length=0.6", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops={**style, "linewidth": width, "color": colour})


def write(axes: Axes, x: float, y: float, text: str, colour: str = INK, align: str = "left") -> None:
    """A label whose text is centred vertically at y."""
    axes.text(x, y, text, ha=align, va="center", fontsize=11, color=colour)


def draw(axes: Axes) -> None:
    """The whole picture."""
    digits = thumbnails()
    top, bottom = 3.2, 1.0
    middle = (top + bottom) / 2
    for place, digit in enumerate(digits):
        draw_thumbnail(axes, digit, 0.15 + 0.5 * (place % 4), top + 0.53 - 0.5 * (place // 4), 0.43, place in HARD)
    write(axes, 1.12, top - 1.25, "all images", align="center")

    draw_box(axes, (4.0, top), (2.1, 1.1), "shallow model", "fast, answers every image", BLUE)
    draw_box(axes, (7.1, top), (2.1, 1.1), "CLCNet", "how sure is this answer?", INK)
    draw_box(axes, (7.1, bottom), (2.1, 1.1), "deep model", "slow, answers the few", ORANGE)
    draw_box(axes, (10.1, bottom), (1.9, 1.1), "CLCNet", "surer than before?", INK)
    draw_box(axes, (12.0, top), (1.6, 1.1), "answer", "one an image", BLUE)

    draw_arrow(axes, (2.25, top), (2.9, top), 6, BLUE)
    draw_arrow(axes, (5.1, top), (6.0, top), 6, BLUE)
    write(axes, 5.53, top + 0.4, "sorted\nsoftmax", align="center")
    draw_arrow(axes, (8.2, top), (11.15, top), 5, BLUE)
    write(axes, 9.65, top + 0.25, "confident: keep", BLUE, align="center")
    draw_arrow(axes, (7.1, top - 0.6), (7.1, bottom + 0.6), 2, ORANGE)
    write(axes, 7.28, middle, "confidence below\nthe threshold", ORANGE)
    for count, place in enumerate(HARD):
        draw_thumbnail(axes, digits[place], 5.4 + 0.5 * count, middle - 0.21, 0.43, hard=True)
    draw_arrow(axes, (8.2, bottom), (9.1, bottom), 2, ORANGE)
    draw_arrow(axes, (11.1, bottom), (12.0, top - 0.6), 2, ORANGE)
    write(axes, 11.75, middle - 0.35, "take the\nsurer one", ORANGE)


def main() -> None:
    """Write both files."""
    plt.rcParams["svg.hashsalt"] = "idea"  # the same drawing gives the same file
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    draw(axes)
    axes.set(xlim=(0, WIDTH), ylim=(0.25, HEIGHT + 0.25), aspect="equal")
    axes.axis("off")
    figure.savefig(FOLDER / "idea.svg", metadata={"Date": None})
    figure.savefig(FOLDER / "idea.png", dpi=130)
    print(f"picture in {FOLDER / 'idea.png'} and idea.svg")


if __name__ == "__main__":
    main()
