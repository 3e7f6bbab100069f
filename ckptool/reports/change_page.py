"""The picture of a comparison as a page that stands alone: no network, and under the pointer a tensor's numbers."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable

from ckptool.reports.change_plot import Drawing, Spot

_PROLOGUE = re.compile(rb"^.*?(?=<svg)", re.DOTALL)
_FOR_FILES = re.compile(r'\s(xmlns(:\w+)?|width|height)="[^"]*"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ margin: 0; font: 14px sans-serif; background: white; color: #222; }}
#picture {{ position: relative; max-width: {width}px; margin: 1em auto; }}
#picture svg {{ display: block; width: 100%; height: auto; }}
#ring {{ position: absolute; width: 14px; height: 14px; margin: -9px; border: 2px solid #111; border-radius: 50%;
 pointer-events: none; }}
#told {{ position: absolute; max-width: 30em; padding: 6px 9px; background: #fffffff2; border: 1px solid #888;
 border-radius: 4px; box-shadow: 0 2px 6px #0003; white-space: pre-line; overflow-wrap: anywhere;
 pointer-events: none; }}
#told b {{ display: block; }}
[hidden] {{ display: none; }}
</style>
</head>
<body>
<div id="picture">
{picture}
<div id="ring" hidden></div>
<div id="told" hidden><b></b><span></span></div>
</div>
<script type="application/json" id="spots">{spots}</script>
<script>
"use strict";
const spots = JSON.parse(document.getElementById("spots").textContent);
const picture = document.getElementById("picture");
const ring = document.getElementById("ring");
const told = document.getElementById("told");
picture.addEventListener("pointermove", event => {{
  const box = picture.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  let nearest = null, least = 40;
  for (const spot of spots) {{
    const far = Math.hypot(spot[0] * box.width - x, spot[1] * box.height - y);
    if (far < least) [nearest, least] = [spot, far];
  }}
  ring.hidden = told.hidden = nearest === null;
  if (nearest === null) return;
  const left = nearest[0] * box.width, top = nearest[1] * box.height;
  ring.style.left = left + "px";
  ring.style.top = top + "px";
  told.firstChild.textContent = nearest[2];
  told.lastChild.textContent = nearest[3];
  const flip = left > box.width / 2;
  told.style.left = flip ? "auto" : left + 14 + "px";
  told.style.right = flip ? box.width - left + 14 + "px" : "auto";
  told.style.top = Math.max(0, Math.min(top + 10, box.height - told.offsetHeight)) + "px";
}});
picture.addEventListener("pointerleave", () => {{ ring.hidden = told.hidden = true; }});
</script>
</body>
</html>
"""


def page(drawing: Drawing, svg: bytes) -> str:
    """Write the page around the drawing's own SVG."""
    return _PAGE.format(
        title=html.escape(drawing.title),
        width=round(96 * drawing.width),
        picture=_inline(svg),
        spots=_script_json([_told(spot, several=len(drawing.series) > 1) for spot in drawing.spots()]),
    )


def _inline(svg: bytes) -> str:
    """Take off what only a file of its own needs: HTML knows the names of SVG, and the width is that of the page."""
    picture = _METADATA.sub("", _PROLOGUE.sub(b"", svg).decode("utf-8"))
    head, _, rest = picture.partition(">")
    return f"{_FOR_FILES.sub('', head)}>{rest}"


def _told(spot: Spot, *, several: bool) -> list[object]:
    lines = [spot.series, *spot.point.lines] if several else spot.point.lines
    return [round(spot.x, 5), round(spot.y, 5), spot.point.name, "\n".join(lines)]


def _script_json(values: Iterable[object]) -> str:
    """Write JSON that ends no script, whatever the names are."""
    return json.dumps(list(values)).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
