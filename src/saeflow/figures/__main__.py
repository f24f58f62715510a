"""`python -m saeflow.figures` lists all figures: name, the stage whose artifacts they show, and a sentence."""

import sys

from saeflow.figures.registry import declared

for one in declared().values():
    sys.stdout.write(f"{one.name:22s} {one.stage:9s} {one.sentence}\n")
