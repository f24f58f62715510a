"""What a job tells while it works, and the threads that it may use."""

import logging
import os
import re
from pathlib import Path

from saeflow.config.checks import escape_controls

RECORD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} (INFO|WARNING|ERROR) (.*)")
"""The first line of a record, as `start_log` has it written: time, level, message."""


def start_log(path: str | None) -> None:
    """Sends the log to a file, or to stderr: also where the file can't be written, which no result depends on."""
    handler: logging.Handler = logging.StreamHandler()
    problem = None
    if path:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path, mode="w")
        except OSError as error:
            problem = error
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every table of every font in a PDF
    if problem:
        logging.getLogger("saeflow").warning("the log stands here, since its file can't be written: %s", problem)


class _Formatter(logging.Formatter):
    """What is read from a corpus or a model folder may stand in messages, and logs are shown on terminals."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def limit_threads(threads: int) -> None:
    """Limits the CPU threads of numerical libraries; must come before torch and numpy are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
