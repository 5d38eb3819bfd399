"""Seeded protocol bugs (R3): each is a change to a copy of the core's sources, and the harnesses that must find it.

A mutant whose text is not found in the sources is an error: the list follows the code.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.core.build import CORE, HERE, Leg, build
from tests.crash.native import build_harness, legs, run_program
from tests.crash.points_build import compile_extension, run_points_build

__all__ = ["MUTANTS", "Mutant", "run_all", "seed_bug"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`edits`: (file, text, replacement), the text exactly once in the file. `finders`: harnesses in the order they are tried."""

    name: str
    rule: str
    edits: tuple[tuple[str, str, str], ...]
    finders: tuple[str, ...]


PYTHON: Final = ("points", "stopped", "scribble")
"""Finders that need the extension; they run on fast guards in a POSIX segment."""

_PUBLISH: Final = (
    "    SC_ST_REL(entry, SC_ENTRY(k->tag, r.page, r.off, sc_coarse_of(t, v->deadline))); /* COMMIT 2: old to new */\n"
)
_WRITE: Final = "    write_item(op, k, v, &r, total);\n"
_ACCOUNT: Final = "    if (had) {\n        sc_account_dead_guarded(op, old->page, old);\n"
_RECHECK: Final = "SC_LD_ACQ(&bucket->entry[f->slot]) != f->entry || SC_LD(&s->life[it->page]) != f->life"

MUTANTS: Final = (
    Mutant(
        "publish-early", "the entry is stored before the item's bytes",
        (("table.c", _WRITE, _PUBLISH + _WRITE), ("table.c", "    SC_CRASHPOINT(before_publish);\n" + _PUBLISH, "")),
        ("step", "pause"),
    ),
    Mutant(
        "write-in-place", "an overwrite of equal length changes the value where it lies",
        ((
            "table.c", "    u32 lane = sc_lane_of_new(op, k, v->deadline, total, old_lane, old_freq, had);\n",
            "    if (had && old->vlen == vlen && vlen > 0 && SC_TYPE(v->type) == SC_T_BYTES && old->type == v->type && "
            "sc_item_flat(t, old)) {\n        u8 *at = sc_at(t, s, old->page, old->off);\n"
            "        memcpy(at + old->voff, v->p, vlen);\n        if (t->check_len) {\n"
            "            u32 check = sc_content_mix(&t->secret, sc_header_mix(&t->secret, k->h, old->w0, old->soft), "
            "sc_value_hash(&t->secret, v->type, v->p, vlen)) ^ sc_place_mix(&t->secret, SC_LD(&s->life[old->page]), old->page, "
            "old->off);\n            memcpy(at + old->total - 4, &check, 4);\n        }\n        return SC_OK;\n    }\n"
            "    u32 lane = sc_lane_of_new(op, k, v->deadline, total, old_lane, old_freq, had);\n",
        ),),
        ("step", "pause"),
    ),
    Mutant("no-validation", "R1: nothing is compared after the copy", (("read.h", _RECHECK, "0"),), ("pause",)),
    Mutant(
        "no-life-check", "R1: the entry is compared, the page's life is not",
        (("read.h", _RECHECK, "SC_LD_ACQ(&bucket->entry[f->slot]) != f->entry"),), ("pause",),
    ),
    Mutant(
        "no-moves-check", "R3: a reader that missed does not compare moves",
        (("read.h", "SC_LIKELY(SC_LD(&first->moves) == moves)", "SC_LIKELY(SC_LD(&first->moves) == moves || 1)"),), ("pause-displace",),
    ),
    Mutant(
        "skip-recovery", "the next owner after a death counts nothing",
        (("guard.c", "        sc_recover_guarded(t, shard);\n", ""),), ("step", "points"),
    ),
    Mutant(
        "two-word-counter", "a counter is stored in two halves",
        ((
            "table.c", "            SC_ST_REL(word, (u64)now); /* COMMIT */\n",
            "            SC_ST_REL((u32 *)(void *)word, (u32)now);\n            SC_BARRIER();\n"
            "            SC_ST_REL((u32 *)(void *)word + 1, (u32)((u64)now >> 32));\n",
        ),),
        ("step",),
    ),
    Mutant(
        "missing-undo", "G3: the guard is given back without SEM_UNDO",
        (("guard.c", "SC_SEM_GUARD(shard), +1, SEM_UNDO, 0)", "SC_SEM_GUARD(shard), +1, 0, 0)"),), ("facts",),
    ),
    Mutant(
        "missing-release", "the fast guard is not given back",
        (("guard.c", "__atomic_exchange_n(&g->owner, 0, __ATOMIC_RELEASE)", "SC_LD(&g->owner)"),), ("facts", "step"),
    ),
    Mutant(
        "unlock-before-clear", "the dirty word is cleared after the semaphore is given back",
        (
            ("guard.c", "    SC_ST_REL(&g->dirty, 0);\n    SC_BARRIER();\n    SC_CRASHPOINT(dirty_cleared);\n", ""),
            (
                "guard.c", "    (void)sc_sem_op(t->sem_id, SC_SEM_GUARD(shard), +1, SEM_UNDO, 0);\n",
                "    (void)sc_sem_op(t->sem_id, SC_SEM_GUARD(shard), +1, SEM_UNDO, 0);\n    SC_ST_REL(&g->dirty, 0);\n",
            ),
        ),
        ("step",),
    ),
    Mutant(
        "no-generation", "G1: liveness asks the beacon alone",
        (("guard.c", "slot >= t->h.n_workers || (SC_LD_ACQ(&t->workers[slot].generation) & 0x7FFFFu) != gen",
          "slot >= t->h.n_workers || (gen == 0x80000u)"),),
        ("facts",),
    ),
    Mutant(
        "clear-before-repair", "G2: the dirty word is cleared before the repair",
        (("guard.c", "        sc_recover_guarded(t, shard);\n",
          "        t->shard[shard].guard->dirty = 0;\n        t->shard[shard].guard->owner &= 1u;\n"
          "        sc_recover_guarded(t, shard);\n"),),
        ("step-double", "facts"),
    ),
    Mutant(
        "unchecked-offset", "I6: an entry's place is not checked",
        (("heap.h", "    return page < t->n_pages && off <= t->page_size - SC_ITEM_HEADER && (off & 7u) == 0;\n",
          "    (void)t;\n    return page != off + 0x7FFFFFFFu;\n"),),
        ("flip",),
    ),
    Mutant(
        "unchecked-length", "I6: a value's length is not checked",
        (("heap.h", "it->klen == 0 || it->vlen > t->h.max_value ||", "it->klen == 0 ||"),), ("flip",),
    ),
    Mutant(
        "double-free", "W1: a page prepared by this very append counts as free, and the search does not go on behind it",
        (
            ("heap.c", "(SC_LIFE_SEQ(m) > op->seq0 && SC_LIFE_SEQ(m) <= s->hard->seq) || ", "m == UINT64_MAX || "),
            ("heap.c", "        s->soft->cursor = p + 1 == n ? 0 : p + 1;\n", "        s->soft->cursor = p;\n"),
        ),
        ("random_ops", "step"),
    ),
    Mutant(
        "flag-outside-check", "F1: type and flags lie outside the check",
        (("layout.h", "#define SC_W0_PLAIN(w) ((w) & 0x00FFFFFFFFFFFFFFull)", "#define SC_W0_PLAIN(w) ((w) & 0x0000FFFF0FFFFFFFull)"),),
        ("flip",),
    ),
    Mutant(
        "keep-twins", "W2: duplicates of a killed displacement are not cleared",
        (("index.c", "                clear_twin(s, p, k->b1, b2);\n                continue;\n", "                continue;\n"),),
        ("step-crowded",),
    ),
    Mutant(
        "append-to-flushed", "C0: an append goes on in a page that clear() emptied",
        (("heap.c", "        int flushed = ends.tail_seq <= SC_LD(&s->hard->flush_seq);\n", "        int flushed = 0;\n"),),
        ("random_ops", "step"),
    ),
    Mutant(
        "tail-first", "W4: the tail is stored before the item's bytes",
        (("table.c", _WRITE + "    sc_heap_commit_guarded(op, lane, &r); /* COMMIT 1 */\n",
          "    sc_heap_commit_guarded(op, lane, &r);\n" + _WRITE),),
        ("step",),
    ),
    Mutant(
        "head-first", "I5: the head passes an item before its entry is gone",
        (("evict.c", "    sc_drop_guarded(op, p, &it);\n    passed_dead(op, lane, it.total);\n    s->soft->stat[SC_SS_EVICTED]++;\npass:\n",
          "    (void)head_pass(op, lane, &ends, it.total);\n    sc_drop_guarded(op, p, &it);\n"
          "    passed_dead(op, lane, it.total);\n    s->soft->stat[SC_SS_EVICTED]++;\n    return 1;\npass:\n"),),
        ("step-full",),
    ),
    Mutant(
        "wipe-first", "secure_delete wipes the old value before the new one is published",
        (("table.c", _PUBLISH, "    if (had && (t->h.flags & SC_F_SECURE))\n        sc_item_wipe_guarded(op, old->page, old->off);\n" + _PUBLISH),),
        ("step-overwrite",),
    ),
    Mutant(
        "fork-keeps-slot", "G4: a child goes on under its parent's worker slot",
        (("guard.c", "    *advised = madvise(p, 4096, MADV_WIPEONFORK) == 0;\n", "    *advised = 1;\n"),), ("facts",),
    ),
    Mutant(
        "steal-by-timeout", "a guard is taken from whoever holds it for longer than a wait",
        (("guard.c", "    return v == 0;\n", "    return v >= 0;\n"),), ("stopped",),
    ),
    Mutant(
        "unchecked-content", "a value is given out whatever its check says",
        (("read.h", "    if (SC_UNLIKELY(!ok || !whole)) {\n", "    (void)ok;\n    if (SC_UNLIKELY(!whole)) {\n"),), ("scribble",),
    ),
)  # fmt: skip


def seed_bug(mutant: Mutant, directory: Path) -> Path:
    """A copy of the core with the bug; ValueError if the code no longer has the text."""
    core = directory / "core"
    shutil.rmtree(core, ignore_errors=True)
    shutil.copytree(CORE, core)
    for file, text, replacement in mutant.edits:
        path = core / file
        source = path.read_text()
        if source.count(text) != 1:
            raise ValueError(
                f"mutant {mutant.name}: the text once in {file} wanted, {source.count(text)} times found: {text[:80]!r}"
            )
        path.write_text(source.replace(text, replacement))
    return core


def _arguments(finder: str, seed: int, seconds: float) -> list[str]:
    most = ["--seconds", str(int(seconds)), "--seed", str(seed), "--most", "60"]
    timed = ["--seconds", str(int(seconds) * 3), "--seed", str(seed)]
    return {
        "step": most,
        "step-double": [*timed, "--op", "insert", "--fill", "empty", "--value", "4100", "--double", "1"],
        "step-crowded": [*timed, "--most", "120", "--op", "insert", "--buckets", "16"],
        "step-full": [*timed, "--most", "3000", "--fill", "full", "--op", "insert", "--flags", "0", "--buckets", "64"],
        "step-overwrite": [*most, "--op", "overwrite", "--flags", "4"],
        "pause-displace": [*timed, "--mutation", "displace"],
        "pause": ["--seconds", str(int(seconds) * 2), "--seed", str(seed)],
        "flip": ["--seconds", str(int(seconds)), "--seed", str(seed)],
        "random_ops": ["--rounds", "3", "--ops", "4000", "--seed", str(seed)],
        "facts": [],
    }[finder]


def _find(mutant: Mutant, leg: Leg, directory: Path, seed: int, seconds: float) -> tuple[str | None, str]:
    """The harness that found the bug, with its first line of evidence."""
    core = seed_bug(mutant, directory)
    for finder in mutant.finders:
        name = finder.partition("-")[0]
        if name in PYTHON:
            package, log = directory / name, directory / f"{name}.txt"
            compile_extension(package, core=core)
            with log.open("w") as out:
                arguments = [name, "--seed", str(seed), "--seconds", str(seconds), "--form", "posix", "--guard", "fast"]
                code = run_points_build(package, arguments, stdout=out, stderr=out)
            if code != 0:
                return finder, " ".join(log.read_text().split())
            continue
        if name in ("random_ops", "facts"):
            program = build(directory / name, leg, [HERE / "rig.c", HERE / f"{name}.c"], core=core)
        else:
            program = build_harness(name, leg, directory, core=core)
        ok, text = run_program(program, _arguments(finder, seed, seconds), 60 + seconds * 4)
        if not ok:
            lines = [line for line in text.splitlines() if line.strip()]
            return finder, lines[0] if lines else "crashed"
    return None, ""


def run_all(seed: int, seconds: float, only: str | None = None) -> int:
    """How many mutants nobody found."""
    missed = 0
    [leg] = legs(["gcc -O2"])
    for mutant in MUTANTS:
        if only and mutant.name != only:
            continue
        with tempfile.TemporaryDirectory(prefix="shmcache-mutant-") as name:
            finder, evidence = _find(mutant, leg, Path(name), seed, seconds)
        missed += finder is None
        print(f"{mutant.name:20} {finder or 'NOT FOUND':15} {mutant.rule}\n    {evidence[:200]}", flush=True)
    print(f"mutants: {missed} not found")
    return missed
