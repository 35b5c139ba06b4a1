"""The live rows at the foot of a terminal, while ranks write above them as they like.

Ranks and agent write to the terminal themselves, unchanged, progress bars and all; a picture that
redraws itself by moving the cursor up would be torn by each of their lines. So the terminal is told
to scroll only its upper part (DECSTBM), and the rows below belong to us: each redraw is one write
that saves the cursor, draws, and puts it back. rich lays the rows out; it never owns the terminal.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from perdure.launchers.display import Plain
from perdure.launchers.view import Json, RunView, count, rate, whole_span

ROWS = 3
REDRAW_S = 0.2
_COLOURS = {
    "running": "green",
    "saving": "green",
    "waiting": "yellow",
    "launching": "cyan",
    "stopping": "magenta",
    "finished": "bold",
}


def rows(view: RunView, now_s: float) -> Group:
    """Three rows: whose run it is, how far it is, how safe it is. A function of its arguments."""
    colour = _COLOURS.get(view.phase, "white")
    title = Text.assemble((" perdure ", "bold"), (view.run, "cyan"), " ")
    return Group(
        Rule(title, align="left", style="dim"), _progress(view, colour), _safety(view, now_s)
    )


def _progress(view: RunView, colour: str) -> Table:
    line = Table.grid(padding=(0, 2), expand=True)
    cells: list[Text | ProgressBar] = [
        Text.assemble(("● ", colour), (view.phase, f"bold {colour}"))
    ]
    line.add_column(no_wrap=True)

    def add(cell: Text | ProgressBar, **options: int) -> None:
        line.add_column(no_wrap=True, ratio=options.get("ratio"))
        cells.append(cell)

    if view.phase == "waiting" and (view.waiting_for or view.because):
        add(Text(view.waiting_for or view.because, style="yellow", overflow="ellipsis"), ratio=1)
        line.add_row(*cells)
        return line
    if view.attempt:
        add(Text(f"attempt {view.attempt}"))
    end = f" / {view.total_steps:,}" if view.total_steps else ""
    add(Text.assemble("step ", (f"{view.step:,}", "bold"), (end, "dim")))
    if view.fraction is not None:
        add(ProgressBar(total=1.0, completed=view.fraction, complete_style=colour), ratio=1)
        add(Text(f"{view.fraction:.1%}", style="bold"))
    if view.steps_per_s > 0 and view.phase in {"running", "saving"}:
        add(Text(rate(view.steps_per_s)))
    if view.left_s is not None:
        add(Text(f"{whole_span(view.left_s)} left"))
    if view.loss is not None:
        add(Text.assemble("loss ", (f"{view.loss:.4g}", "bold")))
    if view.fraction is None:
        add(Text(""), ratio=1)
    line.add_row(*cells)
    return line


def _safety(view: RunView, now_s: float) -> Text:
    parts = [f"{count(len(view.nodes), 'node')}, {count(view.world_size, 'rank')}"]
    if view.spares:
        parts.append(count(len(view.spares), "spare"))
    if view.checkpoint_step is None:
        parts.append("no checkpoint yet")
    else:
        age = ""
        if view.checkpoint_at_s is not None:
            age = f", {whole_span(max(0.0, now_s - view.checkpoint_at_s))} ago"
        tier = f" in {view.checkpoint_tier}" if view.checkpoint_tier else ""
        parts.append(f"checkpoint step {view.checkpoint_step:,}{tier}{age}")
    if view.restarts:
        parts.append(count(view.restarts, "restart"))
    text = Text("  " + " · ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")
    if view.faults:
        text.append("  last fault: ", style="dim red")
        text.append(view.faults[-1].because, style="red")
    return text


class Screen:
    """Owns the lowest rows of the terminal `fd` until `end`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.view: RunView | None = None
        self.drawn_at_s = 0.0
        self.size = os.terminal_size((0, 0))
        self.plain = Plain(_Above(self))

    def turn(self, status: Json, lines: Sequence[Json]) -> None:
        self.view = RunView.read(status)
        self.plain.turn(status, lines)
        self._draw(force=bool(lines))

    def idle(self) -> None:
        self._draw(force=False)

    def end(self, status: Json) -> None:
        self._release()
        self.plain.end(status)

    def above(self, text: str) -> None:
        """Faults and starts scroll by like the ranks' own output.

        A rank may be in the middle of a line, such as a progress bar. So a line of ours is put in
        above its line, and the cursor goes back to its column: room is made below (index, reverse
        index), a line inserted, written, and left again.
        """
        width = os.get_terminal_size(self.fd).columns
        colour = "31" if "  fault: " in text else "2"
        for line in text.splitlines():
            for at in range(0, max(1, len(line)), width):
                part = line[at : at + width]
                _write(self.fd, f"\x1bD\x1bM\x1b7\x1b[L\r\x1b[{colour}m{part}\x1b[0m\x1b8\x1b[B")

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        if self.view is None or (not force and now - self.drawn_at_s < REDRAW_S):
            return
        self.drawn_at_s = now
        size = os.get_terminal_size(self.fd)
        if size.lines < ROWS + 3:
            return  # too small to share: the lines above still tell everything
        if size != self.size:
            self._reserve(size)
        console = Console(
            file=io.StringIO(), force_terminal=True, width=size.columns, highlight=False
        )
        with console.capture() as captured:
            console.print(rows(self.view, time.time()))
        drawn = captured.get().splitlines()[:ROWS]
        first = size.lines - ROWS + 1
        body = "".join(f"\x1b[{first + i};1H\x1b[2K{row}" for i, row in enumerate(drawn))
        _write(self.fd, f"\x1b7{body}\x1b[0m\x1b8")

    def _reserve(self, size: os.terminal_size) -> None:
        """Make room, and let only what is above it scroll."""
        last = size.lines - ROWS
        room = "\r\n" * ROWS if not self.size.lines else ""
        up = f"\x1b[{ROWS}A" if not self.size.lines else ""
        _write(self.fd, f"{room}\x1b7\x1b[1;{last}r\x1b8{up}")
        self.size = size

    def _release(self) -> None:
        if not self.size.lines:
            return
        first = self.size.lines - ROWS + 1
        clear = "".join(f"\x1b[{first + i};1H\x1b[2K" for i in range(ROWS))
        _write(self.fd, f"\x1b7{clear}\x1b[r\x1b8")
        self.size = os.terminal_size((0, 0))


class _Above:
    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def write(self, text: str) -> int:
        self.screen.above(text)
        return len(text)

    def flush(self) -> None:
        return


def _write(fd: int, text: str) -> None:
    """One write for one picture: other writers of the terminal come before or after, not within."""
    data = text.encode()
    while data:
        data = data[os.write(fd, data) :]
