"""What Snakemake's report opens on: names without hashes, the main figure, and a ledger that fits beside the graph."""

import base64
import re
from pathlib import Path
from urllib.parse import unquote

import jinja2
from docutils.core import publish_parts
from tests.planning.test_ledger import here, plan_of, run  # noqa: F401 (here is a fixture)
from tests.planning.test_plan import home  # noqa: F401 (a fixture)

from saeflow.figures.report import description
from saeflow.planning.ledger import ledger
from saeflow.planning.parts import told_together, without_hash

ROOT = Path(__file__).resolve().parents[2]


def rendered(path: str) -> str:
    text = jinja2.Template(Path(path).read_text()).render()
    return publish_parts(text, writer="html", settings_overrides={"halt_level": 2})["html_body"]


def test_it_shows_figure_members_and_costs(here: Path) -> None:  # noqa: F811
    plan = plan_of()
    run(plan)
    (key,) = plan.stages["figures"]
    before = rendered(description(plan, ROOT / "workflow/report", here / "captions"))
    assert "<img" not in before
    picture = b"a picture" * 9_000
    (plan.folder("figures", key) / "sparsity_faithfulness.png").write_bytes(picture)
    html = rendered(description(plan, ROOT / "workflow/report", here / "captions"))
    assert f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"' in html
    assert "Sparsity against faithfulness" in html
    assert html.count("<tr>") == len(ledger(plan)) + 1 and "<td>12.0 s</td>" in html and "GPU</th>" not in html
    members = " ".join(re.sub(r"<[^>]+>", "", html).split())
    assert re.search(r"train: 2 trainings \(sae L2.mlp_out seed0 .*\): l1_0.001, l1_0.003", members)
    assert "Pages to read" not in html
    (key,) = [key for key in plan.stages["train"] if "l1_0.001" in key]
    pages = [plan.folder("train", key) / name for name in ("circuits.html", "of/latents.html")]
    for page in pages:
        page.parent.mkdir(exist_ok=True)
        page.write_text("a page")
    html_with_pages = rendered(description(plan, ROOT / "workflow/report", here / "captions"))
    links = re.findall(r'href="(train/[^"]+)">([^<]+)<', html_with_pages)
    assert [Path("results") / unquote(href) for href, _ in links] == pages
    assert {name for _, name in links} == {without_hash(key)}
    hashes = [key.rsplit("-", 1)[1] for table in plan.stages.values() for key in table]
    assert not [one for one in hashes if one in html]


def test_what_several_have_in_common_is_told_once() -> None:
    names = [f"sae-L3.mlp_out-k{k}-seed0" for k in (4, 8, 16)]
    assert told_together(names, 2) == "(sae L3.mlp_out seed0): k4, k8 and 1 more"
    assert told_together(names[:1], 2) == names[0]
    assert told_together(["a-1", "b-2"], 9) == ": a-1, b-2"
