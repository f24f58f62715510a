"""The front page, `results/index.html`: every experiment that has results, what it asked, its figures and best points,
and where each number came from. A static file that needs nothing from elsewhere, the same for the same results.
"""

import functools
import math
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from saeflow.config.checks import escape_controls
from saeflow.config.labels import file_safe
from saeflow.dictionaries.naming import dictionary_key
from saeflow.figures.captions import about, as_html, text_of
from saeflow.figures.registry import declared
from saeflow.figures.whereabouts import ROOT, report_names
from saeflow.planning.explain import readable
from saeflow.planning.parts import without_hash
from saeflow.results.asked import Series, asked, axes, experiments_of
from saeflow.results.disk import FIGURES, HOLDS_DICTIONARIES, Disk, ResultsError, read_config, read_json
from saeflow.results.lineage import Chain, Lineage, Step
from saeflow.results.points import Place, Point, best_points, number, read_table
from saeflow.results.show import settings_text
from saeflow.results.state import Note, notes
from saeflow.storage.publish import publish_text
from saeflow.storage.receipts import DamagedError, verify

PAGE = "index.html"
_CAPTIONS = ROOT / "workflow" / "report"
_SCALE = 0.6
"""CSS pixels for a pixel of a figure: at its 200 dots an inch 8 points are 13 pixels, as text is read."""
_IMAGES = ("png", "svg", "pdf")


class Link(NamedTuple):
    text: str
    href: str
    note: str = ""


class Shown(NamedTuple):
    """A figure."""

    name: str
    title: str
    caption: str
    """HTML."""
    data: str
    image: str
    width: int
    height: int
    files: list[Link]


class ShownPoint(NamedTuple):
    """A point of a front, with where it comes from."""

    point: Point
    chains: list[list[Link]]
    """From each measurement, one a seed, down to the corpus."""
    links: list[Link]
    """Dashboards and tables of latents."""


class Front(NamedTuple):
    place: Place
    rows: list[ShownPoint]


@dataclass(frozen=True)
class Experiment:
    """What the page shows of one."""

    name: str
    about: str
    command: str
    asked: list[Series]
    axes: list[tuple[str, str]]
    notes: list[Note]
    figures: list[Shown]
    fronts: list[Front]
    tables: list[Link]
    pages: list[Link]
    reports: list[Link]
    costs: list[dict[str, str]]
    cost_files: list[Link]


def write_front_page(results: str | Path, conf: str | Path | None = None) -> Path | None:
    """Writes `index.html` below a results folder, whole or not at all, where it has changed, and returns its path; None
    where there is nothing to show. `conf` tells what its experiments are about."""
    try:
        disk = Disk(results)
    except ResultsError:
        return None
    file, text = Path(results) / PAGE, render(disk, Path(conf) if conf else ROOT / "conf")
    if not file.is_file() or file.read_bytes() != text.encode():
        publish_text(file, text)
    return file


def render(disk: Disk, conf: Path) -> str:
    """The page, as a function of what is on disk."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    maker = _Maker(disk, conf)
    experiments = [maker.experiment(name) for name in maker.names]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_spelled,
    )  # fmt: skip
    environment.globals |= {"anchor": anchor, "settings_text": settings_text, "readable": readable}
    template = environment.get_template("index.html.jinja")
    return template.render(experiments=experiments, steps=maker.steps, contents=maker.contents)


def _spelled(value: Any) -> Any:
    """Characters that turn or hide text are spelled out; what is HTML already has been seen to."""
    return value if hasattr(value, "__html__") else escape_controls(str(value))


def anchor(stage: str, key: str) -> str:
    return f"{stage}/{key}"


class _Maker:
    """Gathers what the page shows, and which steps the shown numbers come from."""

    def __init__(self, disk: Disk, conf: Path) -> None:
        self.disk, self.lineage = disk, Lineage(disk)
        self.runs = {file_safe(str(raw["experiment"])): raw for raw in disk.runs}
        self.told = experiments_of(conf)
        self.chains: dict[tuple[str, str], Chain] = {}
        self.damaged: dict[str, None] = {}
        """What was found of an experiment that is not what was written, in order."""

    @property
    def names(self) -> list[str]:
        """Experiments with figures, the newest first, then those whose runs have not come so far."""
        with_figures = list(self.disk.experiments)
        return with_figures + sorted(self.runs.keys() - set(with_figures))

    @property
    def steps(self) -> list[Step]:
        """All that the shown numbers come from, in the order of the data flow."""
        found = {(step.stage, step.key): step for chain in self.chains.values() for step in chain}
        order = list(self.disk.whole)
        return sorted(found.values(), key=lambda step: (order.index(step.stage), step.key))

    @property
    def contents(self) -> list[tuple[str, str, str]]:
        """What is from outside: what it is, its hash, what people called it."""
        found: dict[tuple[str, str], set[str]] = {}
        for step in self.steps:
            for name, content in step.contents.items():
                found.setdefault((name, content), set()).add(step.names.get(f"{name}_name", ""))
        return [
            (name, content, ", ".join(sorted(filter(None, called))))
            for (name, content), called in sorted(found.items())
        ]

    def experiment(self, name: str) -> Experiment:
        keys, raw = self.disk.experiments.get(name, []), self.runs.get(name)
        key = keys[0] if keys else None
        self.damaged = {}
        folder = self.disk.folder(FIGURES, key) if key else None
        folder = folder if folder and self._is_sound(folder) else None
        table = read_table(folder / "table.csv") if folder else []
        needs = self.disk.whole[FIGURES][key]["needs"] if key else {}
        overrides = " ".join((raw or {}).get("overrides", []))
        fronts = self._fronts(folder, needs) if folder else []
        damaged = [Note("damaged", said) for said in self.damaged]
        return Experiment(
            name,
            self.told.get(name, ""),
            f"make run HYDRA={shlex.quote(overrides)}" if overrides else "",
            asked(table),
            axes(table),
            damaged + notes(self.disk, raw, key),
            self._figures(folder, needs) if folder else [],
            fronts,
            self._tables(folder) if folder else [],
            self._pages(needs),
            self._reports(key),
            *self._costs(name),
        )

    # ---------------------------------------------------------------- figures
    def _figures(self, folder: Path, needs: dict[str, list[str]]) -> list[Shown]:
        wanted = read_config(folder).get("config", {}).get("figures", [])
        known, shown = declared(), []
        for name in (name for name in wanted if (folder / f"{name}.png").is_file()):
            text = as_html(text_of(name, _CAPTIONS)) if name in known else ""
            data = about(self.disk.root, needs, known[name].stage) if name in known else ""
            width, height = png_size(folder / f"{name}.png")
            files = [Link(end.upper(), self._href(folder / f"{name}.{end}")) for end in (*_IMAGES, "csv")
                     if (folder / f"{name}.{end}").is_file()]  # fmt: skip
            sizes = round(_SCALE * width), round(_SCALE * height)
            title = name.replace("_", " ")
            shown.append(Shown(name, title, text, data, self._href(folder / f"{name}.png"), *sizes, files))
        return shown

    # ---------------------------------------------------------------- numbers
    def _fronts(self, folder: Path, needs: dict[str, list[str]]) -> list[Front]:
        judged = self._judged(needs)
        return [Front(place, [self._row(point, judged) for point in place.points]) for place in best_points(folder)]

    def _row(self, point: Point, judged: dict[str, list[tuple[str, str]]]) -> ShownPoint:
        chains, links = list[list[Link]](), list[Link]()
        for key in point.keys:
            for one in self._measured(key, point, judged):
                if one not in self.chains:
                    self.chains[one] = self.lineage.chain(*one)
                found = self.chains[one]
                steps = [Link(step.stage, f"#{anchor(step.stage, step.key)}", step.title) for step in found]
                corpora = found.contents.get("corpus", [])
                chains.append(steps + [Link(f"corpus {c[:8]}", f"#corpus/{c}", "hash of its content") for c in corpora])
            links += self._of_dictionary.get(key, [])
        return ShownPoint(point, chains, links)

    def _measured(
        self, dictionary: str, point: Point, judged: dict[str, list[tuple[str, str]]]
    ) -> list[tuple[str, str]]:
        """What measured a dictionary; where several did, on other tokens say, the one that has the point's numbers."""
        found = {}
        for stage, key in judged.get(dictionary.partition("/")[0], []):
            summary = self._summary(stage, key)
            of = summary.get("dictionary_key") or dictionary_key(summary.get("train_key", ""), summary.get("part"))
            if dictionary == of:
                found[stage, key] = summary
        if len(found) > 1 and len(point.keys) == 1:
            shown = {name: number(cell.value) for name, cell in point.cells.items()}
            found = {
                one: summary for one, summary in found.items()
                if all(math.isclose(value, summary.get(name) or math.nan, rel_tol=1e-5) for name, value in shown.items()
                       if value and name in summary)
            }  # fmt: skip
        return list(found)

    def _summary(self, stage: str, key: str) -> dict[str, Any]:
        """Empty where it is not what was written, which is noted."""
        folder = self.disk.folder(stage, key)
        return read_json(folder / "summary.json") if self._is_sound(folder, "summary.json") else {}

    def _is_sound(self, folder: Path, *names: str) -> bool:
        """Whether files are what their receipt says; what is not is noted, and not shown."""
        try:
            verify(folder, names)
        except DamagedError as error:
            self.damaged[str(error)] = None
            return False
        return True

    def _judged(self, needs: dict[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
        """What measured the dictionaries of each training, of what the figures show."""
        found: dict[str, list[tuple[str, str]]] = {}
        for stage, keys in needs.items():
            for key in keys:
                receipt = self.disk.whole.get(stage, {}).get(key)
                if receipt is not None and "summary.json" in receipt.get("sizes", {}):
                    for made in (k for s in HOLDS_DICTIONARIES for k in receipt["needs"].get(s, [])):
                        found.setdefault(made, []).append((stage, key))
        return found

    @functools.cached_property
    def _of_dictionary(self) -> dict[str, list[Link]]:
        """Pages and tables of the latents of each dictionary: dashboards, where there are any, and tables."""
        found: dict[str, list[Link]] = {}
        of_table: dict[str, str] = {}
        for key in self.disk.whole.get("features", {}):
            folder = self.disk.folder("features", key)
            of_table[key] = str(read_json(folder / "index.json")["dictionary_key"])
            link = Link("latents", self._href(folder / "latents.parquet"), "Parquet, a row a latent")
            found.setdefault(of_table[key], []).append(link)
        compared = self.disk.whole.get("comparisons", {})
        among = {made: key for key in sorted(compared) for made in compared[key]["needs"].get("dashboards", [])}
        for key, receipt in self.disk.whole.get("dashboards", {}).items():
            page = self.disk.folder("dashboards", key) / PAGE
            back = f"#among={quote(among[key])}" if key in among else ""  # from where a dashboard leads to the others
            for table in receipt["needs"].get("features", []) if page.is_file() else ():
                if table in of_table:
                    found[of_table[table]].insert(0, Link("dashboard", self._href(page) + back))
        return found

    # ---------------------------------------------------------------- files
    def _tables(self, folder: Path) -> list[Link]:
        figures = {path.stem for path in folder.glob("*.png")}
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".parquet", ".html")]
        return [Link(path.name, self._href(path)) for path in files if path.stem not in figures]

    def _pages(self, needs: dict[str, list[str]]) -> list[Link]:
        """Pages to read: of what the figures show, and of nothing but dictionaries that are among theirs."""
        mine = {(stage, key) for stage, keys in needs.items() for key in keys}
        dictionaries = {key for one in mine for key in self._made_from(*one)}
        found = []
        for stage, receipts in self.disk.whole.items():
            for key, receipt in receipts.items() if stage != FIGURES else ():
                of = self._made_from(stage, key)
                if (stage, key) in mine or (of and of <= dictionaries):
                    pages = [name for name in receipt.get("sizes", {}) if name.endswith(".html")]
                    name = f"{stage} {without_hash(key.rsplit('/', 1)[-1])}"
                    for page in [PAGE] if PAGE in pages else pages:
                        title = name if page == PAGE else f"{name}: {page.removesuffix('.html')}"
                        found.append(Link(title, self._href(self.disk.folder(stage, key) / page)))
        return found

    def _made_from(self, stage: str, key: str) -> set[str]:
        """Keys of the dictionaries that an artifact was made from, or is."""
        receipt = self.disk.whole[stage].get(key, {})
        of = {made for name in HOLDS_DICTIONARIES for made in receipt.get("needs", {}).get(name, [])}
        return of | ({key} if stage in HOLDS_DICTIONARIES else set())

    def _reports(self, key: str | None) -> list[Link]:
        """Snakemake's report, where it is of these figures."""
        file = self.disk.root / "report.html"
        if key is None or not report_names(file, key):
            return []
        return [Link("Snakemake's report", self._href(file), "figures, rules, run times")]

    def _costs(self, name: str) -> tuple[list[dict[str, str]], list[Link]]:
        file = self.disk.root / "ledger" / f"{name}.csv"
        files = [file.with_suffix(end) for end in (".csv", ".parquet", ".txt")]
        return read_table(file), [Link(f.name, self._href(f)) for f in files if f.is_file()]

    def _href(self, path: Path) -> str:
        return quote(path.relative_to(self.disk.root).as_posix())


def png_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    head = file.read_bytes()[:24]
    if head[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{file} is no PNG")
    width, height = struct.unpack(">II", head[16:24])
    return int(width), int(height)
