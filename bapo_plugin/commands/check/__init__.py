"""What `bapo check` does: all that can be known of a run before its model is loaded.

configuration.py  the YAML: validated as in training; keys that axolotl would ignore
gather.py         from the configuration to `Facts`
tables.py         rendered rows: how they are read, and with which base responses
measure.py        lengths and repeats of the rows, in numbers
judge.py          which facts deserve a look
shown.py          rows as the model sees them
facts.py          what was found, as plain values
screen.py         facts on a screen
"""

import json
import logging
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path


def check(config: Path, rows: int, as_json: bool) -> int:
    """Print what was found.

    Args:
        config: YAML of the training run.
        rows: how many rows to show.
        as_json: one JSON object on stdout, and nothing else there.

    Returns:
        The exit code: 0 fine, 1 warnings, 2 errors.
    """
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):  # axolotl's log goes to stdout, from its import on
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)  # of what libraries lack on this machine
            try:
                from bapo_plugin.commands.check.gather import gather
            finally:
                logging.disable(logging.NOTSET)
        facts = gather(config, rows)
    if as_json:
        print(json.dumps(asdict(facts), ensure_ascii=False, default=str))
    else:
        from bapo_plugin.commands.check.screen import show

        show(facts)
    return facts.exit_code
