"""The command line: `hgfast` or `python -m hgfast`."""

import argparse
import sys
from collections.abc import Sequence

from hgfast._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status. Wrong arguments end in argparse's SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hgfast", description="Fast inference for heatmap pose networks in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"hgfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, CPU, GPU, and which kernels are built")
    demo = commands.add_parser("demo", help="optimise, verify and time a network, draw its poses")

    explain = commands.add_parser("explain", help="what becomes of a network of your own")

    # Each command imports what it needs: only the demo draws pictures, and info is quick.
    if arguments[:1] == ["demo"]:
        from hgfast.demo.cli import add_arguments, run

        add_arguments(demo)
        return run(parser.parse_args(arguments))

    if arguments[:1] == ["explain"]:
        from hgfast import explain as command

        command.add_arguments(explain)
        return command.run(parser.parse_args(arguments))

    parser.parse_args(arguments)
    from hgfast.info import print_info

    print_info()
    return 0
