"""The record and its pictures as one HTML page that loads nothing: style and figures are inside."""

from __future__ import annotations

import re
from html import escape

from toolkit.comparison import text

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6670; --line: #d9dde1; --page: #ffffff; --panel: #f5f6f7;
  --better: #00598c; --worse: #b34700; --equivalent: #007a59; --open: #6b5b00; --alarm: #a3200d; --alarmed: #fdf0ed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a3acb5; --line: #3a4047; --page: #16181b;
  --panel: #1f2226; --better: #6db9ec; --worse: #ff9a57; --equivalent: #4fcfa6; --open: #e0c64a; --alarm: #ff9c8a;
  --alarmed: #33201c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.6rem 4rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.12rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
.lead { font-size: 1.08rem; margin-bottom: 1.2rem; }
.wide { overflow-x: auto; } .verdicts table { width: 100%; }
table { border-collapse: collapse; min-width: 55%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
th, td { padding: .36rem .9rem .36rem 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; } td.n, th.n { text-align: right; white-space: nowrap; } td.k { white-space: nowrap; }
.word { font-weight: 700; } .better { color: var(--better); } .worse { color: var(--worse); }
.equivalent { color: var(--equivalent); } .inconclusive { color: var(--open); } .lost { color: var(--alarm); }
.banner { background: var(--alarmed); border-left: 4px solid var(--alarm); padding: .45rem .8rem; margin: .4rem 0;
  overflow-wrap: anywhere; }
.banner b { color: var(--alarm); } .clean { border-left: 4px solid var(--equivalent); padding: .45rem .8rem;
  background: var(--panel); }
figure { margin: 1.1rem 0 1.6rem; } figure svg { width: 100%; max-width: 54rem; height: auto; display: block; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr !important; } }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; border-radius: 4px; }
code { font-size: .9em; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } h2, figure, tr { break-inside: avoid; } }
"""


def page(said: dict, pictures: dict[str, tuple[str, str]]) -> str:
    """The whole page; ``pictures`` are {name: (caption, SVG)}."""
    body = [
        f"<h1>{escape(said['question'] or said['name'])}</h1>",
        f'<p class="lead">{escape(said["headline"])}</p>',
        *(f'<div class="banner">{escape(one)}</div>' for one in text.exclusions(said)),
        f'<div class="verdicts">{_verdicts(said)}</div>',
        f'<p class="soft">{escape(text.legend(said))}.</p>',
        "<h2>Guards</h2>",
        *_guards(said),
        "<h2>Figures</h2>",
        *(_figure(caption, svg) for caption, svg in pictures.values()),
        "<h2>Each arm in words</h2>",
        _list((arm["arm"], text.explained(arm)) for arm in said["arms"][1:]),
        f"<h2>To the baseline's final loss ({escape(said['baseline'])})</h2>",
        _costs(said),
        *_rates(said),
        f"<h2>{escape(said['metric'])} by seed</h2>",
        _seeds(said),
        "<h2>Every run</h2>",
        _runs(said),
        "<h2>What differs from the baseline</h2>",
        _list((arm["arm"], "; ".join(arm["configuration"]) or "nothing") for arm in said["arms"][1:]),
        "<h2>What the numbers mean</h2>",
        _list(text.meanings(said)),
        "<h2>How to repeat it</h2>",
        f"<pre>{escape(chr(10).join(text.commands(said)))}</pre>",
        f'<p class="soft">{escape(text.environment(said))}</p>',
    ]
    title = escape(said["question"] or said["name"])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _verdicts(said: dict) -> str:
    head = [
        "verdict",
        "arm",
        "n",
        "mean ± sd",
        "difference",
        f"{1 - said['alpha']:.0%} interval",
        "p (Holm)",
        "in noise sd",
    ]
    rows = []
    for arm in said["arms"]:
        ends = f"{text.number(arm['low'], '+')} to {text.number(arm['high'], '+')}" if arm["low"] is not None else ""
        in_noise = "" if arm["in_noise_sd"] is None else f"{arm['in_noise_sd']:+.1f}"
        needs = text.verdict(arm).removeprefix(arm["verdict"])
        word = f'<span class="word {arm["verdict"]}">{arm["verdict"]}</span>'
        word += f'<br><span class="soft">{escape(needs.strip(" ()"))}</span>' if needs else ""
        mean = escape(text.spread(arm)) + (" *" if arm["conditional"] and arm["n"] else "")
        numbers = [
            text.count(arm),
            mean,
            text.number(arm["difference"], "+"),
            ends,
            escape(text.p(arm["p_holm"])),
            in_noise,
        ]
        rows.append([("k", word), ("", escape(arm["arm"])), *(("n", cell) for cell in numbers)])
    return _table(head, rows, plain=2)


def _guards(said: dict) -> list[str]:
    out = [
        f'<div class="banner"><b>{escape(one["guard"])}</b> {escape(one["text"])}</div>' for one in said["banners"]
    ] or ['<div class="clean">None fired: the runs differ in nothing but the factor.</div>']
    return out + [f'<p class="soft">{escape(note)}</p>' for note in said["notes"]]


def _figure(caption: str, svg: str) -> str:
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', rf'\1role="img" aria-label="{escape(caption)}"', svg, count=1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _costs(said: dict) -> str:
    rows = [[("", escape(arm["arm"])), *(("n", cell) for cell in text.cost(arm))] for arm in said["arms"]]
    return _table(["arm", "steps", "training FLOPs", "seconds"], rows, plain=1)


def _rates(said: dict) -> list[str]:
    if not any(arm["lr"] for arm in said["arms"]):
        return []
    head, rows = text.rates(said)
    cells = [
        [("", escape(row[0])), *(("n", re.sub(r"\*\*(.*)\*\*", r"<b>\1</b>", cell)) for cell in row[1:])]
        for row in rows
    ]
    note = '<p class="soft">Means over the selection seeds; the rate in bold was chosen, and judged on other seeds.</p>'
    return ["<h2>Learning rates</h2>", _table(head, cells, plain=1), note]


def _seeds(said: dict) -> str:
    head, rows = text.by_seed(said)
    cells = [[("n", f'<span class="lost">{cell}</span>' if cell.isalpha() else cell) for cell in row] for row in rows]
    return _table([escape(name) for name in head], cells)


def _runs(said: dict) -> str:
    rows = []
    for run in said["runs"]:
        lost = "" if run["outcome"] == "finished" else "lost"
        outcome = f'<span class="{lost}">{escape(run["outcome"])}</span>'
        seconds = "" if run["seconds"] is None else f"{run['seconds']:,.0f}"
        rows.append(
            [
                ("k", escape(run["run"])),
                ("n", str(run["seed"])),
                ("", outcome),
                ("n", text.number(run["value"])),
                ("n", f"{run['step']:,}"),
                ("n", seconds),
                ("", escape(run["reason"])),
            ]
        )
    for one in said["excluded"]:
        outcome = '<span class="lost">excluded by hand</span>'
        rows.append(
            [("k", escape(one["run"])), ("n", ""), ("", outcome), *[("n", "")] * 3, ("", escape(one["reason"]))]
        )
    head = ["run", "seed", "outcome", escape(said["metric"]), "step", "seconds", "reason"]
    return _table(head, rows, left=(0, 2, 6))


def _list(pairs) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in pairs) + "</dl>"


def _table(head: list[str], rows: list, plain: int = 0, left: tuple[int, ...] = ()) -> str:
    left = left or tuple(range(plain))
    top = "".join(f"<th{'' if i in left else ' class=n'}>{cell}</th>" for i, cell in enumerate(head))
    body = "".join("<tr>" + "".join(f'<td class="{cls}">{cell}</td>' for cls, cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'
