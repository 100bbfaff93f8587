"""Shows what a what-if found as text. Must never compute a figure."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from holdfast.replay.effects import Account, Effect, Slice


def timeline_table(account: Account) -> Table:
    """Return the time line."""
    shown = _table("time line")
    for name in ("s", "requests", "over", "tokens/s", "first token p50", "p99, ms", "longest gap, ms", "moves"):
        shown.add_column(name, justify="right")
    shown.add_column("usable", justify="right")
    shown.add_column("turned away, lost")
    for piece in account.slices:
        shown.add_row(
            f"{piece.at:g}",
            str(piece.requests),
            str(piece.finished),
            f"{piece.tokens_per_second:,.0f}",
            _ms(piece.first_p50),
            _ms(piece.first_p99),
            _ms(piece.longest_gap or None),
            str(piece.migrations or ""),
            f"{piece.usable_workers}/{account.workers}",
            _reasons(piece),
        )
    return shown


def effects_table(effects: Sequence[Effect]) -> Table:
    """Return what each fault did."""
    shown = _table("faults")
    for name in ("at, s", "fault", "target"):
        shown.add_column(name)
    for name in ("streams hit", "moved", "lost", "longest gap, ms"):
        shown.add_column(name, justify="right")
    for one in effects:
        shown.add_row(
            f"{one.at:.1f}" + (f"-{one.until:.1f}" if one.until > one.at else ""),
            one.kind,
            one.target,
            str(one.hit),
            str(one.moved),
            str(one.lost),
            _ms(one.longest_gap or None),
        )
    return shown


def totals_table(accounts: Sequence[Account]) -> Table:
    """Return what is not in the reports' own table, side by side."""
    shown = _table("cluster")
    shown.add_column("")
    for account in accounts:
        shown.add_column(account.title, justify="right")
    for name, cells in zip(_NAMES, zip(*(_cells(account) for account in accounts), strict=True), strict=True):
        shown.add_row(name, *cells)
    return shown


_NAMES = (
    "streams moved / lost",
    "longest gap between two tokens, ms",
    "best tokens/s",
    "sequences running: mean / peak / seats",
    "sequences waiting in engines: peak / share of the time",
    "KV blocks of the fullest engine, peak",
)


def _cells(account: Account) -> tuple[str, ...]:
    room = account.capacity
    return (
        f"{account.migrations} / {account.streams_lost}",
        _ms(account.longest_gap or None),
        f"{room.best_tokens_per_second:,.0f}",
        f"{room.running_mean:,.0f} / {room.running_peak:,} / {room.seats:,}",
        f"{room.waiting_peak:,} / {room.waiting_share:.0%}",
        f"{room.kv_peak:.0%}",
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.0f}"


def _reasons(piece: Slice) -> str:
    return ", ".join(f"{count} {code}" for code, count in (*piece.rejected.items(), *piece.failed.items()))
