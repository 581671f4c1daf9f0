"""Whether what is written in a figure can be read."""

import itertools

from matplotlib.text import Text


def check_texts(figure):
    """No text overlaps another one, or leaves the figure."""
    found = texts(figure)
    assert len(found) >= 3
    for text, box in found:
        inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 0.5
        assert inside and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 + 0.5, text
    for (one, a), (other, b) in itertools.combinations(found, 2):
        assert not a.overlaps(b), (one, other)


def texts(figure):
    """The boxes of all that is written in a figure, and of its legends."""
    figure.draw_without_rendering()
    beyond = set()  # the labels of ticks that are not drawn: outside of an axis' limits, or where there is no axis
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    beyond |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in found if text not in beyond]
