"""The page of a report: one HTML file that needs nothing else. Charts are inline SVG, colours follow the reader's light or dark.

I1  Whatever comes from a segment is escaped; the page loads nothing, runs no script, and says so in its content policy.
"""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape as quote
from typing import Any, Final

from . import inspect
from . import report_charts as charts
from .distribution import Histogram
from .report import Report, hit_ratio

__all__ = ["page"]

STYLE: Final = """
:root{--ground:#f6f6f3;--card:#fff;--ink:#1d2328;--soft:#68727a;--line:#e2e3de;--live:#2d7f73;--soft-live:#a8d3cb;
--expired:#d99a2b;--dead:#a3492f;--free:#e4e6e1;--bad:#b3261e;--poor:#b26a00;--note:#4a6785;--a:#2d7f73;--b:#c65f3f}
@media(prefers-color-scheme:dark){:root{--ground:#14181b;--card:#1c2226;--ink:#e6e9e8;--soft:#93a0a5;--line:#2c3439;
--live:#4db3a2;--soft-live:#2a5a54;--expired:#e0ab4c;--dead:#d2694b;--free:#39434a;--bad:#ff7b70;--poor:#f0b04a;
--note:#8fb4d9;--a:#4db3a2;--b:#e58a6a}}*{box-sizing:border-box}body{margin:0;background:var(--ground);
color:var(--ink);font:15px/1.5 system-ui,sans-serif}main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:28px;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}h2{font-size:13px;margin:0 0 12px;
color:var(--soft);font-weight:600;letter-spacing:.04em;text-transform:uppercase}header{display:flex;flex-wrap:wrap;
align-items:baseline;gap:6px 14px;margin-bottom:20px}header p{margin:0;color:var(--soft);width:100%}
.chip{border-radius:99px;padding:1px 12px;font-size:13px;font-weight:600;color:var(--card);background:var(--live)}
.chip.bad{background:var(--bad)}section{background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:18px 20px;margin-bottom:16px;min-width:0}.tiles{display:grid;grid-template-columns:repeat(auto-fit,
minmax(128px,1fr));gap:12px;margin-bottom:16px}.tiles section{margin:0;padding:14px 16px}.tiles b{display:block;font-size:22px;
font-weight:600;letter-spacing:-.02em;white-space:nowrap;
font-variant-numeric:tabular-nums}.tiles span{color:var(--soft);font-size:13px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:0 16px}
.warn{border-left:4px solid var(--note);
padding:2px 0 2px 14px;margin:0 0 12px}.warn.bad{border-color:var(--bad)}.warn.poor{border-color:var(--poor)}
.warn b{display:block}.warn p{margin:0;color:var(--soft)}.warn:last-child{margin:0}table{border-collapse:collapse;
width:100%;font-variant-numeric:tabular-nums}td,th{padding:4px 12px 4px 0;text-align:left;
border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--soft);font-weight:500;font-size:13px}
tr:last-child td{border:0}td.k{max-width:320px;overflow:hidden;text-overflow:ellipsis;font-family:ui-monospace,
monospace;font-size:13px;white-space:pre}td.n,th.n{text-align:right}.scroll{overflow:auto;max-height:420px}
svg{display:block;width:100%}text{fill:var(--soft);font-size:11px}.bars{display:grid;
grid-template-columns:auto 1fr;gap:3px 10px;align-items:center}.bars span{color:var(--soft);font-size:12px;
text-align:right;line-height:18px}.bars .h9{line-height:9px;font-size:10px}.bars .h5{line-height:5px;font-size:9px}
.bars svg{border-radius:2px}figure{display:grid;grid-template-columns:44px minmax(0,1fr);gap:4px 8px;margin:0 0 8px}
figcaption{grid-column:1/3;color:var(--soft);font-size:13px}code{font-family:ui-monospace,monospace;font-size:.92em;
background:var(--ground);border-radius:4px;padding:1px 5px;color:var(--ink)}.soft{color:var(--soft)}
@media(max-width:560px){.alt{display:none}}.legend{display:flex;flex-wrap:wrap;
gap:4px 18px;color:var(--soft);font-size:13px;margin-top:10px}.legend i{display:inline-block;width:11px;height:11px;
border-radius:3px;margin-right:6px}.held{color:var(--poor);font-weight:600}.dead,.stopped{color:var(--bad);
font-weight:600}dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:8px 18px;margin:0}
dt{color:var(--soft);font-size:13px}dd{margin:0;overflow-wrap:anywhere}footer{color:var(--soft);font-size:13px}
.calm{margin:0}i.live{background:var(--live)}i.expired{background:var(--expired)}i.dead{background:var(--dead)}
i.free{background:var(--free)}i.a{background:var(--a)}i.b{background:var(--b)}
"""
POLICY: Final = "default-src 'none'; style-src 'sha256-" + b64encode(sha256(STYLE.encode()).digest()).decode() + "'"
"""What the page may load: nothing but the one style sheet in it."""


def page(report: Report) -> str:
    """The whole page as text (UTF-8)."""
    name = quote(_plain(report.name))
    parts = [
        _head(report), _tiles(report), _warnings(report), _map(report), _traffic(report),
        f'<div class="two">{_histograms(report)}</div>', f'<div class="two">{_keys(report)}</div>', _guards(report),
        _settings(report),
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name} - shmcache</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"{''.join(parts)}<footer>Taken {_when(report.taken)}. Values are not in this page.</footer></main></body></html>\n"
    )


# -- text --


def _plain(text: Any) -> str:
    if isinstance(text, bytes):
        return "".join(chr(b) if 32 <= b < 127 and b != 92 else f"\\x{b:02x}" for b in text)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" for c in str(text))


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _seconds(s: float | None) -> str:
    if s is None:
        return "never"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if s >= size:
            return f"{s / size:.3g} {unit}"
    return f"{s:.3g} s"


def _when(t: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))


def _code(text: str) -> str:
    """Markup of a text with `commands` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", quote(text))


def _share(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


# -- parts --


def _head(r: Report) -> str:
    word = "damaged" if r.findings and r.status in ("ok", "copy") else r.status
    chip = "chip" if word in ("ok", "copy") else "chip bad"
    made = f"made {_when(inspect.created_at(r.header))} by process {r.header['creator_pid']}"
    who = f"{len(r.processes)} process{'' if len(r.processes) == 1 else 'es'} attached"
    return (
        f'<header><h1>{quote(_plain(r.name))}</h1><span class="{chip}">{quote(word)}</span>'
        f"<p>{quote(r.form)} segment of {quote(r.owner)}, {_bytes(r.header['size'])}, {made}, {who}</p></header>"
    )


def _tiles(r: Report) -> str:
    s = r.stats
    used = (s["pages"] - s["pages_free"]) / max(s["pages"], 1)
    reads, writes = r.rates["hits"] + r.rates["misses"], r.rates["sets"]
    now = hit_ratio(r.rates["hits"], r.rates["misses"])
    said = f"hits since creation, {_share(now)} now" if now is not None else "hits since creation; no reads now"
    ever = hit_ratio(s["hits"], s["misses"])
    tiles = [
        (f"{s['items']:,}", "items"),
        (_bytes(s["bytes"]), "keys and values"),
        (_share(used), "of the pages in use"),
        (_share(ever), said if ever is not None else "hits: no reads yet"),
        (f"{reads:,.0f}", "reads a second"),
        (f"{writes:,.0f}", "sets a second"),
        (f"{r.rates['evicted']:,.0f}", f"evictions a second, {s['evicted']:,} in all"),
    ]
    return '<div class="tiles">' + "".join(f"<section><b>{b}</b><span>{t}</span></section>" for b, t in tiles) + "</div>"


def _warnings(r: Report) -> str:
    if not r.warnings:
        return '<section><h2>Warnings</h2><p class="calm">None: sound, and nothing that costs.</p></section>'
    rows = (f'<div class="warn {w.level}"><b>{quote(w.title)}</b><p>{_code(w.text)}</p></div>' for w in r.warnings)
    return f"<section><h2>Warnings</h2>{''.join(rows)}</section>"


def _map(r: Report) -> str:
    """A bar for each shard: live, expired, dead and free bytes of its pages."""
    page_size, share = r.stats["page_size"], max(r.survey.share, 1e-9)
    rows, totals = [], [0.0] * 4
    for i, shard in enumerate(r.shards):
        whole = shard["pages"] * page_size
        free = min(shard["pages_free"] * page_size, whole)
        dead = min(sum(max(b, 0) for b in shard["lane_dead"]), whole - free)
        gone = min(r.survey.shard_expired[i] / share, whole - free - dead)
        parts = (whole - free - dead - gone, gone, dead, free)
        totals = [a + b for a, b in zip(totals, parts, strict=True)]
        said = ", ".join(f"{name} {_bytes(b)}" for name, b in zip(_MAP, parts, strict=True))
        tip = f"shard {i}: {said}, {shard['items']:,} items"
        rows.append((str(i), tip, [(name, b / max(whole, 1)) for name, b in zip(_MAP, parts, strict=True)]))
    foot = charts.legend((name, f"{name} {_bytes(b)}") for name, b in zip(_MAP, totals, strict=True))
    return f"<section><h2>Memory by shard</h2>{charts.bars(rows)}{foot}</section>"


_MAP: Final = ("live", "expired", "dead", "free")


def _traffic(r: Report) -> str:
    if not r.points:
        return ""
    at = [p.at for p in r.points]
    reads = [p.rates["hits"] + p.rates["misses"] for p in r.points]
    writes = [p.rates["sets"] + p.rates["deletes"] for p in r.points]
    ratios = [hit_ratio(p.rates["hits"], p.rates["misses"]) for p in r.points]
    drawn = charts.lines("reads and writes a second", at, [("a", reads), ("b", writes)])
    drawn += charts.lines("hit ratio in percent", at, [("a", [None if x is None else 100 * x for x in ratios])], most=100)
    foot = charts.legend([("a", "reads"), ("b", "writes and deletes")])
    return f'<section><h2>Traffic over {_seconds(r.seconds)}</h2><div class="two">{drawn}</div>{foot}</section>'


def _columns(title: str, values: Sequence[tuple[str, float, str]], note: str = "") -> str:
    foot = f'<div class="legend">{quote(note)}</div>' if note else ""
    drawn = charts.columns(title, values) if any(v for _, v, _ in values) else NOTHING
    return f"<section><h2>{quote(title)}</h2>{drawn}{foot}</section>"


NOTHING: Final = '<p class="calm soft">nothing there</p>'


def _histograms(r: Report) -> str:
    seen = r.survey
    part = "" if seen.share == 1 else f"from {seen.share:.1%} of the segment"
    ttls = [*_classes(seen.ttls, _seconds), ("never", seen.ttls.never, f"{seen.ttls.never:,} items never expire")]
    fill = [(str(i), n, f"{n:,} buckets with {i} of 7 entries") for i, n in enumerate(seen.fill)]
    return (
        _columns("Value sizes", _classes(seen.sizes, _bytes), part)
        + _columns("Lifetime left", ttls, part)
        + _columns("Age of the item's page", _classes(seen.ages, _seconds), part)
        + _columns("Entries used in a bucket", fill, part)
    )


def _classes(h: Histogram, unit: Any) -> list[tuple[str, float, str]]:
    rows = list(h.classes())
    first = next((i for i, row in enumerate(rows) if row[2]), 0)
    last = max((i for i, row in enumerate(rows) if row[2]), default=len(rows) - 1)
    shown = []
    for low, high, n, size in rows[first : last + 1]:
        label = f"≥ {unit(low)}" if high is None else f"< {unit(high)}"
        tip = f"{n:,} items, {_bytes(size)}: {unit(low)} up to {'any' if high is None else unit(high)}"
        shown.append((label.replace(" KiB", "K").replace(".0", "").replace(" B", "").replace(" MiB", "M"), float(n), tip))
    return shown


def _table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """head: (name, cell class); cells are markup already."""
    top = "".join(f'<th class="{c}">{name}</th>' for name, c in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{c}">{cell}</td>' for (_, c), cell in zip(head, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>' if body else NOTHING


def _keys(r: Report) -> str:
    head = [("key", "k"), ("type", ""), ("size", "n"), ("use", "n"), ("lifetime left", "n")]

    def table(title: str, items: Any) -> str:
        rows = (
            (quote(_plain(i.key)), quote(i.type), _bytes(i.size), str(i.use), _seconds(i.ttl)) for i in items if i.key is not None
        )
        return f"<section><h2>{title}</h2>{_table(head, rows)}</section>"

    return table("Largest", r.survey.biggest) + table("Most used", r.survey.hottest)


def _guards(r: Report) -> str:
    head = [("shard", ""), ("state", ""), ("owner", ""), ("lives", ""), ("since", ""), ("recoveries", "n"), ("leases", "n"),
            ("items", "n"), ("free pages", "n")]  # fmt: skip
    lives = {True: "yes", False: "no", None: "-"}
    rows = (
        (
            str(g.shard), f'<span class="{g.state}">{g.state}</span>', f"{g.pid} {quote(_plain(g.command))}" if g.pid else "-",
            lives[g.alive], _when(g.started) if g.started else "-", f"{g.recoveries:,}", str(g.leases), f"{g.items:,}",
            f"{g.pages_free:,}",
        )
        for g in r.guards
    )  # fmt: skip
    s = r.stats
    totals = f"{s['guard_waits']:,} waits, {s['guard_timeouts']:,} timeouts, {s['recoveries']:,} recoveries in all"
    return f'<section><h2>Guards</h2>{_table(head, rows)}<div class="legend">{totals}</div></section>'


def _settings(r: Report) -> str:
    h, told = r.header, dict(r.settings)
    for name in ("size", "max_value", "item_size"):
        told[name] = _bytes(told[name])
    told["clean_period"], told["default_ttl"] = _seconds(told["clean_period"]), _seconds(told["default_ttl"])
    told["secure_delete"] = "yes" if told["secure_delete"] else "no"
    told["perms"] = f"{told['perms']:04o}"
    told["layout version"] = h["layout_version"]
    told["page size"] = _bytes(h["page_size"])
    told["semaphores"] = f"{h['sem_id']} ({r.semaphores})"
    told["uuid"] = h["uuid"].hex()
    told["processes"] = ", ".join(f"{p.pid} {p.command}" for p in r.processes) or "none"
    rows = "".join(f"<div><dt>{quote(name)}</dt><dd>{quote(_plain(value))}</dd></div>" for name, value in told.items())
    return f"<section><h2>Settings</h2><dl>{rows}</dl></section>"
