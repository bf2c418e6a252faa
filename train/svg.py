"""Matplotlib figures as SVG for the inside of a page, whose text, axes and series follow the page's colours."""

import hashlib
import io
import re
from typing import Any

# Colours of series 0 to 7 on a light and on a dark page: Okabe and Ito's hues (https://jfly.uni-koeln.de/color/), which
# colour-blind readers can distinguish, with at least 2.7 times the luminance contrast to the page.
LIGHT = ("#0072b2", "#d55e00", "#008a63", "#b5588f", "#333333", "#b98300", "#4aa3df", "#7a7a7a")
DARK = ("#4aa8f0", "#f0803c", "#35c08c", "#d98ad0", "#e8e8e8", "#f0d24a", "#b9dcf7", "#8f8f8f")
# Matplotlib's colours C0 to C7, which become the page's.
CYCLE = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
GREYS = {"#ffffff": "paper", "#000000": "ink", "#b0b0b0": "line", "#cccccc": "line", "#dbdbdb": "shade"}


def inline_svg(drawing: Any) -> tuple[str, int]:
    """(SVG markup for the inside of a page, its natural width in pixels) of a matplotlib figure."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, in the page's font; a fixed salt and no metadata keep the bytes the same.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    # Namespaces, metadata and the rule for every element of the page have no place in a page.
    text = re.sub(r"<metadata>.*?</metadata>|<style type.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = (
        re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    )
    text = text.replace("xlink:href", "href")
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    text = re.sub(r"(font: (?:\w+ )*[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    # Names are unique in one drawing only: prefix those that are used, drop the others.
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:8]
    used = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    colours = {colour: f"c{at}" for cycle in (CYCLE, LIGHT) for at, colour in enumerate(cycle)} | GREYS
    text = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda m: f"{m[1]}: var(--{colours[m[2]]})" if m[2] in colours else m[0],
        text,
    )
    text = re.sub(r"\n\s*", " ", text).strip()
    return text, round(drawing.get_size_inches()[0] * 96)
