"""The frame of an HTML page that loads nothing else: its style, light and dark, and what every page needs.

Every value goes through ``toolkit.output.escape.html``, which escapes everything that is not of the type Html."""

from __future__ import annotations

from collections.abc import Iterable

from toolkit.output.escape import Html, html, join_html

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # no scripts, nothing loaded from another place
STYLE = Html("""
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6670; --line: #d9dde1; --page: #ffffff; --panel: #f5f6f7;
  --better: #00598c; --worse: #b34700; --equivalent: #007a59; --open: #6b5b00; --alarm: #a3200d; --alarmed: #fdf0ed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a3acb5; --line: #3a4047; --page: #16181b;
  --panel: #1f2226; --better: #6db9ec; --worse: #ff9a57; --equivalent: #4fcfa6; --open: #e0c64a; --alarm: #ff9c8a;
  --alarmed: #33201c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.6rem 4rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1, h2, p, dt, dd, .banner, .note, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.12rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
.lead { font-size: 1.08rem; margin-bottom: 1.2rem; }
.wide { overflow-x: auto; } .verdicts table { width: 100%; }
table { border-collapse: collapse; min-width: 55%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
th, td { padding: .36rem .9rem .36rem 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; } td.n, th.n { text-align: right; white-space: nowrap; } td.k { white-space: nowrap; }
td.a { min-width: 6rem; max-width: 24rem; overflow-wrap: anywhere; }
.word { font-weight: 700; } .better { color: var(--better); } .worse { color: var(--worse); }
.equivalent { color: var(--equivalent); } .inconclusive { color: var(--open); } .lost { color: var(--alarm); }
.banner { background: var(--alarmed); border-left: 4px solid var(--alarm); padding: .45rem .8rem; margin: .4rem 0; }
.banner b { color: var(--alarm); } .clean { border-left: 4px solid var(--equivalent); padding: .45rem .8rem;
  background: var(--panel); }
figure { margin: 1.1rem 0 1.6rem; } figure svg { width: 100%; max-width: 54rem; height: auto; display: block; }
details { margin: .2rem 0; } summary { cursor: pointer; } details ul { margin: .3rem 0; padding-left: 1.4rem; }
dl { display: grid; grid-template-columns: fit-content(14rem) 1fr; gap: .3rem 1.4rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) { body { padding: 1.2rem .9rem 3rem; } dl { grid-template-columns: 1fr; gap: .1rem; }
  dd { margin-bottom: .5rem; } th, td { padding-right: .6rem; }
  .verdicts :is(th, td):is(:nth-child(3), :nth-child(8)) { display: none; } }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; border-radius: 4px; }
code { font-size: .9em; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } h2, figure, tr { break-inside: avoid; } }
""")


def sheet(title: str, body: Iterable[Html], style: str = "") -> Html:
    """A whole HTML page from the pieces of its body. ``style`` is added to STYLE."""
    return html(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        "<style>{style}</style></head><body>\n{body}\n</body></html>\n",
        policy=Html(POLICY),
        title=title,
        style=Html(STYLE + style),
        body=join_html(body, "\n"),
    )


def table(head: list[str], rows: list, left: int = 0, classes: tuple[str, ...] = ()) -> Html:
    """A table; each row is a list of (CSS class, cell). Headings of the first ``left`` columns are aligned left and
    those of the others right, unless ``classes`` gives each heading's class."""
    classes = classes or ("",) * left + ("n",) * (len(head) - left)
    top = join_html(html('<th class="{}">{}</th>', cls, cell) for cls, cell in zip(classes, head, strict=True))
    body = join_html(
        html("<tr>{}</tr>\n", join_html(html('<td class="{}">{}</td>', cls, cell) for cls, cell in row)) for row in rows
    )
    return html('<div class="wide"><table><thead><tr>{}</tr></thead><tbody>\n{}</tbody></table></div>', top, body)
