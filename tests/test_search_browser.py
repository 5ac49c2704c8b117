"""The page of a search in a real Chromium: offline, a click shows a trial, hostile text is text."""

import browser
import pandas as pd
import pytest
from browser import complaints
from test_attribution import HOSTILE as TEXTS
from test_report_browser import all_of, driver, load, requests  # noqa: F401  (a fixture among them)

from safesteer._token_text import running
from safesteer.report.search_page import write_search_page

browser.require_browser()
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

pytestmark = pytest.mark.slow
SETTING = "distill.lr"
HOSTILE = " ".join(TEXTS[:-1])


def answer(number: int, label: str) -> dict:
    text = f"answer of trial {number}"
    both = {"base": HOSTILE, "base_refuses": False, "student": text, "student_refuses": True}
    return {"prompt": HOSTILE, "label": label, **both}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    trials = pd.DataFrame(
        {
            "trial": [0, 1, 2, 3],
            "state": ["complete", "complete", "ended", "failed"],
            "reason": ["", "", "among the worse half", HOSTILE],
            "harmful": [0.5, 0.9, 0.1, None],
            "over_refusal": [0.1, 0.3, 0.0, None],
            "kl": [0.01, 0.2, 0.5, None],
            "n_pairs": [32, 32, 8, None],
            "seconds": [10.0, 12.0, 3.0, 1.0],
            "layer": [3, 4, 3, None],
            SETTING: [1e-4, 2e-4, 3e-4, 4e-4],
            "on_front": [True, True, False, False],
            "chosen": [False, True, False, False],
        }
    )
    luck = [
        {"rule": "the knee", "trial": 1, "objective": name, "optimism": 0.05}
        | {"on_val": 0.9, "corrected": 0.85, "low": 0.7, "high": 0.95}
        for name in ("harmful", "over_refusal", "kl")
    ]
    facts = {
        "model": HOSTILE,
        "date": "2026-01-01",
        "judge": "declines",
        "base": {"harmful": 0.2, "over_refusal": 0.05, "kl": 0.0},
        "n_pairs": 32,
        "start": {SETTING: 1e-4},
        "space": [{"name": SETTING, "low": 1e-5, "high": 1e-3, "reason": HOSTILE}],
        "answers": {n: [answer(n, label) for label in ("harmful", "harmless")] for n in (0, 1)},
        "made": {n: {"direction": f"Direction of {n}", "tokens": [HOSTILE, " no"]} for n in (0, 1)},
    }
    page = tmp_path_factory.mktemp("search") / "search.html"
    write_search_page(page, facts, trials, pd.DataFrame(luck))
    return page


def shown(driver) -> str:  # noqa: F811
    return driver.execute_script("return document.documentElement.dataset.trial")


def test_the_page_starts_with_the_choice_offline_and_without_complaint(driver, path):  # noqa: F811
    load(driver, path)
    assert shown(driver) == "1"
    assert "Trial 1, chosen" in driver.find_element(By.ID, "trial-name").text
    assert "answer of trial 1" in driver.find_element(By.ID, "answers").text
    assert all_of(driver, "#figure .main-svg")
    assert complaints(driver) == []
    assert requests(driver) == []


def test_a_click_on_a_point_shows_its_trial(driver, path):  # noqa: F811
    load(driver, path)
    points = all_of(driver, "#figure .scatterlayer .point")
    of_trace = "t => t.x.map((_, i) => t.customdata ? t.customdata[i] : null)"
    order = driver.execute_script(f"return document.getElementById('figure').data.flatMap({of_trace})")
    target = points[order.index(0)]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", target)
    ActionChains(driver).move_to_element(target).pause(0.2).click().perform()
    assert shown(driver) == "0"
    assert "answer of trial 0" in driver.find_element(By.ID, "answers").text
    assert "0.0001" in driver.find_element(By.ID, "settings").text


def test_a_trial_in_the_table_is_shown_too(driver, path):  # noqa: F811
    load(driver, path)
    buttons = {b.text: b for b in all_of(driver, "#trial-table button")}
    assert set(buttons) == {"0", "1", "2"}  # a trial that failed has nothing to show
    driver.execute_script("arguments[0].click()", buttons["2"])
    assert shown(driver) == "2"
    assert "among the worse half" in driver.find_element(By.ID, "trial-facts").text
    assert "Answers are kept of complete trials" in driver.find_element(By.ID, "answers").text


def test_hostile_text_stays_text(driver, path):  # noqa: F811
    load(driver, path)
    for css in (
        "h1",
        ".answer .prompt",
        "#space-table td:last-child",
        "#trial-table tr:last-child td:nth-child(8)",
    ):
        assert driver.find_element(By.CSS_SELECTOR, css).get_attribute("textContent") == running(HOSTILE), css
    assert not all_of(driver, "img")
    assert complaints(driver) == []


def test_the_theme_can_be_changed(driver, path):  # noqa: F811
    load(driver, path)
    ink = "return getComputedStyle(document.body).color"
    light = driver.execute_script(ink)
    all_of(driver, "#theme")[0].click()
    assert driver.execute_script(ink) != light
    assert complaints(driver) == []
