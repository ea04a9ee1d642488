#!/usr/bin/env python3
"""Draw docs/figures/method.png, the method in one picture: python docs/figures/method.py"""
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

matplotlib.rcParams.update({'font.size': 10, 'font.family': 'DejaVu Sans', 'mathtext.fontset': 'dejavusans'})
GLOBAL, HYPER, GREY, INK = '#2f6fb3', '#c8641b', '#6b7280', '#1f2933'
WIDTH, HEIGHT = 11.6, 4.7
STUDENT, TEACHER = 3.2, 1.0  # height of the two rows


def scene(size=160):
    """A picture to crop: sky, sun, hills."""
    y, x = np.mgrid[0:size, 0:size] / size
    pixels = np.stack([0.55 + 0.35 * y, 0.75 + 0.1 * y, 0.95 - 0.1 * y], axis=-1)
    pixels[np.hypot(x - 0.68, y - 0.3) < 0.14] = (1.0, 0.82, 0.3)
    pixels[y > 0.62 + 0.12 * np.sin(5 * x + 0.5)] = (0.35, 0.6, 0.35)
    pixels[y > 0.78 + 0.08 * np.sin(7 * x + 2.0)] = (0.2, 0.42, 0.28)
    return pixels


def views(pixels):
    """The teacher's weak view and the student's contrastive view: another crop, other colours, blurred."""
    strong = pixels[50:140, 58:148]
    blurred = sum(np.roll(strong, (i, j), (0, 1)) for i in range(-3, 4) for j in range(-3, 4))[3:-3, 3:-3] / 49
    return pixels[10:150, 12:152], np.clip((blurred[:, ::-1] @ np.diag([1.25, 0.8, 0.75])) * 1.05 - 0.05, 0, 1)


def picture(axes, pixels, x, y, size=1.05):
    axes.imshow(pixels, extent=(x, x + size, y - size / 2, y + size / 2), interpolation='bilinear', zorder=2)
    axes.add_patch(Rectangle((x, y - size / 2), size, size, fill=False, color=INK, lw=0.8, zorder=3))


def box(axes, text, x, y, width, height, color=INK, fill='white'):
    axes.add_patch(FancyBboxPatch(
        (x, y - height / 2), width, height, boxstyle='round,pad=0,rounding_size=0.08', ec=color, fc=fill, lw=1.3))
    axes.text(x + width / 2, y, text, ha='center', va='center', color=color)


def arrow(axes, start, end, color=GREY, style='-|>', bend=0.0, **line):
    axes.add_patch(FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=11, color=color, shrinkA=0, shrinkB=0,
        connectionstyle=f'arc3,rad={bend}', **{'lw': 1.3, **line}))


def stages(axes, x, y, student):
    """A backbone as its four feature maps, the last two of which make the hypercolumn."""
    for i, height in enumerate((1.15, 0.92, 0.7, 0.5)):
        axes.add_patch(Rectangle(
            (x + 0.3 * i, y - height / 2), 0.19, height, fc='#fbe3d3' if i > 1 else '#eceff3',
            ec=HYPER if i > 1 else GREY, lw=1.1))
    axes.text(x + 0.55, y + 0.79, 'student' if student else 'teacher', ha='center', weight='bold', color=INK)


def distribution(axes, values, x, y, color):
    """Similarity to the images in the memory bank, as bars."""
    for i, value in enumerate(values):
        axes.add_patch(Rectangle((x + 0.12 * i, y - 0.2), 0.09, 0.5 * value + 0.02, color=color, lw=0))
    axes.plot([x - 0.05, x + 0.12 * len(values) + 0.02], [y - 0.2, y - 0.2], color=GREY, lw=0.8)


def draw(axes):
    weak, strong = views(scene())
    rng = np.random.default_rng(3)
    relation = np.array([0.55, 0.12, 0.3, 0.08, 0.1, 0.4, 0.06, 1, 0.15, 0.22])
    for y, pixels, student in ((STUDENT, strong, True), (TEACHER, weak, False)):
        picture(axes, pixels, 0.15, y)
        axes.text(0.67, y - 0.72, 'contrastive view' if student else 'weak view', ha='center', color=INK, size=9)
        arrow(axes, (1.28, y), (1.72, y))
        stages(axes, 1.8, y, student)
        index = 1 if student else 2
        for dy, name, key, color in ((0.42, 'global', 'g', GLOBAL), (-0.42, 'hypercolumn', 'h', HYPER)):
            arrow(axes, (2.98, y + dy * 0.35), (3.42, y + dy), color)
            box(axes, name, 3.46, y + dy, 1.3, 0.42, color)
            arrow(axes, (4.8, y + dy), (5.18, y + dy), color)
            axes.text(5.32, y + dy, f'$z_{index}^{key}$', ha='center', va='center', color=color, size=12)
            arrow(axes, (5.48, y + dy), (7.0, y + dy), color)
            sharp = (1.0 if student else 1.7) * (0.85 if key == 'h' else 1.0)
            shown = relation ** sharp * np.exp(0.25 * rng.standard_normal(10))
            distribution(axes, shown / shown.max(), 7.1, y + dy, color)
            axes.text(8.52, y + dy, f'$y_{index}^{key}$', ha='center', va='center', color=color, size=12)
    axes.text(6.25, STUDENT + 0.84, 'softmax over a memory\nbank of other images', ha='center', color=INK, size=9,
              va='center')
    arrow(axes, (2.35, STUDENT - 0.68), (2.35, TEACHER + 1.08), GREY, lw=1.5)
    axes.text(2.45, (STUDENT + TEACHER) / 2 + 0.15, 'moving average\n(no gradient)', va='center', color=GREY, size=9)
    for start, end, color in ((TEACHER - 0.42, STUDENT + 0.42, HYPER), (TEACHER + 0.42, STUDENT - 0.42, GLOBAL)):
        arrow(axes, (8.75, start), (9.62, end), color, lw=2.2)
    axes.text(9.72, STUDENT + 0.42, r'$\mathrm{CE}(y_1^g,\, y_2^h)$', va='center', color=INK, size=11)
    axes.text(9.72, STUDENT - 0.42, r'$\mathrm{CE}(y_1^h,\, y_2^g)$', va='center', color=INK, size=11)
    axes.text(9.72, STUDENT, '+', va='center', color=INK, size=11)
    for dy in (0.42, -0.42):
        arrow(axes, (8.75, STUDENT + dy), (9.62, STUDENT + dy), GREY, '-', lw=1, linestyle=(0, (3, 2)))
    text = "each context of the\nstudent learns what the\nteacher's other one sees"
    axes.text(9.72, TEACHER - 0.05, text, va='center', color=INK, size=9)


def main():
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    draw(axes)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect='equal')
    axes.axis('off')
    figure.savefig(Path(__file__).with_name('method.png'), facecolor='white', metadata={'Software': None})


if __name__ == '__main__':
    main()
