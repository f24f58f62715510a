"""The table for those who come from elsewhere: SAELens's names are asked of the installed SAELens, ours of the code."""

import dataclasses
import re
from pathlib import Path

import pytest
from config_reference import CONF, documented

PAGE = (Path(__file__).resolve().parents[2] / "docs/coming_from.md").read_text()
SAELENS = PAGE.split("## From SAELens\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| (.+?) \| (.+) \|$", SAELENS, re.MULTILINE)[1:]


@pytest.mark.slow
def test_saelens_has_what_the_page_says_that_it_has() -> None:
    import sae_lens
    from sae_lens import evals
    from sae_lens.saes.sae import SAE

    assert sae_lens.__version__.startswith(re.search(r"version (\d+\.\d+)", PAGE)[1] + ".")
    configs = [value for value in vars(sae_lens).values() if dataclasses.is_dataclass(value)]
    fields = {field.name for config in configs for field in dataclasses.fields(config)}
    known = fields | set(dir(SAE)) | set(vars(sae_lens)) | {"run_evals", "W_enc", "b_enc", "W_dec", "b_dec"}
    source = Path(evals.__file__).read_text()
    assert hasattr(evals, "run_evals")
    names = {name for cell, _ in ROWS for name in re.findall(r"`(?:SAE\.)?(\w+)[^`]*`", cell)}
    assert len(names) > 50
    unknown = {name for name in names - known if f'"{name}"' not in source}
    assert unknown == set()


def test_our_names_are_those_of_the_configuration() -> None:
    paths = {one.path for one in documented()}
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    for setting in re.findall(r"`((?:\w+\.)+\w+)(?:=[^`]*)?`", PAGE):
        if setting.split(".")[0] in {path.split(".")[0] for path in paths}:
            assert setting in paths or setting.startswith("dictionary.options."), setting
    for group, choice in re.findall(r"\b(\w+)=([\w/]+)`", PAGE):
        if group in groups and f"{group}.{choice}" not in paths:
            assert (CONF / group / f"{choice}.yaml").exists(), f"{group}={choice}"
