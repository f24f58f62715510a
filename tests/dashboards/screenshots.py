"""Pictures of the pages, for docs/figures: python tests/dashboards/screenshots.py results docs/figures

They are of the demo with its dashboards (experiment=demo dashboards=all): of the TopK SAE of k = 32, and of the
comparison of its dictionaries. Needs a Chromium.
"""

import argparse
import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path[:0] = [str(Path(__file__).parent)]

from browser import CHROMIUM, Opened, chromium  # noqa: E402 (which is beside this file)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("results", type=Path)
parser.add_argument("out", type=Path)
SIZE = {"width": 1180, "height": 800}
SHADES = 17  # of each colour: enough for a page, and half the bytes
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def main() -> None:
    args = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("there is no Chromium: apt-get install chromium")
    folders = sorted((args.results / "dashboards").glob("sae-*mlp_out-k32-*"))
    comparisons = sorted((args.results / "comparisons").iterdir())
    if not folders or not comparisons:
        sys.exit(
            f"{args.results} has no dashboards of the demo: snakemake --config hydra='experiment=demo dashboards=all'"
        )
    page, comparison = folders[0] / "index.html", comparisons[0] / "index.html"
    shots = {
        "dashboard_latent": (page, "#sort=-effect&latent=", {}),
        "dashboard_phone": (page, "#sort=-effect&latent=", PHONE),
        "comparison_overview": (comparison, "", {}),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, (file, address, how) in shots.items():
            with_latent = address.endswith("latent=")
            one = Opened(browser, file, address.removesuffix("latent=").rstrip("&"), **{"viewport": SIZE} | how)
            if with_latent:
                one.page.wait_for_selector("#list tbody tr[data-row]", state="attached")
                one.page.keyboard.press("j")
                one.page.wait_for_selector("ol.examples")
            one.page.wait_for_timeout(200)
            save(one.page.screenshot(), args.out / f"{name}.png")
            one.context.close()


def save(png: bytes, file: Path) -> None:
    image = plt.imread(io.BytesIO(png))[..., :3]
    plt.imsave(file, np.round(image * SHADES) / SHADES, pil_kwargs={"optimize": True}, metadata={"Software": None})


if __name__ == "__main__":
    main()
