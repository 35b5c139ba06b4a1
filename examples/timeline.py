"""What happened to a run, drawn: which attempt ran where and when, and how far the training was.

Everything is read from the run's journal, but for the kill (an act from outside, known only to
whoever did it) and the samples of the step, which come from the script's own log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

ATTEMPTS = ("#4c72b0", "#55a868", "#8172b2", "#937860")  # by attempt, over and over
KILL, COMMIT, LINE, WAITING = "#c44e52", "#dd8452", "#333333", "#e3e3e3"


@dataclass(slots=True)
class Bar:
    """One attempt's ranks on one node."""

    node: str
    attempt: str
    ranks: str
    begin: float
    end: float | None = None


@dataclass(slots=True)
class Story:
    """Times are seconds since the epoch."""

    begin: float
    end: float
    bars: list[Bar] = field(default_factory=list)
    nodes: dict[str, float] = field(default_factory=dict)  # since when it is there
    commits: list[tuple[float, int]] = field(default_factory=list)
    restores: list[tuple[float, int]] = field(default_factory=list)


def story_of(lines: Iterable[dict[str, Any]]) -> Story:
    """The journal's lines, oldest first, folded into what a picture needs."""
    story = Story(begin=0.0, end=0.0)
    planned: dict[str, list[list[Any]]] = {}
    for line in lines:
        at, kind = float(line["at"]), line["kind"]
        story.begin = story.begin or at
        story.end = at
        match kind:
            case "nodes_offered":
                for name, _ in line["nodes"]:
                    story.nodes.setdefault(name, at)
            case "launch_gang":
                planned[line["attempt"]] = line["members"]
                if line["restore"]:
                    story.restores.append((at, line["restore"]["step"]))
            case "gang_started":
                for node, _, first, nproc in planned.get(line["attempt"], []):
                    if node == line["node"]:
                        ranks = f"attempt {line['attempt']}, ranks {first}-{first + nproc - 1}"
                        story.bars.append(Bar(node, line["attempt"], ranks, at))
            case "node_lost":
                _close(story, at, node=line["node"])
            case "gang_stopped":
                _close(story, at, node=line["node"])
            case "checkpoint_committed" if line["tier"] == "store":
                if line["step"] not in [step for _, step in story.commits]:  # told by every node
                    story.commits.append((at, line["step"]))
            case "finish":
                _close(story, at)
    return story


def _close(story: Story, at: float, node: str | None = None) -> None:
    for bar in story.bars:
        if bar.end is None and node in (None, bar.node):
            bar.end = at


def draw(
    story: Story,
    steps: Sequence[tuple[float, int]],
    kill: tuple[float, str],
    recovered_s: float,
    path: Path,
) -> None:
    """`steps`: (time, step) as sampled; `kill`: (time, node); `recovered_s`: from there to the next step."""
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(11, 6.2), height_ratios=(1, 1.6), layout="constrained"
    )
    _draw_nodes(above, story, kill)
    above.set_title(
        f"One of two nodes was killed; the next step followed {recovered_s:.1f} s later",
        loc="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    _draw_steps(below, story, steps)
    for axes in (above, below):
        axes.axvline(kill[0] - story.begin, color=KILL, lw=1.2, ls="--")
        axes.spines[["top", "right"]].set_visible(False)
    below.set_xlim(0, (story.end - story.begin) * 1.02)
    below.set_ylim(0)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_nodes(axes: Axes, story: Story, kill: tuple[float, str]) -> None:
    """A row a node: grey while its agent waits, then the attempts whose ranks ran there."""
    since, (kill_at, kill_node) = story.begin, kill
    rows = {node: row for row, node in enumerate(sorted(story.nodes, reverse=True))}
    colors = {a: ATTEMPTS[i % len(ATTEMPTS)] for i, a in enumerate(_attempts(story))}
    for node, there in story.nodes.items():
        first = next((bar for bar in story.bars if bar.node == node), None)
        until = first.begin if first is not None else story.end
        axes.barh(rows[node], until - there, 0.62, there - since, color=WAITING)
        if first is None or first.attempt != story.bars[0].attempt:
            axes.text(
                (there + until) / 2 - since, rows[node], "spare: agent up, torch imported",
                ha="center", va="center", color="#555555", fontsize=9,
            )  # fmt: skip
    for bar in story.bars:
        end = bar.end if bar.end is not None else story.end
        if bar.node == kill_node:
            end = min(end, kill_at)
        color = colors[bar.attempt]
        axes.barh(rows[bar.node], end - bar.begin, 0.62, bar.begin - since, color=color)
        axes.text(
            (bar.begin + end) / 2 - since, rows[bar.node], bar.ranks,
            ha="center", va="center", color="white", fontsize=9,
        )  # fmt: skip
    axes.plot(
        kill_at - since, rows[kill_node],
        marker="X", markersize=13, color=KILL, markeredgecolor="white",
    )  # fmt: skip
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)


def _draw_steps(axes: Axes, story: Story, steps: Sequence[tuple[float, int]]) -> None:
    since = story.begin
    for part in _unbroken(steps):
        axes.plot([at - since for at, _ in part], [step for _, step in part], color=LINE, lw=1.8)
    for at, step in story.commits:
        axes.plot(at - since, step, "o", color=COMMIT, markersize=6)
    for _, step in story.restores:
        axes.axhline(step, color=COMMIT, lw=0.9, ls=":", zorder=0)
        axes.annotate(
            f"restored from step {step}", (1.0, step), (-4, -12), ha="right",
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9, color=COMMIT,
        )  # fmt: skip
    axes.set_ylabel("optimizer step")
    axes.set_xlabel("seconds since the run began")
    axes.legend(
        handles=[
            Line2D([], [], color=LINE, label="step, by the script's own log"),
            Line2D([], [], color=COMMIT, marker="o", ls="", label="checkpoint committed on S3"),
            Line2D([], [], color=KILL, lw=1.2, ls="--", label="node killed with all on it"),
        ],
        loc="upper left", frameon=False, fontsize=9,
    )  # fmt: skip


def _unbroken(steps: Sequence[tuple[float, int]]) -> list[list[tuple[float, int]]]:
    """Cut where the step falls: nothing was trained between the two."""
    parts: list[list[tuple[float, int]]] = []
    for sample in steps:
        if not parts or sample[1] < parts[-1][-1][1]:
            parts.append([])
        parts[-1].append(sample)
    return parts


def _attempts(story: Story) -> list[str]:
    return list(dict.fromkeys(bar.attempt for bar in story.bars))
