"""HTML by hand: every text goes through ``text``, every attribute too."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--line:#d1d9e0;--band:#f4f6f8;--link:#0757ba;
--forward:#2f6fbf;--backward:#8250c4;--step:#5a6b7d;--read:#d97706;--write:#c2410c;--update:#15803d;--check:#0e7490;
--copy:#a16207;--fetch:#b45309;--wait:#c3ccd5;--other:#7d8590;--area:#2f6fbf;--budget:#c2410c;
--s0:#b91c1c;--s1:#d6409f;--s2:#c79a00;--s3:#0d9488;--s4:#5c7c0f;--s5:#6d4aff;--s6:#7c4a1e;--s7:#7d8590}
@media (prefers-color-scheme:dark){:root{--bg:#10151b;--fg:#e6edf3;--soft:#9aa7b4;--line:#313a44;--band:#18202a;
--link:#6cb6ff;--forward:#5b9bea;--backward:#ab86ea;--step:#8797a8;--read:#f0a03c;--write:#f0764a;--update:#4cb86c;
--check:#3cb4cf;--copy:#d3a52f;--fetch:#e08b3a;--wait:#3b4754;--other:#8b949e;--area:#5b9bea;--budget:#f0764a;
--s0:#ef5350;--s1:#f06ac0;--s2:#e3c13c;--s3:#2cc5b5;--s4:#9dbf4a;--s5:#9f8aff;--s6:#c08a5c;--s7:#8b949e}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:80rem;padding:1.5rem;background:var(--bg);color:var(--fg);overflow-wrap:anywhere;
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.25rem 0 .25rem}
p,ul{margin:.5rem 0;max-width:60rem}
a{color:var(--link)}
.soft,caption,figcaption{color:var(--soft)}
.name{overflow-wrap:anywhere}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;padding:0;font-size:.9rem}
.verdict{border-left:4px solid var(--forward);background:var(--band);padding:.6rem 1rem;margin:1rem 0;max-width:none}
.verdict p{margin:.2rem 0;max-width:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1rem 0;padding:0}
.tiles div{border:1px solid var(--line);border-radius:6px;padding:.5rem .75rem;min-width:0}
.tiles dt{font-size:.8rem;color:var(--soft)}
.tiles dd{margin:0;font-size:1.25rem;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:30rem;margin:.75rem 0}
table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,28rem)}
caption{text-align:left;padding:.25rem 0;font-size:.9rem}
th,td{text-align:left;padding:.3rem .75rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:600;white-space:nowrap;position:sticky;top:0;background:var(--bg)}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:7rem;max-width:34rem}
td{overflow-wrap:anywhere}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;overflow-wrap:normal}
.bar{width:10rem;min-width:5rem;margin-top:.45rem}
.bar i{display:block;height:.6rem;border-radius:2px;background:var(--area);min-width:1px}
.swatch{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.4rem;vertical-align:-1px}
.legend b{font-weight:600;color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;padding:0;font-size:.85rem;max-width:none}
.legend li{overflow-wrap:anywhere;min-width:0}
figure{margin:1rem 0}
figcaption{font-size:.9rem;margin-bottom:.25rem}
.rows{display:grid;grid-template-columns:minmax(7rem,13rem) minmax(0,1fr);gap:0 .75rem;align-items:stretch}
.rows>div{padding:3px 0;min-width:0}
.label{font-size:.8rem;line-height:1.15;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;align-self:center}
.label small{display:block;color:var(--soft);font-size:.75rem;overflow:hidden;text-overflow:ellipsis}
.group{grid-column:1/-1;font-size:.75rem;color:var(--soft);text-transform:uppercase;letter-spacing:.05em;
border-bottom:1px solid var(--line);margin-top:.4rem}
.rows svg{display:block;width:100%;background:var(--band);border-radius:3px}
.axis{position:relative;height:1.3rem;font-size:.75rem;color:var(--soft)}
.axis span{position:absolute;top:0;border-left:1px solid var(--line);padding-left:.25rem;white-space:nowrap}
rect,path,line{vector-effect:non-scaling-stroke}
.area{fill:var(--area);fill-opacity:.3;stroke:var(--area);stroke-width:1.5}
.budget{stroke:var(--budget);stroke-width:1.5;stroke-dasharray:5 4}
@media (max-width:36rem){.rows{grid-template-columns:minmax(0,1fr)}}
@media print{.scroll{max-height:none}}
"""

CLASSES = (
    "forward", "backward", "step", "read", "write", "update", "check", "copy", "fetch", "wait", "other",
    *(f"s{index}" for index in range(8)),
)  # fmt: skip
"""Every colour of the style sheet that a figure may use, as the class ``k-<name>``."""


_NO_BREAK = "\u00a0"
"""A space that figures have before their unit."""


def printable(value: object) -> str:
    """Control characters, direction marks and lone surrogates become escapes: no name disturbs what is around it."""
    return "".join(
        letter
        if letter.isprintable() or letter == _NO_BREAK
        else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in str(value)
    )


def text(value: object, limit: int = 400) -> str:
    """Escaped, for content and for attributes in double quotes; longer text is cut, which is shown."""
    shown = printable(value)
    return html.escape(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def page(title: str, body: Iterable[str]) -> str:
    """A whole document. Its policy forbids scripts and everything that would come over a network."""
    colours = "".join(
        f".k-{name}{{fill:var(--{name})}}.swatch.k-{name},.bar i.k-{name}{{background:var(--{name})}}"
        for name in CLASSES
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{colours}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """``rows`` are HTML already; the first cell of each is its heading. ``numeric``: columns that are aligned right."""
    right = set(numeric)

    def cell(index: int, content: str) -> str:
        if index == 0:
            return f'<th scope="row">{content}</th>'
        return f'<td class="num">{content}</td>' if index in right else f"<td>{content}</td>"

    head = "".join(
        f'<th scope="col"{" class=num" if index in right else ""}>{text(column)}</th>'
        for index, column in enumerate(columns)
    )
    body = "\n".join("<tr>" + "".join(cell(i, content) for i, content in enumerate(row)) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table><caption>{text(caption)}'
        f"</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def bar(share: float, colour: str = "") -> str:
    """A bar beside a number that says the same; so it is hidden from those who listen."""
    width = 100 * min(1.0, max(0.0, share))
    return f'<div class="bar" aria-hidden="true"><i class="{colour}" style="width:{width:.1f}%"></i></div>'


def swatch(colour: str) -> str:
    return f'<span class="swatch {colour}" aria-hidden="true"></span>'


def section(name: str, heading: str, content: Iterable[str]) -> str:
    body = "\n".join(content)
    return (
        f'<section id="{name}" aria-labelledby="{name}-h">\n<h2 id="{name}-h">{text(heading)}</h2>\n{body}\n</section>'
    )


def paragraph(content: object, colour: str = "") -> str:
    return f'<p class="{colour}">{text(content, 4000)}</p>' if colour else f"<p>{text(content, 4000)}</p>"
