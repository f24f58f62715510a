"""A results folder in a notebook:

import saeflow
run = saeflow.open_results("results")
run.evaluations()                         # one tidy frame, a row a dictionary
run.features("sae-L3.mlp_out-k16")[123]   # a latent, which shows itself
run.figure("sparsity_faithfulness")       # a Matplotlib figure, to change further
"""

import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeflow.dictionaries.naming import dictionary_key
from saeflow.planning.stages import stages
from saeflow.results.disk import FIGURES, HOLDS_DICTIONARIES, Disk, LeftOut, ResultsError, read_config, read_json
from saeflow.storage.receipts import DamagedError, verify

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from saeflow.dictionaries import Dictionary
    from saeflow.features.reader import Features
    from saeflow.jobs.job import Job
    from saeflow.results.lineage import Chain


class Results:
    """What the workflow has made below a folder, as it was when it was opened.

    Everything is read from disk when it is asked for, and only from artifacts that are whole: their files are compared
    with the checksums in their receipts first, and `saeflow.storage.receipts.DamagedError` says what is not what was
    written. What is damaged or has lost a file is not shown; `left_out` lists it.

    Keys may be shortened to a beginning that no other key has, or to the hash that ends them; a key that is not there
    raises `ResultsError`, which says what is.
    """

    def __init__(self, folder: str | Path = "results") -> None:
        self.path = Path(folder)
        self._disk = Disk(folder)

    # ---------------------------------------------------------------- what there is
    @property
    def experiments(self) -> list[str]:
        """Names of the experiments that have figures, the newest first."""
        return list(self._disk.experiments)

    def keys(self, stage: str = "train", experiment: str | None = None) -> list[str]:
        """Keys of a stage's artifacts that are there; of one experiment, or of all."""
        if stage not in stages():
            raise ResultsError(f"there is no stage {stage!r}; stages: {', '.join(stages())}")
        there = sorted(self._disk.whole[stage])
        if experiment is None:
            return there
        mine = self._disk.plan([(FIGURES, self._figures_of(experiment))]).stages[stage]
        return [key for key in there if key in mine]

    @property
    def left_out(self) -> list[LeftOut]:
        """Artifacts that are not shown, with what is wrong with each: the workflow makes them again."""
        return self._disk.left_out

    def folder(self, key: str, stage: str | None = None) -> Path:
        """The folder of an artifact."""
        return self._disk.folder(*self._disk.find(key, *([stage] if stage else [])))

    def config(self, key: str, stage: str | None = None) -> dict[str, Any]:
        """What an artifact read: `config.yaml`."""
        return read_config(self.folder(key, stage))

    def summary(self, key: str, stage: str | None = None) -> dict[str, Any]:
        """The numbers of a study, an evaluation or a comparison: its `summary.json`."""
        folder = self._disk.folder(*self._disk.find(key, *([stage] if stage else self._summarised)))
        verify(folder, ("summary.json",))
        return read_json(folder / "summary.json")

    def provenance(self, key: str, stage: str | None = None) -> "Chain":
        """Where an artifact came from: it and everything that it was made from, down to the hashes of the model and the
        corpus, each with what it read and what it cost."""
        from saeflow.results.lineage import chain

        return chain(self._disk, *self._disk.find(key, *([stage] if stage else [])))

    # ---------------------------------------------------------------- tables
    def evaluations(self, experiment: str | None = None, *, without_bos: bool = False) -> "pd.DataFrame":
        """A row an evaluated dictionary, of one experiment or of all that are there.

        First what it is (`place`, `series`, `amount_name`, `amount`, the other settings that differ, `seed`, `d_sae`,
        `dictionary_key`), then each metric with the ends of its interval over documents, `<metric>_low` and
        `<metric>_high`; units are those of docs/evaluation.md. `without_bos`: of all tokens but the first of each row.
        """
        from saeflow.results.frames import evaluations

        return evaluations(self._job_of("evaluate", experiment), without_bos=without_bos)

    def metrics(self, key: str | None = None, experiment: str | None = None, **where: Any) -> "pd.DataFrame":
        """Training curves, a row a logged step: of the dictionaries of one key, or of all those whose columns have the
        values that are given, `run.metrics(series="TopK SAE", amount=[8, 16])`."""
        from saeflow.results.frames import curves, rows_where

        job = self._job_of("train", experiment)
        if key is not None:
            job.instance.needs["train"] = [self._disk.find(key, "train")[1]]
        judged = self.evaluations(experiment)
        return rows_where(curves(job, judged), where)

    def summaries(self, stage: str, experiment: str | None = None) -> "pd.DataFrame":
        """A row an artifact of a stage that has a `summary.json`: Jacobian studies, stacks, comparisons with a known
        algorithm, studies of heads."""
        from saeflow.results.frames import summaries

        if stage not in self._summarised:
            able = ", ".join(self._summarised) or "none"
            raise ResultsError(f"no {stage} has a summary.json here; those that do: {able}")
        return summaries(self._job_of(stage, experiment), stage)

    def table(self, name: str, experiment: str | None = None) -> "pd.DataFrame":
        """The numbers behind a figure, or `table`, `evaluations` and the like: a CSV beside an experiment's figures."""
        import pandas as pd

        folder = self._disk.folder(FIGURES, self._figures_of(experiment))
        file = folder / f"{name}.csv"
        if not file.is_file():
            there = ", ".join(sorted(path.stem for path in folder.glob("*.csv")))
            raise ResultsError(f"{folder} has no {file.name}; tables: {there}")
        verify(folder, (file.name,))
        return pd.read_csv(file)

    # ---------------------------------------------------------------- one artifact
    def dictionary(self, key: str, device: str = "cpu") -> "Dictionary":
        """A dictionary as torch tensors with `encode` and `decode`; of a pair `<key>/input` or `<key>/output`."""
        from saeflow.dictionaries import load_dictionary

        folder, part = self._dictionary(key)
        verify(folder)
        parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not part and parts and not parts[0].startswith("head_"):
            raise ResultsError(
                f"{folder.name} is {len(parts)} dictionaries: ask for {folder.name}/{' or /'.join(parts)}"
            )
        return load_dictionary(folder / part, device)

    def features(self, key: str) -> "Features":
        """The table of a dictionary's latents, by its own key or the dictionary's: `run.features(key)[123]` is one.

        Of several tables of one dictionary, the one on the most tokens, and of these one with Jacobian partners.
        """
        from saeflow.features import open_features

        folder = self._disk.folder("features", self._features(key))
        verify(folder)
        return open_features(folder)

    def activations(self, key: str = "") -> "xr.DataArray":
        """Cached activations of one hook, (token, d) or (token, head, d_head), read when they are asked for; by the key
        of the column, or by a part of it that only one has, `L3.mlp_out`; of one hook the longest column."""
        from saeflow.activations.store import open_column
        from saeflow.results.arrays import activations

        columns = {k: open_column(self._disk.folder("activations", k)) for k in self._disk.whole["activations"]}
        named = {k: c for k, c in columns.items() if key in k or key == c.hook_name}
        arrays = {column.array for column in named.values()}
        if len(arrays) != 1:
            there = ", ".join(sorted(named or columns)) or "none"
            raise ResultsError(
                f"activations({key!r}): {'give more of the key' if arrays else 'no such column'}; {there}"
            )
        longest = max(named.values(), key=lambda column: column.n_tokens)
        verify(longest.folder)
        return activations(longest)

    # ---------------------------------------------------------------- figures
    def figure(self, name: str, experiment: str | None = None) -> "Figure":
        """One of the figures that `make figures` lists, drawn anew of what is on disk, to be changed further.

        Not known to pyplot: `figure.savefig(...)` saves it, and a notebook with `%matplotlib inline` shows it.
        """
        import matplotlib

        from saeflow.figures.registry import declared, find
        from saeflow.figures.style import STYLE

        job = self._job(experiment)
        possible = [one.name for one in declared().values() if job.instance.needs.get(one.stage)]
        if name not in possible:
            raise ResultsError(f"no figure {name!r} can be drawn of this; these can: {', '.join(possible) or 'none'}")
        found = find(name)
        with matplotlib.rc_context(STYLE):
            drawn, _ = found.draw(found.reads(job))
        return drawn

    # ---------------------------------------------------------------- how it shows itself
    def __repr__(self) -> str:
        from saeflow.results.show import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from saeflow.results.show import as_html

        return as_html(self)

    # ---------------------------------------------------------------- finding
    def _figures_of(self, experiment: str | None) -> str:
        """Key of the figures of an experiment; of the only one where none is named."""
        known = self._disk.experiments
        if experiment is None and len(known) == 1:
            (experiment,) = known
        if experiment not in known:
            asked = "say which experiment" if experiment is None else f"no experiment {experiment!r} has figures"
            raise ResultsError(f"{asked}; there are: {', '.join(known) or 'none'}")
        return known[experiment][0]

    def _job(self, experiment: str | None) -> "Job":
        """Of all that an experiment's figures show; without experiments, of all that is there."""
        if experiment is None and not self._disk.experiments:
            drawn = [name for name, stage in stages().items() if stage.drawn != "never"]
            return self._disk.job({stage: sorted(self._disk.whole[stage]) for stage in drawn})
        key = self._figures_of(experiment)
        config = read_config(self._disk.folder(FIGURES, key)).get("config", {})
        return self._disk.job(dict(self._disk.whole[FIGURES][key]["needs"]), config)

    def _job_of(self, stage: str, experiment: str | None) -> "Job":
        """That reads the artifacts of a stage: those of an experiment, which all have to be there, or all that are."""
        if stage not in stages():
            raise ResultsError(f"there is no stage {stage!r}; stages: {', '.join(stages())}")
        if experiment is not None:
            plan = self._disk.plan([(FIGURES, self._figures_of(experiment))])
            return self._disk.job({stage: sorted(plan.stages[stage])})
        if lost := [one for one in self._disk.left_out if one.stage == stage]:
            first = f"{lost[0].key} ({lost[0].problem})"
            warnings.warn(f"left out of {stage}: {len(lost)} that are not whole, such as {first}", stacklevel=3)
        return self._disk.job({stage: sorted(self._disk.whole[stage])})

    @cached_property
    def _summarised(self) -> list[str]:
        """Stages of which something has a `summary.json`."""
        whole = self._disk.whole
        return [
            name
            for name in whole
            if any("summary.json" in receipt.get("sizes", {}) for receipt in whole[name].values())
        ]

    def _dictionary(self, key: str) -> tuple[Path, str]:
        """Folder of the artifact that holds a dictionary, and which part of it is meant."""
        whole, _, part = key.partition("/")
        folder = self._disk.folder(*self._disk.find(whole, *HOLDS_DICTIONARIES))
        if part and not (folder / part).is_dir():
            parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise ResultsError(f"{folder.name} has no part {part!r}; parts: {', '.join(parts) or 'none'}")
        return folder, part

    def _features(self, key: str) -> str:
        """Key of a table of latents, by its own, or by that of the dictionary."""
        if not self._of_dictionary:
            raise ResultsError(f"{self.path} has no tables of latents: run the workflow with features=all")
        try:
            return self._disk.find(key, "features")[1]
        except ResultsError as error:
            try:
                folder, part = self._dictionary(key)
            except ResultsError:
                raise error from None
        wanted = dictionary_key(folder.name, part)
        found = self._of_dictionary.get(wanted)
        if found is None:
            raise ResultsError(
                f"{wanted} has no table of latents; of these there are: {', '.join(self._of_dictionary)}"
            )
        return found

    @cached_property
    def _of_dictionary(self) -> dict[str, str]:
        """By the key of a dictionary that of its table of latents: of several the one on the most tokens, of these one
        with Jacobian partners, of these the first by name."""
        found: dict[str, tuple[int, bool, str]] = {}
        for key in sorted(self._disk.whole.get("features", {}), reverse=True):
            index = read_json(self._disk.folder("features", key) / "index.json")
            name, known = str(index["dictionary_key"]), index["jacobian_key"] is not None
            found[name] = max(
                (int(index["n_tokens"]), known, key), found.get(name, (0, False, "")), key=lambda one: one[:2]
            )
        return {name: key for name, (_, _, key) in found.items()}


def open_results(folder: str | Path = "results") -> Results:
    """Opens a folder that the workflow has filled. Raises `ResultsError` where it is none."""
    return Results(folder)


__all__ = ["DamagedError", "Results", "ResultsError", "open_results"]
