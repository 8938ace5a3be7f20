"""What was replayed, as a table and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from kvbm_service.errors import SettingError
from kvbm_service.replay.policies import Outcome, TierOutcome


def table(outcomes: Sequence[Outcome]) -> Table:
    """Policies × capacities; behind each ratio the share of LRU's gap to the bound it closes."""
    capacities = sorted({one.capacity for one in outcomes})
    ratios = {(one.policy, one.capacity): one.prefix_hit_ratio for one in outcomes}
    shown = Table(title=f"{outcomes[0].trace}: prefix-hit ratio")
    shown.add_column("policy")
    for capacity in capacities:
        shown.add_column(percent(capacity), justify="right")
    for policy in dict.fromkeys(one.policy for one in outcomes):
        cells = [_cell(ratios, policy, capacity) for capacity in capacities]
        shown.add_row(policy, *cells)
    return shown


def _cell(ratios: dict[tuple[str, float], float], policy: str, capacity: float) -> str:
    ratio = ratios[policy, capacity]
    closed = gap_closed(ratio, ratios.get(("lru", capacity)), ratios.get(("clairvoyant", capacity)))
    plain = policy in ("lru", "clairvoyant") or closed is None
    return f"{ratio:.4f}" if plain else f"{ratio:.4f} ({closed:+.0%})"


def gap_closed(ratio: float, lru: float | None, bound: float | None) -> float | None:
    """How much of the way from LRU to the bound this is; None: unknown, or there is no way."""
    if lru is None or bound is None or bound <= lru:
        return None
    return (ratio - lru) / (bound - lru)


def tiers_table(outcomes: Sequence[TierOutcome]) -> Table:
    """What each tier answered, where there are two."""
    shown = Table(title=f"{outcomes[0].trace}: default with a disk tier, by tier")
    for name in ("host slots", "disk slots", "host", "disk", "both"):
        shown.add_column(name, justify="right")
    for one in outcomes:
        ratios = (one.host_hit_ratio, one.disk_hit_ratio, one.host_hit_ratio + one.disk_hit_ratio)
        cells = (f"{ratio:.4f}" for ratio in ratios)
        shown.add_row(str(one.host_slots), str(one.disk_slots), *cells)
    return shown


def percent(share: float) -> str:
    """A share as the command line takes it."""
    return f"{share * 100:.4g}%"


def check_plot() -> None:
    """Whether `plot` would find what it draws with.

    Raises:
        SettingError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        cure = "drawing needs matplotlib: pip install 'kvbm-service[plot]'"
        raise SettingError("--plot", "FILE.png", cure) from None


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw hit ratio over capacity, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for policy in dict.fromkeys(one.policy for one in outcomes):
        points = sorted(
            (o.capacity * 100, o.prefix_hit_ratio) for o in outcomes if o.policy == policy
        )
        style = {"default": "o-", "clairvoyant": "k--"}.get(policy, ".-")
        axes.plot(
            *zip(*points, strict=True), style, label=policy, lw=2 if policy == "default" else 1
        )
    axes.set_xscale("log")
    ticks = sorted({one.capacity * 100 for one in outcomes})
    axes.set_xticks(ticks, [f"{tick:.4g} %" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("capacity, of the unique blocks")
    axes.set_ylabel("prefix-hit ratio")
    axes.set_ylim(bottom=0)
    axes.set_title(outcomes[0].trace)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise SettingError("--plot", str(path), f"a file that can be written ({error})") from None
    finally:
        pyplot.close(figure)
