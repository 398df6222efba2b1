"""`python -m mint_lib STAGE --config JSON --input NAME=REFERENCE ...`: one stage as a process.

The entry point of a Ray job and of anything that has no Kubeflow around it. Prints the output's reference. It ends with
0 after success, 1 after an error that the user can mend (on standard error as `Type: message`), 2 if its arguments are
wrong, 3 after an error that was not foreseen. Told to stop by SIGTERM, it ends with 75 if a training wrote a checkpoint
first, from which the same command goes on, and with 143 otherwise.
"""

import argparse
import base64
import binascii
import logging
import os
import signal
import sys
from types import FrameType

from mint_lib.errors import Interrupted, MintError

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run one stage and return the exit code."""
    from mint_lib.stages import STAGES, group_words, run_stage
    from mint_lib.store import Store

    parser = argparse.ArgumentParser(prog="python -m mint_lib", description=__doc__)
    parser.add_argument("stage", choices=sorted(STAGES))
    config = parser.add_mutually_exclusive_group(required=True)
    config.add_argument("--config", help="the stage's config as JSON")
    config.add_argument(
        "--config-base64", metavar="TEXT", help="the same in URL-safe base64, which no shell on the way changes"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=REFERENCE",
        help="an input reference; several NAME=KEY=REFERENCE for an input that takes many",
    )
    options = parser.parse_args(arguments)
    if options.config_base64 is not None:
        try:
            options.config = base64.b64decode(options.config_base64, altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError):
            parser.error("--config-base64 is not UTF-8 text in URL-safe base64")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        inputs = group_words(options.stage, options.input)
        outcome = run_stage(options.stage, options.config, inputs, store=Store.from_environment())
    except MintError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return os.EX_TEMPFAIL if isinstance(error, Interrupted) else 1
    except Exception:
        logger.exception("%s: not foreseen", options.stage)
        return 3
    sys.stdout.write(f"{outcome.reference}\n")
    return 0


def _run_as_process() -> int:
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        code = main()
    except BaseException:
        if not received:
            raise
    # Ray makes another exception of the one that its driver is left with.
    return 128 + received[0] if received else code


if __name__ == "__main__":
    sys.exit(_run_as_process())
