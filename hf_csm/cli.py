"""`hf-csm <verb>`: the functions that the recipes call, from the command line.

Everything heavy is imported inside its verb, so that `hf-csm --help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hf_csm import __version__
from hf_csm.commands.data import add_data_verbs
from hf_csm.commands.model import add_model_verbs
from hf_csm.errors import UserError


GO_ON = "Run the same command again to go on; training also needs --resume-from-checkpoint latest."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status."""
    parser = build_parser()
    options, more = parser.parse_known_args(argv)
    if more and not options.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    return run_command(lambda: options.run(options), debug=options.debug)


def run_command(command: Callable[[], object], *, debug: bool = False) -> int:
    """Run a command; what a user can mend is printed in two lines, without a traceback, and gives status 1.

    Args:
        debug: let the traceback through.
    """
    try:
        command()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {GO_ON}", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if debug or message is None:
            raise
        print(f"error: {message[0]}\n       {message[1]}", file=sys.stderr)
        return 1
    return 0


def explain(error: Exception) -> tuple[str, str] | None:
    """Return what is wrong and what to do about it, a line each; None for what no user can mend."""
    if isinstance(error, UserError):
        return error.problem, error.remedy
    code = error.errno if isinstance(error, OSError) else None
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    is_full = any(words in str(error) for words in ("No space left", "PytorchStreamWriter", "inline_container"))
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or is_full:
        return f"The disk is full{where}.", f"Free some space. {GO_ON}"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"Not allowed to write or read{where}: {os.strerror(code)}.", "Give a folder that you may write to."
    if isinstance(error, OSError) and where:
        return f"{error.strerror or error}{where}.", "Check that path."
    return None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb."""
    parser = argparse.ArgumentParser(
        prog="hf-csm",
        description="Teach Moshi to speak with emotion. Train with: accelerate launch recipes/train.py --config YAML",
    )
    parser.add_argument("--version", action="version", version=f"hf-csm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add_verb(
        name: str, run: Callable[[argparse.Namespace], None], help: str, takes_more: bool = False, **texts: Any
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name,
            help=help,
            description=help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **texts,
        )
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.set_defaults(run=run, takes_more=takes_more)
        return verb

    add_data_verbs(add_verb)
    add_model_verbs(add_verb)
    add_verb("doctor", _doctor, "Show versions, GPU and disk, what is missing and how to get it.")
    return parser


def _doctor(options: argparse.Namespace) -> None:
    from hf_csm.doctor import examine

    report, is_well = examine()
    print(report)
    if not is_well:
        raise UserError("Something that is needed is missing.", "Mend the lines marked with ! above.")


if __name__ == "__main__":
    sys.exit(main())
