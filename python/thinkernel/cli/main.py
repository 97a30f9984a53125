"""The `thinkernel` command: doctor, validate, bench, demo, generate. A bad argument is one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# name -> one line for --help; each is a module of this package with add_arguments(parser) and run(args) -> exit code
COMMANDS = {
    "doctor": "what works on this machine: versions, CPU level, GPU, backends, and why something is missing",
    "validate": "every op × backend × dtype: error against float64 beside torch's own",
    "bench": "the microbenchmarks, against the peers that are installed",
    "demo": "train a small reasoning model with verifiable rewards on these kernels, end to end",
    "generate": "sample from a finished demo run",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, without the usage text."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="thinkernel", description="Kernels for reasoning language models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    # Only the command that is asked for is imported, so that --help and errors are quick.
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name in argv[:1]:
            module = importlib.import_module(f"thinkernel.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print(f"thinkernel {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough (… | head)
        sys.stdout = open(os.devnull, "w")  # else the interpreter would try to flush once more
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"thinkernel {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
