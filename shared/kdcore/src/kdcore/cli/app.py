"""The commands and their options. What they do is in `listing` and `running`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kdcore.cli.session import Interrupted


class _Group(TyperGroup):
    """Lets an interrupt through, which typer would turn into exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None


app = typer.Typer(
    cls=_Group,
    name="kd",
    help="Distil a teacher into a student by a published method.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,
)

ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="key/name, for example kd/small, or a .yaml or .py file")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="fields to change: train.epochs=3 method_args.alpha=0"),
]
Seed = Annotated[int | None, typer.Option(help="seed of split, initialisation and data order")]
Output = Annotated[Path | None, typer.Option(help="folder of the run", show_default=False)]
Cpu = Annotated[bool, typer.Option("--cpu", help="do not use an accelerator")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar")]


@app.command("list")
def list_command(
    domain: Annotated[str | None, typer.Option(help="only this domain", show_default=False)] = None,
) -> None:
    """List the installed methods by domain."""
    from kdcore.cli.listing import list_methods

    list_methods(domain)


@app.command("show")
def show_command(key: Annotated[str, typer.Argument(metavar="KEY", help="key of a method, as in kd list")]) -> None:
    """Show a method: paper, equations, roles, every field of its config."""
    from kdcore.cli.listing import show

    show(key)


@app.command("train")
def train_command(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the output folder")] = False,
    seed: Seed = None,
    output: Output = None,
    cpu: Cpu = False,
    quiet: Quiet = False,
) -> None:
    """Train: teacher -> distilled student, in a run directory (runs/KEY-NAME-seedN by default)."""
    from kdcore.cli.running import train

    train(config, overrides or [], resume=resume, seed=seed, output=output, cpu=cpu, quiet=quiet)


@app.command("compare")
def compare_command(
    config: ConfigName,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="number of seeds: 0, 1, ...")] = 3,
    output: Output = None,
    cpu: Cpu = False,
    quiet: Quiet = False,
) -> None:
    """Train every arm of a config with the same seeds; the same command goes on where it stopped."""
    from kdcore.cli.running import compare

    compare(config, overrides or [], seeds=seeds, output=output, cpu=cpu, quiet=quiet)


@app.command("eval")
def eval_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="directory of a finished run")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compute the metrics of a finished run again, from its saved networks."""
    from kdcore.cli.running import evaluate

    evaluate(run, as_json=as_json)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories, finished or not")],
    output: Annotated[Path | None, typer.Option(help="the HTML file", show_default=False)] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from kdcore.report import write_report

    print(write_report(runs, output))


@app.command("cache")
def cache_command(
    config: ConfigName,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="folder of the cache")],
    overrides: Overrides = None,
) -> None:
    """Compute the teacher's outputs once, so that training holds no teacher."""
    from kdcore.cli.running import cache

    cache(config, output, overrides or [])
