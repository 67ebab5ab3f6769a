"""``python -m benchmarks``: compare methods on real models, and measure what the library costs."""

from __future__ import annotations

import transformers
import typer

from .commands.compare import METHODS_HELP, compare_command
from .commands.demo import demo_command
from .commands.line_search import line_search_command
from .commands.longrun import longrun_command
from .commands.overhead import overhead_command
from .commands.paper import PRESETS_HELP, paper_command, report_command
from .commands.ranks import ranks_command
from .commands.shapes import shapes_command
from .commands.teacher import teacher_command
from .commands.tokens import tokens_command

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.callback()
def _options() -> None:
    transformers.logging.set_verbosity_error()


app.command("demo")(demo_command)
app.command("compare", epilog=f"The methods:\n\n{METHODS_HELP}")(compare_command)
app.command("tokens")(tokens_command)
app.command("teacher")(teacher_command)
app.command("paper", epilog=f"The presets, where they differ:\n\n{PRESETS_HELP}")(paper_command)
app.command("report")(report_command)
app.command("shapes")(shapes_command)
app.command("ranks")(ranks_command)
app.command("line-search")(line_search_command)
app.command("overhead")(overhead_command)
app.command("longrun")(longrun_command)

if __name__ == "__main__":
    app()
