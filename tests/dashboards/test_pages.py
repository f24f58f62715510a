"""The pages in a headless Chromium, opened from disk: nothing is asked for but the folder's own files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.dashboards.browser import Opened, needs_chromium
from tests.dashboards.made import HOSTILE, compared, made, plan_in

pytestmark = needs_chromium
N = 2000
WORDS = [f" word{i}" for i in range(60)] + [" needle", "\n", " Ärger"]
NEEDLE = len(WORDS) - 3
PLAIN = {i: [i % 60] for i in range(N)} | {700: [NEEDLE]}

# Text, what is behind it and their contrast (WCAG 2.2) of every text that is in sight.
CONTRAST = """() => {
  const rgb = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { const layers = [];
    for (; e; e = e.parentElement) layers.push(rgb(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]); };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.checkVisibility()) continue;
    if (e.closest("script, option, noscript, dialog:not([open])")) continue;
    const style = getComputedStyle(e), below = behind(e);
    const colour = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(over(rgb(colour), below)), light(below)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.data.slice(0, 40), e.className.baseVal ?? e.className]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dictionaries at one place, of which the first is large, and their comparison; one with hostile texts."""
    root = tmp_path_factory.mktemp("pages")
    plan = plan_in(root)
    made(plan, "large", WORDS, n=N, tokens_of=PLAIN, labels=True)
    made(plan, "small", WORDS, n=300, seed=1, partner="large", heads=4)
    compared(plan)
    made(plan_in(root / "hostile"), "bad", HOSTILE, n=60, labels=True)
    return root


@pytest.fixture
def opened(browser: Any, results: Path) -> Iterator[Any]:
    """Opens pages; each has to have said nothing, and asked for nothing outside of the results folder."""
    there: list[Opened] = []

    def make(path: str = "dashboards/large", address: str = "", **context: Any) -> Opened:
        there.append(Opened(browser, results / path / "index.html", address, **context))
        return there[-1]

    yield make
    for one in there:
        assert one.said == [] and "[object" not in one.text("body")
        assert all(url.startswith((results.resolve().as_uri(), "data:,")) for url in one.asked)
        one.context.close()


def rows(one: Opened) -> list[str]:
    """Numbers of the latents in sight, from the top."""
    box = one.page.locator("#list .scroll").bounding_box()
    links = one.page.locator("#list tbody tr[data-row] th a")
    return [
        link.inner_text() for link in links.all() if (b := link.bounding_box()) and b["y"] < box["y"] + box["height"]
    ]


def settled(one: Opened) -> None:
    """Waits until the address follows what is shown."""
    one.page.wait_for_timeout(250)


def test_it_opens_and_says_what_the_dictionary_is(opened: Any) -> None:
    one = opened()
    assert one.page.title() == one.text("h1") == "ReLU + L1 SAE, L1 = 0.5, layer 3, mlp_out"
    text = one.text("#page")
    assert "2,000 latents" in text and "loss recovered of zero ablation" in text and "85 %" not in text
    assert "90 %" in text and "89 % to 91 %" in text
    assert one.page.locator("#page svg rect.bar").count() > 10
    assert one.scripts() == ["overview.js", "table.js"]
    assert rows(one)[:3] == ["0", "1", "2"] and len(rows(one)) < 60
    assert one.page.locator("table.grid").get_attribute("aria-rowcount") == "2001"


def test_dead_and_dense_latents_are_a_click_away(opened: Any) -> None:
    one = opened()
    one.page.click("#page a:has-text('never fire')")
    assert rows(one) == ["1", "5"] and one.text("#found") == "2 of 2,000"
    assert "show=dead" in one.page.url
    one = opened()
    one.page.click("#page a:has-text('more than 10 %')")
    assert rows(one) == ["2"]


def test_an_address_leads_to_a_latent_and_loads_its_piece_alone(opened: Any) -> None:
    one = opened(address="#latent=700")
    assert one.text("h2") == "Latent 700"
    assert one.scripts() == ["overview.js", "table.js", "latents-0002.js"]
    assert "700" in rows(one), "its row is in sight"
    assert one.text("tr.chosen th") == "700"
    one.page.click("#page a:has-text('707') >> nth=0")
    one.page.wait_for_selector("h2:has-text('707')")
    assert "latent=707" in one.page.url and one.scripts()[3:] == []
    one.page.go_back()
    one.page.wait_for_selector("h2:has-text('Latent 700')")


@pytest.mark.parametrize("address", ["#latent=2000", "#latent=x", "#latent=-1"])
def test_a_latent_that_there_is_not_is_said_to_be_none(opened: Any, address: str) -> None:
    one = opened(address=address)
    assert "There is no latent" in one.text("[role=alert]") and "0 to 1999" in one.text("[role=alert]")


def test_search_finds_tokens_logits_labels_and_numbers(opened: Any) -> None:
    one = opened()
    one.page.select_option("#where", "token")
    one.page.fill("#query", "NEEDLE")
    one.page.wait_for_function("document.querySelector('#found').textContent.startsWith('1 ')")
    assert rows(one) == ["700"]
    settled(one)
    again = opened(address=f"#{one.page.url.split('#')[1]}")
    assert rows(again) == ["700"] and again.page.input_value("#query") == "NEEDLE"
    one.page.select_option("#where", "latent")
    one.page.fill("#query", "12")
    one.page.wait_for_function("document.querySelector('#list th a')?.textContent === '12'")
    one.page.select_option("#where", "label")
    one.page.fill("#query", "is_1")
    one.page.wait_for_function("document.querySelector('#found').textContent.startsWith('334')")
    one.page.keyboard.press("Enter")
    one.page.wait_for_selector("h2:has-text('Latent 1')")


def test_columns_sort_both_ways_and_nothing_comes_last(opened: Any) -> None:
    one = opened()
    values = lambda: one.texts("#list tbody tr[data-row] td:nth-child(3)")  # noqa: E731
    one.page.click("thead button:has-text('fires')")
    assert rows(one)[0] == "2" and values()[0] == "25 %"
    assert one.page.locator("th[aria-sort=descending]").inner_text().startswith("fires")
    one.page.click("thead button:has-text('fires')")
    assert values()[0] == "never"
    for _ in range(2):
        one.page.click("thead button:has-text('largest')")
        assert one.texts("#list tbody tr[data-row] td:nth-child(4)")[0] not in ("–", "never")
    one.page.locator("#list .scroll").evaluate("box => { box.scrollTop = 1e9; }")
    one.page.wait_for_function("[...document.querySelectorAll('#list th a')].some(a => a.textContent === '5')")
    assert set(rows(one)[-2:]) == {"1", "5"}


def test_keys_go_through_latents_in_the_order_of_the_table(opened: Any) -> None:
    one = opened(address="#sort=-frequency")
    order = rows(one)[:4]
    for i, key in enumerate(("j", "ArrowDown", "j")):
        one.page.keyboard.press(key)
        one.page.wait_for_selector(f"h2:text-is('Latent {order[i]}')")
    one.page.keyboard.press("k")
    one.page.wait_for_selector(f"h2:text-is('Latent {order[1]}')")
    settled(one)
    assert f"latent={order[1]}" in one.page.url and "sort=-frequency" in one.page.url
    one.page.keyboard.press("/")
    assert one.page.evaluate("document.activeElement.id") == "query"
    one.page.keyboard.type("j")
    assert one.page.input_value("#query") == "j", "keys in a field are text"
    one.page.keyboard.press("Escape")
    assert one.page.input_value("#query") == ""
    one.page.keyboard.press("Escape")
    one.page.keyboard.press("?")
    assert one.page.locator("dialog[open]").count() == 1
    one.page.keyboard.press("Escape")
    assert one.page.locator("dialog[open]").count() == 0
    one.page.keyboard.press("o")
    one.page.wait_for_selector("#page >> text=How often latents fire")


def test_fast_keys_lose_nothing(opened: Any) -> None:
    one = opened()
    one.page.evaluate(
        """() => { for (let i = 0; i < 210; i++)
        document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true })); }"""
    )
    one.page.wait_for_selector("h2:text-is('Latent 209')")
    settled(one)
    assert "latent=209" in one.page.url


def test_keys_that_come_while_the_address_changes_count(opened: Any) -> None:
    """The browser tells of an address some time after it was set, when the page may be further."""
    one = opened()
    one.page.evaluate("""() => {
        addEventListener("hashchange", event => event.stopImmediatePropagation(), { capture: true, once: true });
        const press = () => document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
        press();
        setTimeout(() => { press(); window.dispatchEvent(new Event("hashchange")); }, 180);
    }""")
    one.page.wait_for_timeout(600)
    assert one.text("h2") == "Latent 1" and "latent=1" in one.page.url
    one.page.evaluate("location.hash = 'latent=9'")
    one.page.wait_for_selector("h2:text-is('Latent 9')")
    one.page.go_back()
    one.page.wait_for_selector("h2:text-is('Latent 1')")
    one.page.go_forward()
    one.page.wait_for_selector("h2:text-is('Latent 9')")


def test_scrolling_keeps_few_rows(opened: Any) -> None:
    one = opened()
    for top in (0, 30 * 500, 30 * 1990):
        one.page.locator("#list .scroll").evaluate("(box, top) => { box.scrollTop = top; }", top)
        one.page.wait_for_timeout(60)
        numbers = [int(n) for n in rows(one)]
        assert len(numbers) < 60 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] <= max(0, top // 30) <= numbers[-1]


def test_hostile_texts_are_texts(opened: Any, results: Path) -> None:
    one = opened("hostile/dashboards/bad")
    assert (
        one.page.title().startswith("ReLU")
        and one.page.locator("#page script, #list script, img, b:not(.peak)").count() == 0
    )
    seen = set()
    for latent in range(60):
        one.page.keyboard.press("j")
        one.page.wait_for_selector(f"h2:text-is('Latent {latent}')")
        seen |= set(one.page.locator("#page bdi").evaluate_all("all => all.map(e => e.textContent)"))
        assert one.page.locator("#page script, img, b:not(.peak)").count() == 0
    assert one.page.title().startswith("ReLU") and not hasattr(one, "broken")
    for text in (
        "</script><script>document.title='broken'</script>",
        "<!--",
        "&amp;",
        "\\u003c",
        "${1}",
        "🌊",
        "مرحبا",
    ):
        assert text in seen
    for shown in (
        "a⟨U+0000⟩b",
        "⟨U+001B⟩[31mred",
        "⟨U+2028⟩",
        "⟨U+202E⟩evil⟨U+202C⟩",
        "⟨U+FEFF⟩",
        "⟨U+200B⟩",
        "↵",
        "⟨U+000D⟩↵",
        "⇥",
    ):
        assert shown in seen
    assert max(map(len, seen)) < 400 and "⟨empty⟩" in seen and "␣" in seen
    unseen = re.compile("[\x00-\x08\x0b-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\u200b]")
    assert not [text for text in seen if unseen.search(text)]
    for text in ("__proto__", "<img"):
        one.page.fill("#query", text)
        one.page.wait_for_function("!document.querySelector('#found').textContent.startsWith('60 of')")
        assert int(one.text("#found").split()[0]) > 0


def test_activations_are_shown_by_more_than_colour(opened: Any) -> None:
    one = opened(address="#latent=0")
    first = one.page.locator(".examples li").first
    widths = first.locator(".on").evaluate_all("all => all.map(e => getComputedStyle(e).borderBottomWidth)")
    assert len(set(widths)) == 2
    peak = first.locator(".at")
    assert peak.count() == 1 and float(first.locator(".value").inner_text()) > 0
    assert one.page.locator(".legend .on").count() == 5
    peak.hover()
    hint = one.page.locator("#hint")
    assert hint.is_visible() and peak.get_attribute("data-value") in hint.inner_text()
    one.page.mouse.move(2, 2)
    assert not hint.is_visible()


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("dashboards/large", ""),
        ("dashboards/large", "#latent=0&sort=-max"),
        ("dashboards/small", "#latent=7"),
        ("comparisons/all", ""),
        ("comparisons/all", "#one=small&other=large&latent=7"),
    ],
)
def test_every_text_has_contrast(opened: Any, path: str, address: str) -> None:
    one = opened(path, address)
    one.page.wait_for_timeout(100)
    for scheme in ("light", "dark"):
        one.page.emulate_media(color_scheme=scheme)
        found = one.page.evaluate(CONTRAST)
        assert len(found) > 30
        assert [entry for entry in found if entry[0] < 4.5] == [], scheme


def test_dark_is_as_the_system_or_as_chosen(opened: Any) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    one = opened(color_scheme="dark")
    dark = one.page.evaluate(back)
    assert opened(color_scheme="light").page.evaluate(back) == "rgb(255, 255, 255)" != dark
    one.page.click("#theme")
    assert one.page.evaluate(back) == "rgb(255, 255, 255)"
    one.page.keyboard.press("t")
    assert one.page.evaluate(back) == dark and "dark" in one.text("#theme")


@pytest.mark.parametrize("path", ["dashboards/large", "dashboards/small", "hostile/dashboards/bad", "comparisons/all"])
def test_a_phone_is_wide_enough(opened: Any, path: str) -> None:
    addresses = ["", "#list=1", "#latent=0", "#latent=7"]
    if path.startswith("comparisons"):
        addresses = ["", "#one=small&other=large", "#one=small&other=large&latent=7", "#one=small&latent=7"]
    one = opened(path, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    for address in addresses:
        one.page.evaluate("address => { location.hash = address; }", address)
        one.page.wait_for_timeout(150)
        assert one.page.evaluate("document.documentElement.scrollWidth") <= 360, address


def test_on_a_phone_one_thing_at_a_time(opened: Any) -> None:
    one = opened(viewport={"width": 360, "height": 740}, has_touch=True)
    assert one.page.locator("#page").is_visible() and not one.page.locator("#list").is_visible()
    one.page.click("#to-list")
    assert one.page.locator("#list").is_visible() and not one.page.locator("#page").is_visible()
    one.page.click("#list tbody tr[data-row='3']")
    one.page.wait_for_selector("h2:text-is('Latent 3')")
    assert not one.page.locator("#list").is_visible()


def test_names_for_those_who_do_not_see(opened: Any) -> None:
    one = opened(address="#latent=0")
    unnamed = """all => all.filter(e => !(e.getAttribute("aria-label") || e.textContent.trim() ||
        e.closest("label")?.textContent.trim() || e.title)).map(e => e.outerHTML)"""
    assert one.page.locator("button, a, input, select, [role=img], dialog").evaluate_all(unnamed) == []
    bare = "all => all.filter(t => !t.querySelector('th[scope]')).length"
    assert one.page.locator("table").evaluate_all(bare) == 0
    assert one.page.locator("html").get_attribute("lang") == "en" and one.page.locator("h1").count() == 1


def test_all_of_a_latent_is_there(opened: Any) -> None:
    one = opened("dashboards/small", "#latent=0")
    heads = one.texts("#page h3")
    panels = ["Tokens it fires on", "Nearest by decoder", "Nearest by firing", "Heads"]
    texts = ["Strongest activations", "Through its range"]
    assert heads == ["Activations", "Logits it raises", "Logits it lowers", *texts, *panels]
    assert one.page.locator("#page h4").count() == 3 and one.page.locator(".examples li").count() == 6
    assert one.page.locator("#page svg").count() == 3


def test_print_shows_the_latent_alone(opened: Any) -> None:
    one = opened(address="#latent=0")
    one.page.emulate_media(media="print")
    assert not one.page.locator("#list").is_visible() and not one.page.locator("nav").is_visible()
    assert one.page.locator(".examples").first.is_visible()


def test_partners_lead_to_the_other_side(opened: Any) -> None:
    one = opened("dashboards/small", "#latent=3")
    assert one.page.locator("a[href^='../large/']").count() == 0, "there is no Jacobian here"
    assert one.page.locator("text=Heads").count() >= 1


def test_a_piece_that_is_lost_is_named(browser: Any, results: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(results / "dashboards/small", tmp_path / "copy")
    (tmp_path / "copy/data/latents-0001.js").unlink()
    one = Opened(browser, tmp_path / "copy/index.html", "#latent=256")
    assert "latents-0001.js is missing" in one.text("[role=alert]")
    one.go(tmp_path / "copy/index.html", "#latent=3")
    one.page.wait_for_selector("h2:text-is('Latent 3')")
    one.context.close()


# -------------------------------------------------------------------- comparison
def test_dictionaries_beside_each_other(opened: Any) -> None:
    one = opened("comparisons/all")
    assert one.page.title() == "Dictionaries at layer 3, mlp_out of tiny"
    assert one.page.locator("#page svg .mark").count() == 3, "two points and one in the legend"
    assert one.page.locator(".matrix td a").count() == 2
    assert one.scripts() == ["overview.js"]
    one.page.locator(".matrix tbody tr").nth(1).locator("a").click()
    one.page.wait_for_selector("#list tbody tr[data-row]")
    assert "one=small" in one.page.url and one.text("#found") == "298 fire"
    cosines = [float(text) for text in one.texts("#list tbody tr[data-row] td:nth-child(2)")]
    assert cosines == sorted(cosines, reverse=True)
    latent, match = rows(one)[0], one.texts("#list tbody tr[data-row] td:nth-child(3)")[0]
    one.page.keyboard.press("j")
    one.page.wait_for_selector("article h2")
    assert one.texts("article h2") == [f"Latent {latent}", f"Latent {match}"]
    one.page.keyboard.press("x")
    one.page.wait_for_selector("text=How much of one is in the other")
    assert "one=large" in one.page.url
    assert one.page.locator(f"a[href='../../dashboards/small/index.html#latent={latent}&among=all']").count() >= 0


def test_a_latent_in_all_others_and_back_to_its_dashboard(opened: Any) -> None:
    one = opened("dashboards/small", "#latent=7&among=all")
    one.page.click("a:has-text('Compare')")
    one.page.wait_for_selector("text=Latent 7 in the other dictionaries")
    assert "/comparisons/all/" in one.page.url
    links = one.page.locator("article + div td a")
    assert links.count() == 3
    links.nth(1).click()
    one.page.wait_for_selector("article >> nth=1")
    one.page.click("article h2 a >> nth=0")
    one.page.wait_for_selector("h2:text-is('Latent 7')")
    assert "/dashboards/small/" in one.page.url
