#!/usr/bin/env python3
"""Draw docs/figures/method.png, the method in one picture: python docs/figures/method.py"""
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

matplotlib.rcParams.update({'font.size': 13, 'font.family': 'DejaVu Sans', 'mathtext.fontset': 'dejavusans'})
GLOBAL, HYPER, GREY, INK = '#2f6fb3', '#c8641b', '#6b7280', '#1f2933'
WIDTH, HEIGHT = 8.2, 5.0
STUDENT, TEACHER = 3.6, 1.3  # height of the two rows


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


def arrow(axes, start, end, color=GREY, style='-|>', bend=0.0, **line):
    axes.add_patch(FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=11, color=color, shrinkA=0, shrinkB=0,
        connectionstyle=f'arc3,rad={bend}', **{'lw': 1.3, **line}))


def stages(axes, x, y, student):
    """A backbone as its four feature maps, the last two of which make the hypercolumn."""
    for i, height in enumerate((1.15, 0.92, 0.7, 0.5)):
        axes.add_patch(Rectangle(
            (x + 0.27 * i, y - height / 2), 0.19, height, fc='#fbe3d3' if i > 1 else '#eceff3',
            ec=HYPER if i > 1 else GREY, lw=1.1))
    axes.text(x + 0.5, y + 0.74, 'student' if student else 'teacher', ha='center', weight='bold', color=INK)


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
        picture(axes, pixels, 0.1, y)
        axes.text(0.62, y - 0.76, 'strong view' if student else 'weak view', ha='center', color=INK)
        arrow(axes, (1.2, y), (1.5, y))
        stages(axes, 1.57, y, student)
        index = 1 if student else 2
        for dy, name, key, color in ((0.42, 'global', 'g', GLOBAL), (-0.42, 'hypercolumn', 'h', HYPER)):
            arrow(axes, (2.65, y + dy * 0.3), (2.9, y + dy), color, '-')
            arrow(axes, (2.9, y + dy), (4.5, y + dy), color)
            label = f'{name} $z_{index}^{key}$'
            axes.text(3.67, y + dy + (0.1 if dy > 0 else -0.12), label, ha='center', color=color,
                      va='bottom' if dy > 0 else 'top')
            sharp = (1.0 if student else 1.7) * (0.85 if key == 'h' else 1.0)
            shown = relation ** sharp * np.exp(0.25 * rng.standard_normal(10))
            distribution(axes, shown / shown.max(), 4.6, y + dy, color)
            axes.text(5.95, y + dy, f'$y_{index}^{key}$', ha='center', va='center', color=color, size=15)
    axes.text(5.2, STUDENT + 1.13, 'softmax over a memory\nbank of other images', ha='center', va='center', color=INK)
    arrow(axes, (2.06, STUDENT - 0.68), (2.06, TEACHER + 1.0), GREY, lw=1.5)
    axes.text(2.2, (STUDENT + TEACHER) / 2 + 0.13, 'moving average, no gradient', va='center', color=GREY)
    for start, end, color in ((TEACHER - 0.42, STUDENT + 0.42, HYPER), (TEACHER + 0.42, STUDENT - 0.42, GLOBAL)):
        arrow(axes, (6.2, start), (6.85, end), color, lw=2.2)
    for dy, text in ((0.42, r'$\mathrm{CE}(y_1^g,\, y_2^h)$'), (0, '+'), (-0.42, r'$\mathrm{CE}(y_1^h,\, y_2^g)$')):
        axes.text(6.93, STUDENT + dy, text, va='center', color=INK, size=14)
        if dy:
            arrow(axes, (6.2, STUDENT + dy), (6.85, STUDENT + dy), GREY, '-', lw=1, linestyle=(0, (3, 2)))
    text = "Each context of the student learns what the teacher's other one sees."
    axes.text(WIDTH / 2, 0.2, text, ha='center', va='center', color=INK)


def main():
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    draw(axes)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect='equal')
    axes.axis('off')
    figure.savefig(Path(__file__).with_name('method.png'), facecolor='white', metadata={'Software': None})


if __name__ == '__main__':
    main()
