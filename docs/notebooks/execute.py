"""Executes the notebooks beside this file, in place, in a fresh kernel each.

    python docs/notebooks/execute.py [NAME ...]

Each says in its first cells which command makes the results that it reads, and where they are (`RESULTS`). What is
saved is the same from run to run: no times, no hosts, no absolute paths, no widgets. A notebook that ends with an
error, or whose outputs would break that, is left as it was.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LARGEST = 300_000  # bytes of a saved notebook
SECONDS = 1200  # that a cell may take
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=>])((?:file://|~)?/(?:home|root|tmp|work|Users|opt|usr|mnt|var)/\S*)""")


def notebooks() -> list[Path]:
    """All that there are."""
    return sorted(HERE.glob("*.ipynb"))


def execute(notebook: Any) -> None:
    """Fills in the outputs. Raises `nbclient.exceptions.CellExecutionError` where a cell ends with an error."""
    from nbclient import NotebookClient

    folder = {"metadata": {"path": str(HERE)}}
    NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources=folder, extra_arguments=["--log-level=ERROR"]
    ).execute()


def tidy(notebook: Any) -> Any:
    """Without what differs between two runs: when cells ran, which Python; identifiers of cells are their numbers."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.id = f"cell-{number}"
    return notebook


def problems(notebook: Any) -> list[str]:
    """Why a notebook may not be saved: one sentence each."""
    found, size = [], len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        found.append(f"it is {size:,} bytes, more than {LARGEST:,}")
    code = [(number, cell) for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    if [cell.execution_count for _, cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not executed in order, in a fresh kernel")
    if not any(cell.outputs for _, cell in code):
        found.append("it has no outputs")
    for number, cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} ends with {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"cell {number} warns: {output.text.strip()}")
            texts = [output.get("text", ""), *(t for kind, t in output.get("data", {}).items() if "image" not in kind)]
            found += [f"cell {number} shows {path}" for text in texts for path in ABSOLUTE.findall(str(text))]
            found += [f"cell {number} shows a widget" for kind in output.get("data", {}) if "widget" in kind]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of notebooks, without .ipynb; all of them")
    asked = parser.parse_args().names or [path.stem for path in notebooks()]
    if unknown := sorted(set(asked) - {path.stem for path in notebooks()}):
        parser.error(f"no notebook {unknown[0]!r}; there are {', '.join(path.stem for path in notebooks())}")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # sums in one order; nothing is fetched
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, for want of widgets
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    for name in asked:
        path = HERE / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        if found := problems(tidy(notebook)):
            sys.exit(f"{path.name} is left as it was: " + "; ".join(found))
        nbformat.write(notebook, path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
