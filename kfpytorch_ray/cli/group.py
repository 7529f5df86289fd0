"""The command ``kfpytorch-ray``: its sub-commands, and how every one of them ends.

An error of our tree is said as its message and becomes an exit code; anything else is a bug of ours or of the user's
module, and shows its traceback.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import rich_click as click

from kfpytorch_ray.cli.clean import gc
from kfpytorch_ray.cli.doctor import doctor
from kfpytorch_ray.cli.exit_codes import ExitCode, described, exit_code_of
from kfpytorch_ray.cli.inside import flamegraph, stacks
from kfpytorch_ray.cli.look import list_, logs, status
from kfpytorch_ray.cli.options import verbose_option
from kfpytorch_ray.cli.render import render
from kfpytorch_ray.cli.reporting import report
from kfpytorch_ray.cli.run import run
from kfpytorch_ray.cli.take import cancel, result
from kfpytorch_ray.errors import KfpytorchRayError


class Commands(click.RichGroup):
    """A group whose commands end with the exit code of their error, and are listed as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a run's life."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        if threading.current_thread() is threading.main_thread():
            # flytekit has SIGINT end the process, with the code of wrong use and without a clean-up.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except KfpytorchRayError as error:
            report(error, ctx)
            ctx.exit(exit_code_of(error))
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(ExitCode.INTERRUPTED)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    # rich_click makes a line of each paragraph.
    epilog="\n\n".join(("Exit codes:", *described())),
)
@click.version_option(package_name="kfpytorch_ray", prog_name="kfpytorch-ray")
@verbose_option
def main() -> None:
    """Launch torch elastic training on Ray, here or on a cluster elsewhere, and look after what was launched."""


for _command in (
    run,
    render,
    status,
    list_,
    logs,
    stacks,
    flamegraph,
    cancel,
    result,
    gc,
    doctor,
):
    main.add_command(_command)
