"""`python -m mint_lib STAGE --config JSON --input NAME=REFERENCE ...`: one stage as a process.

The entry point of a Ray job and of anything that has no Kubeflow around it. Prints the output's reference.
"""

import argparse
import logging
import sys

from mint_lib.errors import MintError


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; 0 on success, 1 with a message on an error the user can mend."""
    from mint_lib.stages import STAGES, run_stage
    from mint_lib.store import Store

    parser = argparse.ArgumentParser(prog="python -m mint_lib", description=__doc__)
    parser.add_argument("stage", choices=sorted(STAGES))
    parser.add_argument("--config", required=True, help="the stage's config as JSON")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=REFERENCE",
        help="an input reference; several NAME=KEY=REFERENCE for an input that takes many",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    inputs: dict[str, str] = dict.fromkeys(STAGES[options.stage].input_maps, "")
    for item in options.input:
        name, _, value = item.partition("=")
        inputs[name] = f"{inputs[name]} {value}".strip() if inputs.get(name) else value
    try:
        outcome = run_stage(options.stage, options.config, inputs, store=Store.from_environment())
    except MintError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write(f"{outcome.reference}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
