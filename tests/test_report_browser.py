"""The report in a real headless Chromium, from disk, without a network.

Needs Chromium, its driver and the selenium package; skips with the reason where one is missing.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import browser
import pytest
from browser import complaints, plain, screen
from test_attribution import CONFIG, HOSTILE, answer_rows, fill_run, hostile_tokens

from conftest import PACKAGE
from safesteer._token_text import running, visible
from safesteer.attribution.explanation import explain
from safesteer.attribution.grid import GRID_FILE, answer_grid
from safesteer.attribution.result import Attribution
from safesteer.report.page import write_report
from safesteer.settings import ExplainConfig
from safesteer.tokens.selection import select_tokens

browser.require_browser()
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

pytestmark = pytest.mark.slow
SHOWCASE = PACKAGE.parent / "docs" / "showcase"
FIELDS = {"base": "base", "teacher": "steered", "student": "student"}  # a model's name and its fields


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokens(tiny_llama, direction, few):
    return select_tokens(tiny_llama, direction, few.harmless, replace(CONFIG, k=30))


@pytest.fixture(scope="module")
def attribution(tiny_llama, direction, tokens, few) -> Attribution:
    config = ExplainConfig(n_prompts=4, n_harmful=3, max_tokens=12, n_sets=3, n_splits=3)
    return explain(tiny_llama, direction, tokens, tiny_llama, prompts=few, config=config)


@pytest.fixture(scope="module")
def report(tmp_path_factory, tokens, attribution) -> Path:
    run = fill_run(tmp_path_factory.mktemp("run"), tokens, attribution, answer_rows(10))
    return write_report(run)


def load(driver, path: Path) -> None:
    """Open a page from disk, with empty logs and a wide, light window."""
    for log in ("browser", "performance"):
        driver.get_log(log)
    screen(driver, 1200, dark=False)
    driver.get(path.as_uri())
    WebDriverWait(driver, 20).until(
        lambda d: d.execute_script("return document.documentElement.dataset.ready") == "true"
    )


@pytest.fixture
def page(driver, report):
    load(driver, report)
    return driver


def all_of(driver, css: str):
    return driver.find_elements(By.CSS_SELECTOR, css)


def click(driver, css: str) -> None:
    node = driver.find_element(By.CSS_SELECTOR, css)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    node.click()


def show_every_chart(driver) -> int:
    """Scroll through the page until all figures are drawn; returns how many there are."""
    for details in all_of(driver, "details"):
        driver.execute_script("arguments[0].open = true", details)
    charts = all_of(driver, ".chart")
    for chart in charts:
        driver.execute_script("arguments[0].scrollIntoView()", chart)
        WebDriverWait(driver, 20).until(lambda _, c=chart: all_of(c, ".main-svg"))
    return len(charts)


def requests(driver) -> list[str]:
    """Everything that the browser asked for, apart from the page and inline data."""
    urls = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            params = message["params"]
            urls.append(params.get("url") or params["request"]["url"])
    return [u for u in urls if not u.startswith(("file:", "data:", "blob:"))]


def test_the_page_works_offline_and_without_complaint(page):
    assert show_every_chart(page) >= 7
    assert complaints(page) == []
    assert requests(page) == []
    names = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [n for n in names if not n.startswith(("data:", "blob:"))] == []


def test_the_policy_really_blocks(page):
    blocked = page.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        "document.body.append(s);"
    )
    assert blocked.startswith("script-src")
    assert page.execute_script("return window.hacked") is None


def test_it_opens_fast(driver, tmp_path, tokens, attribution):
    many = replace(attribution, traces=(attribution.traces * 200)[:200])
    rows = answer_rows(100, ("A plausible answer of some length. " * 12,))
    path = write_report(fill_run(tmp_path / "run", tokens, many, rows))
    assert path.stat().st_size < 8_000_000
    load(driver, path)
    driver.get("about:blank")  # the first start also warms the browser
    load(driver, path)
    timing = driver.execute_script(
        "const n = performance.getEntriesByType('navigation')[0]; return n.loadEventEnd"
    )
    assert timing < 2000


def test_tokens_sort(page, tokens):
    def column(n: int) -> list[str]:
        return [c.text for c in all_of(page, f"#token-table tr.main td:nth-child({n})")]

    heads = [h.text for h in all_of(page, "#token-table th")]
    votes = heads.index("votes") + 1
    click(page, f"#token-table th:nth-child({votes}) button")
    shown = [int(v.replace(",", "")) for v in column(votes)]
    assert shown == sorted((t.votes for t in tokens.tokens), reverse=True)[: len(shown)]
    click(page, f"#token-table th:nth-child({votes}) button")
    shown = [int(v.replace(",", "")) for v in column(votes)]
    assert shown == sorted(t.votes for t in tokens.tokens)[: len(shown)]
    assert page.find_element(By.CSS_SELECTOR, "th[aria-sort]").get_attribute("aria-sort") == "ascending"


def test_tokens_can_be_searched_and_all_shown(page, tokens, attribution):
    assert len(all_of(page, "#token-table tr.main")) == 20
    click(page, "#token-table .scroll > button")
    assert len(all_of(page, "#token-table tr.main")) == len(tokens)
    wanted = attribution.stories[tokens.tokens[3].id].text.strip()
    box = page.find_element(By.CSS_SELECTOR, "#token-tools input[type=search]")
    box.send_keys(wanted)
    rows = all_of(page, "#token-table tr.main")
    shown = [visible(s.text) for s in attribution.stories.values() if wanted.lower() in s.text.lower()]
    assert sorted(r.find_element(By.CSS_SELECTOR, ".token").text for r in rows) == sorted(shown)
    box.send_keys("no such token")
    assert all_of(page, "#token-table tr.main") == []


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_a_token_tells_its_story(page, tokens, attribution, by):
    token = tokens.tokens[1]
    css = f"[data-token='{token.id}']"
    if by == "mouse":
        click(page, css)
    else:
        page.find_element(By.CSS_SELECTOR, css).send_keys(Keys.ENTER)
    assert page.find_element(By.CSS_SELECTOR, css).get_attribute("aria-expanded") == "true"
    shown = page.find_element(By.CSS_SELECTOR, "tr.detail").text
    story = attribution.stories[token.id]
    assert story.group in shown
    assert story.places[0].prompt in shown
    assert visible(story.neighbours[0][0]) in shown
    assert f"Of the {story.n_positions} positions analysed here, {story.votes} voted for it" in shown
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert all_of(page, "tr.detail") == []


def percent(text: str) -> float:
    """The number behind a shown probability."""
    text = text.replace("\u00a0", " ")
    if "·10" in text:
        head, power = text.split("·10")
        return float(head) * 10.0 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    return float(text.removesuffix(" %")) / 100


def test_the_coloured_token_is_the_token_whose_probability_is_shown(page, attribution):
    for i, trace in enumerate(attribution.traces[:2]):
        Select(page.find_element(By.ID, "trace")).select_by_index(i)
        marks = all_of(page, ".tok")
        assert [m.get_attribute("data-id") for m in marks] == [str(t.id) for t in trace.tokens]
        for n, (mark, token) in enumerate(zip(marks, trace.tokens, strict=True)):
            page.execute_script("arguments[0].focus()", mark)
            reading = page.find_element(By.CSS_SELECTOR, ".reading")
            assert reading.get_attribute("data-token") == str(n)
            assert reading.find_element(By.CSS_SELECTOR, ".big").text == visible(token.text)
            for name, field in FIELDS.items():
                shown = reading.find_element(By.CSS_SELECTOR, f"[data-model={name}]")
                p = percent(shown.find_element(By.CSS_SELECTOR, ".p").text)
                assert p == pytest.approx(getattr(token, f"p_{field}"), rel=0.06, abs=1e-9)
                tops = [e.text for e in all_of(shown, "li .token")]
                assert tops == [visible(a.text) for a in getattr(token, f"top_{field}")]


def strength(mark) -> tuple[str, float]:
    """Hue (as "r, g, b") and alpha of a mark's background."""
    colour = mark.value_of_css_property("background-color")
    numbers = [float(x) for x in colour[colour.index("(") + 1 : -1].split(",")]
    return str(numbers[:3]), numbers[3] if len(numbers) > 3 else 1.0


def choose(driver, value: str) -> None:
    node = driver.find_element(By.CSS_SELECTOR, f"#view input[value='{value}']")
    driver.execute_script("arguments[0].click()", node)


def test_colours_follow_their_numbers(page, attribution):
    tokens = attribution.traces[0].tokens
    most = max(0.5, *(t.kl for t in tokens))
    wanted = {
        "lift": lambda t: min(abs(t.lift) / 4, 1),
        "kl": lambda t: t.kl / most,
        "share": lambda t: t.kl_share,
        "s": lambda t: 0.8 * t.in_s,
        "p": lambda t: t.p_steered,
    }
    for name, number in wanted.items():
        choose(page, name)
        for mark, token in zip(all_of(page, ".tok"), tokens, strict=True):
            assert strength(mark)[1] == pytest.approx(0.7 * number(token), abs=0.01)
    choose(page, "lift")
    hues = {strength(m)[0] for m, t in zip(all_of(page, ".tok"), tokens, strict=True) if t.lift > 0.1}
    other = {strength(m)[0] for m, t in zip(all_of(page, ".tok"), tokens, strict=True) if t.lift < -0.1}
    assert not hues & other


def test_the_model_can_be_switched(page, attribution):
    tokens = attribution.traces[0].tokens
    choose(page, "p")
    for value, name in (("0", "base"), ("2", "student"), ("1", "teacher")):
        choose(page, value)
        for mark, token in zip(all_of(page, ".tok"), tokens, strict=True):
            assert strength(mark)[1] == pytest.approx(0.7 * getattr(token, f"p_{FIELDS[name]}"), abs=0.01)
        assert page.find_element(By.CSS_SELECTOR, ".tops .chosen").get_attribute("data-model") == name


def test_hover_and_arrow_keys_move_the_reading(page):
    marks = all_of(page, ".tok")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", marks[2])
    ActionChains(page).move_to_element(marks[2]).perform()
    reading = page.find_element(By.CSS_SELECTOR, ".reading")
    assert reading.get_attribute("data-token") == "2"
    page.execute_script("arguments[0].focus()", marks[2])
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert reading.get_attribute("data-token") == "3"
    page.switch_to.active_element.send_keys(Keys.END)
    assert reading.get_attribute("data-token") == str(len(marks) - 1)
    assert [m.get_attribute("tabindex") for m in all_of(page, ".tok")].count("0") == 1


def test_answers_are_filtered_and_searched(page):
    assert len(all_of(page, ".answer")) == 6
    box = page.find_element(By.CSS_SELECTOR, "#answer-tools input[type=search]")
    box.send_keys("harmless request 7")
    (answer,) = all_of(page, ".answer")
    assert "harmless request 7" in answer.text
    assert "base, answers" in answer.text


def test_dark_mode_follows_the_system_and_the_button(page):
    def background() -> str:
        return page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")

    light = background()
    screen(page, 1200, dark=True)
    night = background()
    assert light != night
    click(page, "#theme")
    assert background() == light
    show_every_chart(page)
    click(page, "#theme")
    assert background() == night
    ink = page.execute_script("return document.querySelector('.chart .xtick text').style.fill")
    assert ink == "rgb(230, 228, 223)"  # figures change with the page


@pytest.mark.parametrize("width", [320, 380])
def test_a_phone_needs_no_sideways_scrolling(page, width):
    screen(page, width, dark=False)
    show_every_chart(page)
    click(page, "[data-token]")
    WebDriverWait(page, 10).until(
        lambda d: d.execute_script("return document.documentElement.scrollWidth") <= width
    )


def test_the_evaluation_table_is_whole_on_a_laptop(page):
    """Its last column, perplexity, was cut off at 1280 pixels."""
    screen(page, 1280, dark=False)
    box = "document.querySelector('#evaluation-table .scroll')"
    needed, there = page.execute_script(f"return [{box}.scrollWidth, {box}.clientWidth]")
    assert 0 < needed <= there


def test_the_numbers_of_the_evaluation_stand_on_the_page(page):
    """The table's cells with their intervals, and the tiles: base and student of `EVALUATION`."""
    rows = [
        [" ".join(cell.text.split()) for cell in row.find_elements(By.CSS_SELECTOR, "td")]
        for row in all_of(page, "#evaluation-table tbody tr")
    ]
    assert rows == [
        ["base", "25 % 14 % to 29 %", "3.0 % 1.0 % to 18 %", "0.000 0.000 to 0.000", "12.50"],
        ["teacher", "94 % 83 % to 98 %", "42 % 40 % to 57 %", "1.236 0.927 to 1.854", "31.25"],
        ["student", "81 % 70 % to 85 %", "7.0 % 5.0 % to 22 %", "0.124 0.093 to 0.186", "14.14"],
    ]
    assert "100 prompts of each kind" in page.find_element(By.ID, "evaluation-table").text
    tiles = [" ".join(tile.text.split()) for tile in all_of(page, "#tiles .value")]
    assert tiles == ["25 % → 81 %", "3.0 % → 7.0 %", "0.124", "12.5 → 14.1"]


def test_hostile_text_is_only_text(driver, tmp_path, tokens, attribution):
    texts = {t.id: HOSTILE[i % len(HOSTILE)] for i, t in enumerate(tokens.tokens)}
    stories = {
        i: replace(s, text=texts[i], neighbours=((HOSTILE[0], 0.5),), group_reason=HOSTILE[1])
        for i, s in attribution.stories.items()
    }
    traces = tuple(
        replace(
            t,
            prompt=HOSTILE[i % len(HOSTILE)],
            tokens=tuple(
                replace(x, text=HOSTILE[n % len(HOSTILE)], id=10_000 + n) for n, x in enumerate(t.tokens)
            ),
        )
        for i, t in enumerate(attribution.traces)
    )
    hostile = replace(attribution, stories=stories, traces=traces)
    run = fill_run(tmp_path, hostile_tokens(tokens), hostile, answer_rows(8, HOSTILE), HOSTILE[0])
    load(driver, write_report(run))
    for i in range(len(HOSTILE)):  # the table is drawn anew with every click
        driver.execute_script("arguments[0].click()", all_of(driver, "button.open")[i])
    show_every_chart(driver)
    assert all_of(driver, "img") == []
    assert driver.find_element(By.TAG_NAME, "h1").text == HOSTILE[0]
    assert complaints(driver) == []
    assert requests(driver) == []
    screen(driver, 380, dark=False)
    WebDriverWait(driver, 10).until(  # figures follow a moment later
        lambda d: d.execute_script("return document.documentElement.scrollWidth") <= 380
    )


def test_an_empty_run_says_what_is_missing(driver, tmp_path):
    (tmp_path / "manifest.json").write_text('{"model": "m"}')
    load(driver, write_report(tmp_path))
    lines = [e.text for e in all_of(driver, ".missing")]
    for file in ("evaluation.json", "answers.jsonl", "sweep.csv", "tokens.json", "history.jsonl"):
        assert sum(file in line for line in lines) == 1
    assert all_of(driver, ".chart") == []
    assert complaints(driver) == []


def test_printing_shows_everything_on_white(page):
    click(page, "#theme")
    page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert page.find_element(By.TAG_NAME, "html").get_attribute("data-theme") == "light"
    assert all(d.get_attribute("open") for d in all_of(page, "details"))
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert page.find_element(By.TAG_NAME, "html").get_attribute("data-theme") == "dark"
    assert complaints(page) == []


@pytest.fixture(scope="module")
def grid(tiny_llama, direction, tokens, few):
    prompts = [*few.harmful[:1], HOSTILE[0]]
    return answer_grid(tiny_llama, direction, tokens, tiny_llama, prompts=prompts, max_new_tokens=8)


@pytest.fixture
def lens(driver, tmp_path, tokens, attribution, grid):
    """A page with a grid of answers, whose safety tokens have hostile texts."""
    run = fill_run(tmp_path / "run", hostile_tokens(tokens), attribution, [])
    grid.save(run / GRID_FILE)
    load(driver, write_report(run))
    return driver


def move(driver, which: str, value: int) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    driver.execute_script(script, driver.find_element(By.CSS_SELECTOR, f"#lens input[id*={which}]"), value)


def assert_shown(driver, cell) -> None:
    """The lens shows the cell: its answers, its colours and, of one token, its numbers."""
    for lane, trace in zip(all_of(driver, "#lens .flow"), cell.traces, strict=True):
        marks = lane.find_elements(By.CSS_SELECTOR, ".tok")
        texts = [m.get_attribute("textContent") for m in marks]
        assert texts == plain(driver, [[replace(t, text=running(t.text)) for t in trace.tokens]])[0]
        for mark, token in zip(marks, trace.tokens, strict=True):
            assert strength(mark)[1] == pytest.approx(0.6 * min(abs(token.lift) / 5, 1), abs=0.01)
    driver.execute_script(
        "arguments[0].focus()", all_of(driver, "#lens .flow")[1].find_element(By.XPATH, "*")
    )
    cells = [float(c.get_attribute("data-p")) for c in all_of(driver, "#lens td[data-p]")]
    token = cell.traces[1].tokens[0]
    assert cells == pytest.approx([token.p_base, token.p_steered, token.p_student], rel=6e-3)


def test_the_lens_moves_through_the_recorded_answers(lens, grid):
    n = len(grid.coeffs)
    assert_shown(lens, grid.cells[1 * n + 2])  # the direction as it was chosen
    move(lens, "strength", 4)
    assert_shown(lens, grid.cells[1 * n + 4])
    assert "4.00" in lens.find_element(By.CSS_SELECTOR, "#lens output[for*=strength]").text
    move(lens, "layer", 2)
    assert_shown(lens, grid.cells[2 * n + 4])
    Select(lens.find_element(By.CSS_SELECTOR, "#lens select")).select_by_index(1)
    assert_shown(lens, grid.cells[(1 * 3 + 2) * n + 4])
    slider = lens.find_element(By.CSS_SELECTOR, "#lens input[id*=strength]")
    slider.send_keys(Keys.ARROW_LEFT)
    assert_shown(lens, grid.cells[(1 * 3 + 2) * n + 3])
    assert complaints(lens) == []
    assert requests(lens) == []
    assert all_of(lens, "img") == []


@pytest.mark.parametrize("width", [320, 1200])
def test_the_lens_fits_and_follows_the_theme(lens, width):
    screen(lens, width, dark=False)
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    WebDriverWait(lens, 10).until(lambda d: d.execute_script(fits))  # figures follow a moment later
    panel = lens.find_element(By.CSS_SELECTOR, "#lens .panel")
    light = panel.value_of_css_property("background-color")
    click(lens, "#theme")
    assert panel.value_of_css_property("background-color") != light
    lens.execute_script("arguments[0].focus()", all_of(lens, "#lens .tok")[0])
    assert lens.execute_script(fits)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_of_the_readme_shows_the_safety_tokens(driver, tmp_path, theme):
    """The page of the committed run, with one story open. SAFESTEER_PICTURES: where to keep it."""
    run = Path(shutil.copytree(SHOWCASE, tmp_path / "run"))
    load(driver, write_report(run))
    screen(driver, 1200, dark=theme == "dark", height=770)
    click(driver, "#token-table tr.main:nth-child(3) button")
    driver.execute_script("document.documentElement.style.scrollbarWidth = 'none'")
    driver.execute_script("document.querySelector('#tokens h2').scrollIntoView()")
    picture = Path(os.environ.get("SAFESTEER_PICTURES", tmp_path)) / f"report-{theme}.png"
    assert driver.save_screenshot(str(picture))
    header = picture.read_bytes()[16:24]  # width and height of a PNG file
    assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (1200, 770)
    box = "arguments[0].getBoundingClientRect()"
    seen = [
        row.text
        for row in all_of(driver, "#token-table tr.main")
        if driver.execute_script(f"const b = {box}; return b.top > 0 && b.bottom < innerHeight", row)
    ]
    assert len(seen) >= 3
    assert "Unfortunately" in seen[2]
    assert "starts a refusal" in seen[2]
    assert "word list: unfortunat" in driver.find_element(By.CSS_SELECTOR, "tr.detail").text
    assert complaints(driver) == []
