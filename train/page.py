"""Self-contained HTML pages from typed pieces: no files next to them, no script, light and dark, for desk and phone.

Every text is escaped unless it is `Html`, which only this module's functions make. The same pieces give the same bytes.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from train.svg import DARK, LIGHT, inline_svg


class Html(str):
    """Markup that is safe to insert as it is."""


class Number(NamedTuple):
    """A number in a table, with the text that shows it."""

    value: float
    text: str


class KeyFigure(NamedTuple):
    """One large figure: its value as text, what it is, and a remark."""

    value: str
    label: str
    note: str = ""


class Section(NamedTuple):
    """A part of the page with a title, to which the navigation links."""

    title: str
    body: Html


Cell = str | float | Number | None


def escape(text: object) -> Html:
    """Escape a text for use in content and in quoted attributes; `Html` stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def join(*pieces: object, by: str = "\n") -> Html:
    """Join pieces, each escaped unless it is `Html`."""
    return Html(by.join(map(escape, pieces)))


def breakable(text: object) -> Html:
    """A long name, which may break after its signs."""
    return Html(re.sub(r"([_/-])", r"\1<wbr>", escape(text)))


def heading(text: object) -> Html:
    """A heading inside of a section."""
    return Html(f"<h3>{escape(text)}</h3>")


def paragraph(*pieces: object) -> Html:
    """A paragraph of text."""
    return Html(f"<p>{join(*pieces, by=' ')}</p>")


def strong(text: object) -> Html:
    """Emphasised text."""
    return Html(f"<strong>{escape(text)}</strong>")


def code(text: object) -> Html:
    """A command, a path or a file's content, in one line or several."""
    tag = "pre" if "\n" in str(text) else "code"
    return Html(f"<{tag}>{escape(text)}</{tag}>")


def note(*pieces: object) -> Html:
    """A remark that must not be overlooked, with a bar in the colour of warnings."""
    return Html(f'<p class="note">{join(*pieces, by=" ")}</p>')


def key_figures(figures: Sequence[KeyFigure]) -> Html:
    """A row of large figures."""
    cards = ""
    for value, label, remark in figures:
        small = f"<small>{escape(remark)}</small>" if remark else ""
        cards += f"<div><dt>{escape(label)}</dt><dd><b>{escape(value)}</b>{small}</dd></div>"
    return Html(f'<dl class="key">{cards}</dl>')


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    best: Mapping[str, Literal["max", "min"]] | None = None,
    caption: str = "",
) -> Html:
    """A table that scrolls sideways where it is too wide; numbers are aligned right, empty cells are None.

    `best` says for which columns the highest or the lowest number is marked.
    """
    winners = {}
    for name, which in (best or {}).items():
        values = [value for row in rows if (value := _value(row[head.index(name)])) is not None and value == value]
        if len(values) > 1 and len({*values}) > 1:
            winners[head.index(name)] = max(values) if which == "max" else min(values)
    numeric = [any(_value(row[at]) is not None for row in rows) for at in range(len(head))]

    def cell(at: int, content: Cell) -> str:
        value = _value(content)
        classes = ["num"] * numeric[at] + ["best"] * (value is not None and value == winners.get(at))
        attribute = f' class="{" ".join(classes)}"' if classes else ""
        tag = "th scope=row" if at == 0 and not numeric[0] else "td"
        shown = _shown(content)
        if at == 0 and not numeric[0]:
            shown = breakable(shown)
        return f"<{tag}{attribute}>{shown}</{tag.split()[0]}>"

    top = "".join(f"<th scope=col{' class=num' * numeric[at]}>{escape(name)}</th>" for at, name in enumerate(head))
    body = "\n".join(f"<tr>{''.join(cell(at, content) for at, content in enumerate(row))}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    inside = f"<table>{title}<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"
    return Html(f'<div class="scroll" tabindex="0">{inside}</div>')


def _value(cell: Cell) -> float | None:
    if isinstance(cell, Number):
        return cell.value
    return float(cell) if isinstance(cell, int | float | np.number) and not isinstance(cell, bool) else None


def _shown(cell: Cell) -> Html:
    match cell:
        case None:
            return Html("")
        case Number():
            return escape(cell.text)
        case int() if not isinstance(cell, bool):
            return escape(f"{cell:,}")
        case float() | np.number():
            return escape(f"{cell:.4g}")
    return escape(cell)


def figure(drawing: Any, caption: object = "", *, alt: str = "", smallest: int = 0) -> Html:
    """A matplotlib figure as inline SVG, whose text, axes and colours `C0` to `C7` follow the page's.

    It shrinks with the page down to `smallest` pixels of width (0: without limit), and scrolls sideways below.
    """
    svg, width = inline_svg(drawing)
    style = f"max-width:{width}px" + (f";min-width:{smallest}px" if smallest else "")
    label = escape(alt or re.sub(r"<[^>]+>", "", str(caption)) or "figure")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" style="{style}" ', 1)
    return _figure(Html(svg), caption, scroll=bool(smallest))


def figures(*pieces: Html) -> Html:
    """Figures next to each other where the page is wide enough, else below each other."""
    return Html(f'<div class="figures">{"".join(pieces)}</div>')


def encode(image: np.ndarray, kind: str = "png") -> bytes:
    """The file of a picture uint8 [H, W, 3] or [H, W], as `png` or, much smaller for photographs, `jpeg`."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return buffer.getvalue()


def photograph(image: np.ndarray | bytes, alt: str = "", *, width: int | None = None) -> Html:
    """A picture as a data URI: uint8 [H, W, 3] or [H, W], or the bytes of a PNG or JPEG file.

    `width` is in pixels of the page; small images are enlarged with sharp pixels.
    """
    data = image if isinstance(image, bytes) else encode(image)
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    size = f' width="{width}"' if width else ""
    small = ' class="pixels"' if not isinstance(image, bytes) and width and image.shape[1] < width else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Html(f'<img{small}{size} alt="{escape(alt)}" src="{source}">')


def tile(image: np.ndarray | bytes, caption: object, alt: str = "", *, width: int | None = None) -> tuple[Html, object]:
    """A photograph and its caption, for `image_grid` and `picture`; `alt` is the caption unless it is given."""
    return photograph(image, alt or str(caption), width=width), caption


def picture(image: Html, caption: object = "") -> Html:
    """A photograph with a caption."""
    return _figure(image, caption)


def image_grid(items: Sequence[tuple[Html, object]], *, smallest: int = 120) -> Html:
    """Photographs with captions in as many columns, of at least `smallest` pixels, as fit the page."""
    cells = "".join(_figure(image, caption) for image, caption in items)
    return Html(f'<div class="grid" style="--cell:{smallest}px">{cells}</div>')


def details(summary: object, *pieces: object, shown: bool = False) -> Html:
    """Pieces that are hidden until the reader opens them."""
    return Html(f"<details{' open' * shown}><summary>{escape(summary)}</summary>\n{join(*pieces)}\n</details>")


def section(title: str, *pieces: object) -> Section:
    """A section of the page: its title and pieces."""
    return Section(title, join(*pieces))


def page(title: str, lead: object, *pieces: object) -> str:
    """The whole page: the answer in one sentence first, then pieces.

    Sections are linked at the top if there are several.
    """
    parts: list[str] = []
    links: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, Section):
            name = re.sub(r"\W+", "-", piece.title.lower()).strip("-") or f"section-{len(links) + 1}"
            taken = [link for link, _ in links]
            name = name if name not in taken else f"{name}-{len(links) + 1}"
            links.append((name, piece.title))
            parts.append(f'<section id="{name}">\n<h2>{escape(piece.title)}</h2>\n{piece.body}\n</section>')
        else:
            parts.append(escape(piece))
    listed = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links)
    nav = f'<nav aria-label="sections">{listed}</nav>\n' if len(links) > 1 else ""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p></header>
{nav}<main>
{body}
</main>
</body>
</html>
"""


def _figure(content: Html, caption: object, *, scroll: bool = False) -> Html:
    inside = Html(f'<div class="scroll" tabindex="0">{content}</div>') if scroll else content
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{inside}{text}</figure>")


def _variables(colours: Sequence[str], **others: str) -> str:
    names = {**others, **{f"c{at}": colour for at, colour in enumerate(colours)}}
    return "".join(f"--{name}:{colour};" for name, colour in names.items())


_DAY = _variables(
    LIGHT, paper="#ffffff", ink="#1a1d21", soft="#5a626c", line="#c9ced6", shade="#e3e6ea", card="#f4f6f8",
    good="#00694a", warn="#b34700", mark="#d9f2e6",
)  # fmt: skip
_NIGHT = _variables(
    DARK, paper="#14171c", ink="#e6e9ed", soft="#a3acb8", line="#434b57", shade="#343b45", card="#1d2229",
    good="#5fd7a8", warn="#ff9a5c", mark="#12382b",
)  # fmt: skip

STYLE = f"""
:root{{color-scheme:light dark;{_DAY}}}
@media (prefers-color-scheme:dark){{:root{{{_NIGHT}}}}}
@media print{{:root{{{_DAY}}}nav{{display:none}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1rem clamp(.9rem,3vw,2rem) 4rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere;
-webkit-text-size-adjust:100%}}
h1{{font-size:1.35rem;line-height:1.25;margin:.4rem 0;color:var(--soft);font-weight:600}}
h2{{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}}
h3{{font-size:1rem;margin:1.4rem 0 .4rem}}
p{{margin:.5rem 0;max-width:46rem}}
.lead{{font-size:1.3rem;line-height:1.4;margin:.2rem 0 1rem}}
a{{color:var(--c0)}}
nav{{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:.6rem 0 0;font-size:.92rem}}
nav a{{padding:.2rem 0}}
.key{{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.2rem,1fr));gap:.6rem;margin:1rem 0}}
.key div{{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}}
.key dt{{color:var(--soft);font-size:.85rem}}
.key dd{{margin:0}}
.key b{{display:block;font-size:1.4rem;line-height:1.3;font-variant-numeric:tabular-nums}}
.key small{{color:var(--soft);font-size:.85rem;display:block;line-height:1.35}}
.note{{border-left:.25rem solid var(--warn);padding:.1rem .7rem}}
.scroll{{overflow-x:auto;max-width:100%}}
table{{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;margin:.5rem 0}}
caption{{text-align:left;color:var(--soft);padding:.2rem 0}}
th,td{{text-align:left;padding:.32rem .75rem .32rem 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:normal}}
thead th{{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal!important}}
tbody th{{font-weight:600;min-width:min(14rem,34vw);overflow-wrap:anywhere}}
th:first-child{{position:sticky;left:0;background:var(--paper)}}
.num{{text-align:right;white-space:nowrap;padding-left:.5rem}}
td.best{{color:var(--good);font-weight:700;background:var(--mark)}}
td.best::before{{content:"\\2713\\00a0"}}
figure{{margin:.6rem 0;min-width:0}}
figure svg{{display:block;width:100%;height:auto;fill:var(--ink);stroke-linejoin:round}}
figure svg .quiet{{fill:var(--soft)}}
figcaption{{color:var(--soft);font-size:.88rem;margin-top:.25rem;max-width:46rem}}
.figures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,23rem),1fr));gap:.4rem 1.6rem}}
img{{max-width:100%;height:auto}}
.pixels{{image-rendering:pixelated}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--cell)),1fr));gap:.8rem}}
.grid figure{{margin:0}}
.grid img{{width:100%;display:block}}
details{{margin:.6rem 0}}
summary{{cursor:pointer;color:var(--c0)}}
code,pre{{font:.88em ui-monospace,Menlo,Consolas,monospace;background:var(--card);
border-radius:.3rem;padding:.1em .3em}}
pre{{overflow-x:auto;padding:.6rem}}
"""
