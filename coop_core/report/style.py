"""Style of pictures: colours, sizes and names that all figures share, and a figure -> a PNG file or SVG for a page."""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = {
    "ink": "#20262e",
    "muted": "#7b8794",
    "grid": "#dfe3e8",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#009e73",
    "fourth": "#aa4499",
    "bar": "#8ec0df",
    "on-first": "#fefefe",
}
"""Roles and their colours (after Okabe and Ito 2008, told apart by colour-blind readers); each colour has one role."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["muted"],
    "axes.grid": True,
    "axes.labelcolor": COLOURS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "coop",  # else ids differ from run to run
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a class name may hold dollar signs
    "xtick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.color": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["ink"],
}
_PROPER_NAMES = {"coop": "CoOp", "cocoop": "CoCoOp", "upl": "UPL", "dpl": "DPL", "biomedcoop": "BiomedCoOp",
                 "gda": "GDA", "prolip": "ProLIP", "tip_adapter": "Tip-Adapter"}  # fmt: skip
_OTHER_NAMES = {"linear_probe": "linear probe (method)", "probe": "probe from class texts"}
"""Of methods that a baseline is called like."""


def shown_name(classifier: str) -> str:
    """`coop` -> CoOp, `class_mean` -> Class mean."""
    return _PROPER_NAMES.get(classifier) or capital(_words(classifier))


def spoken_name(classifier: str) -> str:
    """In a sentence: `coop` -> CoOp, `class_mean` -> the class mean, `zero-shot` -> zero-shot."""
    words = _words(classifier)
    return _PROPER_NAMES.get(classifier) or (words if words == "zero-shot" else f"the {words}")


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _words(classifier: str) -> str:
    return _OTHER_NAMES.get(classifier, classifier.replace("_", " "))


@matplotlib.rc_context(STYLE)
def save_png(figure: Figure, path: Path) -> None:
    """On white, at 160 dots an inch; equal figures give equal bytes."""
    buffer = io.BytesIO()
    _draw(figure, buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


@matplotlib.rc_context(STYLE)
def as_svg(figure: Figure) -> str:
    """An <svg> element to stand in a page, without background; equal figures give equal text.

    The page may give each of `COLOURS` another value through the CSS variables --figure-ink, --figure-first, ...
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _draw(figure, buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # else every figure of a page has an axes_1
    roles = {colour: role for role, colour in COLOURS.items()}
    pattern = rf"(?<=(?:fill|roke): )(?:{'|'.join(roles)})"
    return re.sub(pattern, lambda found: f"var(--figure-{roles[found[0]]}, {found[0]})", svg)


def _draw(figure: Figure, target: Any, **how: Any) -> None:
    with warnings.catch_warnings():
        # Class names may be in scripts that matplotlib's font lacks; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, **how)
