"""What was measured, summed up: a row, a table, a drawing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from kvbm_service.bench.serving.client import Asked
from kvbm_service.errors import SettingError


class Figures(msgspec.Struct, frozen=True):
    """Times in seconds; tokens per second over the whole run; shares between 0 and 1."""

    requests: int
    failed: int
    seconds: float
    qps: float
    prompt_tokens_per_second: float
    answer_tokens_per_second: float
    ttft_average: float | None
    ttft_p50: float | None
    ttft_p90: float | None
    ttft_p99: float | None
    latency_average: float | None
    hit_share: float | None
    """Of the prompts' tokens, those that were cached; None: the server does not say."""


def sum_up(asked: Sequence[Asked], seconds: float) -> Figures:
    """The figures of a run of `seconds`."""
    good = [one for one in asked if not one.error]
    ttft = sorted(
        one.first_token_at - one.asked_at for one in good if one.first_token_at is not None
    )
    latencies = [one.ended_at - one.asked_at for one in good]
    told = [one for one in good if one.cached_tokens is not None]
    prompt_tokens = sum(one.prompt_tokens for one in told)
    return Figures(
        requests=len(asked),
        failed=len(asked) - len(good),
        seconds=seconds,
        qps=len(good) / seconds,
        prompt_tokens_per_second=sum(one.prompt_tokens for one in good) / seconds,
        answer_tokens_per_second=sum(one.answer_tokens for one in good) / seconds,
        ttft_average=statistics.fmean(ttft) if ttft else None,
        ttft_p50=percentile(ttft, 0.5),
        ttft_p90=percentile(ttft, 0.9),
        ttft_p99=percentile(ttft, 0.99),
        latency_average=statistics.fmean(latencies) if latencies else None,
        hit_share=sum(one.cached_tokens or 0 for one in told) / prompt_tokens
        if prompt_tokens
        else None,
    )


def percentile(ascending: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share does not exceed."""
    if not ascending:
        return None
    index = -(-len(ascending) * share // 1)
    return ascending[max(0, int(index) - 1)]


def table(figures: Figures) -> Table:
    """The figures, for people."""
    shown = Table(show_header=False)
    shown.add_column(style="bold")
    shown.add_column(justify="right")
    for name, value in (
        ("requests", f"{figures.requests}"),
        ("failed", f"{figures.failed}"),
        ("questions per second", f"{figures.qps:.2f}"),
        ("prompt tokens per second", f"{figures.prompt_tokens_per_second:,.0f}"),
        ("answer tokens per second", f"{figures.answer_tokens_per_second:,.1f}"),
        ("time to first token, average", _seconds(figures.ttft_average)),
        ("  median", _seconds(figures.ttft_p50)),
        ("  90 of 100 within", _seconds(figures.ttft_p90)),
        ("  99 of 100 within", _seconds(figures.ttft_p99)),
        ("whole answer, average", _seconds(figures.latency_average)),
        ("prompt tokens from cache", _share(figures.hit_share)),
    ):
        shown.add_row(name, value)
    return shown


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value * 1e3:,.0f} ms"


def _share(value: float | None) -> str:
    return "the server does not say" if value is None else f"{value:.1%}"


def plot(asked: Sequence[Asked], path: Path) -> None:
    """Draw the time to first token over the run.

    Raises:
        SettingError: matplotlib is not installed, or `path` cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        cure = "drawing needs matplotlib: pip install 'kvbm-service[plot]'"
        raise SettingError("--plot", str(path), cure) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    good = [one for one in asked if one.first_token_at is not None and not one.error]
    first = [one for one in good if one.round == 0]
    later = [one for one in good if one.round > 0]
    for name, some in (("first question", first), ("later ones", later)):
        axes.plot(
            [one.asked_at for one in some],
            [(one.first_token_at or 0.0) - one.asked_at for one in some],
            "o",
            ms=3,
            label=name,
        )
    axes.set_xlabel("asked at, seconds")
    axes.set_ylabel("time to first token, seconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise SettingError("--plot", str(path), f"a file that can be written ({error})") from None
    finally:
        pyplot.close(figure)
