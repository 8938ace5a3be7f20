"""`kvbm bench`: how fast it is by itself, and how a served model feels."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from kvbm_service.bench import GROUPS
from kvbm_service.cli.options import Json
from kvbm_service.errors import KvbmError, SettingError

if TYPE_CHECKING:
    from kvbm_service.bench.serving.client import Asked
    from kvbm_service.bench.serving.workload import Workload


class _RunByDefault(TyperGroup):
    """`kvbm bench leader` is short for `kvbm bench run leader`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Measure speeds: our own, each beside a yardstick (`run`), or a served model's (`serve`).",
)


@app.command()
def run(
    groups: Annotated[
        list[str] | None,
        typer.Argument(metavar="GROUP", help=f"{', '.join(GROUPS)}. Default: all."),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", dir_okay=False, help="Where the rows go, as JSON.")
    ] = Path("build/bench.json"),
) -> None:
    """Measure speeds, each beside a yardstick from the same run."""
    wanted = groups or list(GROUPS)
    for group in wanted:
        if group not in GROUPS:
            raise SettingError("GROUP", group, ", ".join(GROUPS))
    from kvbm_service.bench.run import run

    run(wanted, output)


@app.command()
def serve(
    url: Annotated[str, typer.Option(metavar="URL", help="The server, like http://host:8000.")],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Default: the server's first.", show_default=False)
    ] = "",
    users: Annotated[int, typer.Option(min=1, max=10_000, help="Who talk at a time.")] = 15,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Questions of each user.")] = 20,
    qps: Annotated[
        float, typer.Option(min=0.001, max=10_000, help="Questions per second, of all users.")
    ] = 1.0,
    system: Annotated[
        int, typer.Option(min=0, metavar="WORDS", help="What all prompts begin with.")
    ] = 1000,
    history: Annotated[
        int, typer.Option(min=0, metavar="WORDS", help="Each user's own text.")
    ] = 20_000,
    question: Annotated[
        int, typer.Option(min=1, metavar="WORDS", help="The length of a question.")
    ] = 12,
    answer: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="The length of an answer, at most.")
    ] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="How long to ask.")] = 100.0,
    timeout: Annotated[float, typer.Option(min=1, help="How long to wait for one answer.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Another one: other texts.")] = 0,
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="Where one is needed.", show_default=False)
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Each question, as jsonl.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw time to first token (.png).", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk with a served model as the guides' benchmark does: long texts, short answers, rounds.

    The lengths in words are about those in tokens; what the server counts is printed. Which of
    them came from cache vLLM tells with --enable-prompt-tokens-details.

    \b
    Example:
      kvbm bench serve --url http://localhost:8000 --qps 1
    """
    import msgspec

    from kvbm_service.bench.serving import figures
    from kvbm_service.bench.serving.workload import Workload

    if not url.startswith(("http://", "https://")):
        raise SettingError("--url", url, "a URL like http://host:8000")
    workload = Workload(users, rounds, qps, system, history, question, answer, seed)
    asked, took = asyncio.run(_talk(url, model, api_key, timeout, workload, seconds))
    summary = figures.sum_up(asked, took)
    if output is not None:
        _write(output, b"".join(msgspec.json.encode(one) + b"\n" for one in asked))
    if plot is not None:
        figures.plot(asked, plot)
    if as_json:
        typer.echo(msgspec.json.encode(summary))
    else:
        from rich.console import Console

        Console().print(figures.table(summary))
    errors = [one.error for one in asked if one.error]
    if errors:
        raise KvbmError(f"{len(errors)} of {len(asked)} questions failed; the first: {errors[0]}")


async def _talk(
    url: str, model: str, api_key: str, timeout: float, workload: Workload, seconds: float
) -> tuple[list[Asked], float]:
    import aiohttp
    import msgspec
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from kvbm_service.bench.serving.client import Server
    from kvbm_service.bench.serving.run import talk

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    async with Server(url, model, api_key, timeout) as server:
        if not model:
            try:
                await server.find_model()
            except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
                raise SettingError(
                    "--url", url, f"a server with OpenAI's interface ({error})"
                ) from None
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"asking {server.model}", total=seconds)
            done = failed = 0

            def on_asked(asked: Asked) -> None:
                nonlocal done, failed
                done, failed = done + 1, failed + bool(asked.error)
                said = f"asking {server.model}: {done} answered" + f", {failed} failed" * bool(
                    failed
                )
                progress.update(bar, completed=min(asked.ended_at, seconds), description=said)

            return await talk(server, workload, seconds, on_asked)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        allowed = f"a file that can be written ({error.strerror})"
        raise SettingError("--output", str(path), allowed) from None
