"""A text that is studied in place of held-out tokens, as one row: `jacobian.text` and `jacobian.text_path`."""

from pathlib import Path

from saeflow.config import ConfigError
from saeflow.config.checks import where
from saeflow.planning.expansion import PlannedPoint
from saeflow.text.tokenizer import row_of


def read_prompt(planned: PlannedPoint) -> list[int]:
    """Token ids of the row of a point's text, as far as the last that counts: no model looks further.

    The text stands in the point's tree from then on, wherever it came from, as what it says is what is studied. Raises
    `ConfigError` for a file that cannot be read, a text that is too long for the model, and positions that it has not.
    """
    config, tokens = planned.point.jacobian, planned.point.tokens
    text = config.text if config.text_path is None else _read(Path(config.text_path))
    assert text is not None
    planned.tree["jacobian"] |= {"text": text, "text_path": None}
    del planned.tree["jacobian"]["n_tokens"]  # those of the text
    ids = row_of(text, planned.sources["model"], tokens)
    last = config.text_tokens[1] if config.text_tokens else max(len(ids) - 1, 1)
    if last >= len(ids):
        raise ConfigError(
            f"jacobian.text has {len(ids)} tokens with what stands in front, so position {last} is not there; name "
            f"positions below {len(ids)} with jacobian.text_tokens, or give a longer text"
        )
    if last >= planned.geometry.n_ctx:
        raise ConfigError(
            f"jacobian.text has tokens up to position {last}, and the model's context is {planned.geometry.n_ctx}; "
            "name fewer with jacobian.text_tokens"
        )
    return ids[: last + 1]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"jacobian.text_path={path} cannot be read{where(path)}: {error}") from error
