"""The tables of DESIGN.md that say where each field of a segment lies, made from layout.h.

    python -m tools.layout_table            writes them between the two marks in DESIGN.md
    python -m tools.layout_table --check    ends with 1 where they are not what layout.h says

Names, order and comments come from the header's text, offsets and sizes from a C compiler that includes it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "shmcache" / "_core" / "layout.h"
DESIGN = ROOT / "DESIGN.md"
MARKS = ("<!-- layout -->", "<!-- end of layout -->")

STRUCTS = {
    "sc_header_t": "Header, at 0",
    "sc_control_t": "Control, at 4096",
    "sc_worker_t": "Worker slot, `n_workers` of them from 8192",
    "sc_guard_word_t": "Shard: guard word, at `shard_off + shard * shard_size`",
    "sc_hard_t": "Shard: hard state, behind the guard word",
    "sc_soft_t": "Shard: soft state, hints and statistics, behind the hard state",
    "sc_lease_t": "Shard: lease, `n_leases` of them behind the soft state",
    "sc_bucket_t": "Shard: bucket, `n_buckets` of them",
}


@dataclass(frozen=True)
class Row:
    """One declaration: its fields, where they lie in their structure, and what the header's comment says of them."""

    names: list[str]
    kinds: list[str]
    what: str
    offsets: list[int]
    sizes: list[int]


def declarations(text: str, struct: str) -> Iterator[tuple[list[str], list[str], str]]:
    """(names, types, comment) of each declaration of a structure, in order."""
    body = re.search(r"typedef struct \{([^}]*)\} " + struct + ";", text)
    if body is None:
        raise ValueError(f"layout.h: a structure {struct} wanted, none found")
    for kind, members, comment in re.findall(r"(\w+)\s+([^;/]+);[ \t]*(?:/\*(.*?)\*/)?", body[1], re.DOTALL):
        names = [name.strip().partition("[") for name in members.split(",")]
        yield [name for name, _, _ in names], [kind + bracket + n for _, bracket, n in names], " ".join(comment.split())


def rows(struct: str) -> list[Row]:
    """The fields of a structure with offsets and sizes as the compiler has them. Raises: CalledProcessError."""
    found = list(declarations(HEADER.read_text(), struct))
    asks = "".join(
        f'printf("%zu %zu\\n", offsetof({struct}, {name}), sizeof((({struct} *)0)->{name}));\n'
        for names, _, _ in found
        for name in names
    )
    source = f'#include <stdio.h>\n#include "layout.h"\nint main(void) {{\n{asks}return 0;\n}}\n'
    with tempfile.TemporaryDirectory() as work:
        program = Path(work, "ask")
        Path(work, "ask.c").write_text(source)
        subprocess.run(["cc", "-std=c11", "-I", str(HEADER.parent), f"{program}.c", "-o", str(program)], check=True)
        said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    places = iter([tuple(map(int, line.split())) for line in said.splitlines()])
    out = []
    for names, kinds, what in found:
        at = [next(places) for _ in names]
        out.append(Row(names, kinds, what, [offset for offset, _ in at], [size for _, size in at]))
    return out


def tables() -> str:
    """All tables in Markdown; padding is left out."""
    out = []
    for struct, title in STRUCTS.items():
        out += [f"**{title}** (`{struct}`)", "", "| offset | bytes | field | type | |", "|---|---|---|---|---|"]
        for row in rows(struct):
            if row.names[0].startswith("pad"):
                continue
            kinds = [re.sub(r"\[SC_N_(\w+)\]", lambda m: f"[{m[1].lower().replace('_', ' ')}]", kind) for kind in row.kinds]
            cells = [
                ", ".join(map(str, row.offsets)), ", ".join(map(str, dict.fromkeys(row.sizes))),
                ", ".join(f"`{name}`" for name in row.names), ", ".join(dict.fromkeys(kinds)), row.what.replace("|", r"\|"),
            ]  # fmt: skip
            out.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
        out.append("")
    return "\n".join(out)


def replaced(text: str) -> str:
    """DESIGN.md with the tables between its marks made anew. Raises: ValueError without the marks."""
    start, _, rest = text.partition(MARKS[0])
    _, mark, end = rest.partition(MARKS[1])
    if not mark:
        raise ValueError(f"DESIGN.md: {MARKS[0]} and {MARKS[1]} wanted, not both found")
    return f"{start}{MARKS[0]}\n\n{tables()}\n{MARKS[1]}{end}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.layout_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where DESIGN.md says something else")
    args = parser.parse_args(argv)
    old = DESIGN.read_text()
    new = replaced(old)
    if args.check:
        return int(new != old)
    DESIGN.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
