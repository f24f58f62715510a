"""Downloads a model or a dataset of the Hugging Face hub into the local cache, where the workflow finds it offline.

python scripts/fetch.py EleutherAI/pythia-70m-deduped [--revision REVISION]
python scripts/fetch.py --dataset roneneldan/TinyStories [--revision REVISION]
"""

import argparse
import sys

from saeflow.corpus import CorpusError, corpus_files
from saeflow.models import MODEL_FILES

DATASET_FILES = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.txt", "*.txt.gz")  # what saeflow.corpus reads


def fetch(name: str, dataset: bool, revision: str | None) -> str:
    """Returns a line that says where the files are. Exits with what to do where they cannot be had."""
    from huggingface_hub import errors, snapshot_download

    kind, patterns = ("dataset", DATASET_FILES) if dataset else ("model", MODEL_FILES)
    try:
        folder = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns))
        if not dataset:
            return f"fetched {folder}; use it as model.hub={name}" + (f" model.revision={revision}" if revision else "")
        corpus_files(folder)
        return f"fetched {folder}; use it as corpus=local corpus.path={folder}"
    except CorpusError:
        sys.exit(
            f"the dataset {name} has no file of these: {', '.join(patterns)}; stream it with corpus.dataset={name}"
        )
    except errors.GatedRepoError:
        sys.exit(f"{name} asks for an agreement: accept it at https://huggingface.co/{name}, then `hf auth login`")
    except errors.RevisionNotFoundError:
        sys.exit(f"{name} has no revision {revision!r}")
    except errors.RepositoryNotFoundError:
        sys.exit(f"the Hugging Face hub has no {kind} {name!r}, or it is private: then `hf auth login` first")
    except Exception as error:  # the hub's library raises its HTTP library's errors too
        reason = str(error).splitlines()[0] if str(error) else ""
        sys.exit(
            f"{name} cannot be fetched ({type(error).__name__}: {reason}). If the Hugging Face hub cannot be reached "
            "from here, run this where it can, and copy the cache (HF_HOME, or ~/.cache/huggingface); or copy the "
            f"folder and set {'corpus' if dataset else 'model'}.path"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name on the hub, such as EleutherAI/pythia-70m-deduped")
    parser.add_argument("--dataset", action="store_true", help="a dataset, not a model")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    arguments = parser.parse_args()
    print(fetch(arguments.name, arguments.dataset, arguments.revision))
