"""`hf-csm COMMAND`: the command line interface.

Heavy modules are imported inside the commands, which keeps `hf-csm --help` fast.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from threading import current_thread, main_thread
from typing import Any

from hf_csm import __version__
from hf_csm.commands.data import add_data_commands
from hf_csm.commands.model import add_model_commands
from hf_csm.errors import UserError


GO_ON = "Run the same command again to resume; training also needs --resume-from-checkpoint latest."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = build_parser()
    options, more = parser.parse_known_args(argv)
    if more and not options.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    return run_command(lambda: options.run(options), debug=options.debug)


def run_command(command: Callable[[], object], *, debug: bool = False) -> int:
    """Run a command and return the exit status. Errors that a user can fix are printed in two lines, with status 1.

    Args:
        debug: raise the error instead.
    """
    # moshi imports bitsandbytes, which warns on import that an optional CPU kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread():
        signal.signal(signal.SIGINT, interrupt)
    try:
        command()
    except KeyboardInterrupt:
        return _report_interrupt()
    except Exception as error:
        message = explain(error)
        if message is None and interrupts and not debug:  # swallowed by an import of numpy or transformers
            return _report_interrupt()
        if debug or message is None:
            raise
        print(f"error: {message[0]}\n       {message[1]}", file=sys.stderr)
        return 1
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


def _report_interrupt() -> int:
    print(f"\nInterrupted. {GO_ON}", file=sys.stderr)
    return 130


def explain(error: Exception) -> tuple[str, str] | None:
    """Return the problem and the remedy of an error, one line each; None for an error that no user can fix."""
    if isinstance(error, UserError):
        return error.problem, error.remedy
    code = error.errno if isinstance(error, OSError) else None
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    is_full = any(words in str(error) for words in ("No space left", "PytorchStreamWriter", "inline_container"))
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or is_full:
        return f"The disk is full{where}.", f"Free some space. {GO_ON}"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"Not allowed to write or read{where}: {os.strerror(code)}.", "Choose a folder that you can write to."
    if isinstance(error, OSError) and where:
        return f"{error.strerror or error}{where}.", "Check that path."
    return None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="hf-csm",
        description="Fine-tune Moshi on emotional speech with LoRA, and serve the result. "
        "Train with: accelerate launch recipes/train.py --config YAML",
    )
    parser.add_argument("--version", action="version", version=f"hf-csm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(
        name: str, run: Callable[[argparse.Namespace], None], help: str, takes_more: bool = False, **texts: Any
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **texts,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, takes_more=takes_more)
        return command

    add_data_commands(add_command)
    add_model_commands(add_command)
    add_command("doctor", _doctor, "Show installed versions, GPU and disk space, and what is missing.")
    return parser


def _doctor(options: argparse.Namespace) -> None:
    from hf_csm.doctor import examine

    report, is_complete = examine()
    print(report)
    if not is_complete:
        raise UserError("A requirement is not met.", "Fix the lines marked with ! above.")


if __name__ == "__main__":
    sys.exit(main())
