"""Reports, measures and checks this build on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from fastrnn import bench, check, info

HELP = {
    "info": "print what was built, what it runs on, and what is in use",
    "bench": "time torch's layer and fastrnn's of your model's sizes, in 20 seconds",
    "check": "compare every kernel with torch's layers, in 30 seconds; for a bug report",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def main(arguments: list[str] | None = None, broken: str | None = None) -> int:
    """Runs a command, and returns its exit status.

    Args:
        arguments: of the command line; by default sys.argv's.
        broken: why the extension can't be loaded. Only `info` runs then.
    """
    parser = Parser(prog="python -m fastrnn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(HELP))
    parsers = {
        name: commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for name, text in HELP.items()
    }
    bench.add_options(parsers["bench"])
    check.add_options(parsers["check"])
    args = parser.parse_args(arguments)
    own = parsers[args.command]
    if args.command == "info":
        print(_report(own, broken))
        return 1 if broken else 0
    if broken:
        own.exit(1, f"{own.prog}: {broken}\n")
    if args.command == "bench":
        return bench.main(own, args)
    print(_report(own), end="\n\n", flush=True)
    return check.main(own, args)


def without_extension(reason: str) -> None:
    """Runs the command if this is `python -m fastrnn`: `info` reports also without the extension.

    Python imports the package before it runs its __main__, and sets sys.argv[0] to "-m" until then.
    """
    if sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)] in ("fastrnn", "-mfastrnn"):
        raise SystemExit(main(broken=reason))


def _report(parser: Parser, broken: str | None = None) -> str:
    try:
        return info.text(broken)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
