"""The live lens in a real Chromium, served from this process: type, slide, hover, cancel, reload, tabs."""

import json
import math
import os
import threading
from contextlib import contextmanager
from dataclasses import replace
from urllib.request import urlopen

import browser
import pytest
import uvicorn
from browser import complaints, plain, screen
from test_attribution import HOSTILE, hostile_tokens
from test_live import PROMPT, answers, reader, student, subject, tokens  # noqa: F401  (fixtures)

import safesteer as ss
from safesteer.live.reading import View
from safesteer.live.server import Session, lens_app

browser.require_browser()
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

pytestmark = pytest.mark.slow
LENGTH = 24


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(subject):  # noqa: F811
    """A server of the subject, whose safety tokens have hostile texts."""
    with served(replace(subject, tokens=hostile_tokens(subject.tokens))) as address:
        yield address


@contextmanager
def served(subject):  # noqa: F811
    session = Session(subject)
    server = uvicorn.Server(uvicorn.Config(lens_app(session), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/?token={session.token}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def page(driver, address):
    screen(driver, 1200, dark=False)
    driver.get(address)
    driver.execute_script("localStorage.clear()")
    driver.get(address)
    wait(driver, lambda: root(driver, "ready") == "true")
    driver.get_log("browser")
    return driver


def root(driver, name):
    return driver.execute_script(f"return document.getElementById('lens').dataset.{name}")


def wait(driver, until, seconds=20):
    WebDriverWait(driver, seconds, poll_frequency=0.02).until(lambda _: until())


def all_of(driver, css):
    return driver.find_elements(By.CSS_SELECTOR, css)


def one(driver, css):
    return driver.find_element(By.CSS_SELECTOR, css)


def type_and_run(driver, text):
    box = one(driver, "textarea")
    box.clear()
    driver.execute_script("arguments[0].value = arguments[1]", box, text)
    box.send_keys(Keys.ENTER)
    wait(driver, lambda: root(driver, "running") == "true" or all_of(driver, ".tok"))


def settle(driver):
    wait(driver, lambda: one(driver, ".say").text == "Done.")


def slide(driver, which, value):
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    driver.execute_script(script, one(driver, f"input[id*={which}]"), value)


def shown(driver):
    """The texts of all lanes' tokens, as the page has them."""
    script = (
        "return [...document.querySelectorAll('.flow')].map(f => [...f.children].map(t => t.textContent))"
    )
    return driver.execute_script(script)


def expected(subject, **changes):  # noqa: F811
    view = View(**({"prompt": PROMPT, "layer": 1, "coeff": 2.0, "max_new_tokens": LENGTH} | changes))
    return answers(subject, view)


def test_a_typed_prompt_streams_the_answers_of_all_models(page, subject):  # noqa: F811
    type_and_run(page, PROMPT)
    settle(page)
    assert shown(page) == plain(page, expected(subject))
    assert complaints(page) == []


def test_the_numbers_shown_are_those_of_trace(page, subject):  # noqa: F811
    type_and_run(page, PROMPT)
    settle(page)
    base = expected(subject)[0]
    applied = replace(subject.direction, layer=1, coeff=2.0)
    ids = [t.id for t in base]
    (read,) = ss.trace(subject.chat, applied, subject.tokens, [PROMPT], [ids], subject.student)
    ActionChains(page).move_to_element(
        all_of(page, ".flow")[0].find_elements(By.CSS_SELECTOR, ".tok")[2]
    ).perform()
    cells = [float(c.get_attribute("data-p")) for c in all_of(page, ".detail td[data-p]")]
    want = read.tokens[2]
    assert cells == pytest.approx([want.p_base, want.p_steered, want.p_student], abs=1e-6)
    assert f"{abs(want.lift):.2f}" in one(page, ".detail .note").text


def test_a_moved_slider_cancels_and_never_mixes(page, subject):  # noqa: F811
    """Many moves while text streams: what stands at the end is one setting's alone."""
    type_and_run(page, PROMPT)
    for value in (-3, 1, -2, 3):
        wait(page, lambda: len(all_of(page, ".tok")) > 1)
        slide(page, "strength", value)
        assert root(page, "running") == "false"
    wait(page, lambda: root(page, "running") == "true")
    settle(page)
    assert shown(page) == plain(page, expected(subject, coeff=3.0))
    assert shown(page)[1] != plain(page, expected(subject))[1]


def test_layer_and_intervention(page, subject):  # noqa: F811
    type_and_run(page, PROMPT)
    settle(page)
    slide(page, "layer", 2)
    wait(page, lambda: root(page, "running") == "true")
    settle(page)
    assert shown(page) == plain(page, expected(subject, layer=2))
    page.execute_script("document.querySelector('input[value=ablate]').click()")
    wait(page, lambda: root(page, "running") == "true")
    settle(page)
    assert shown(page) == plain(page, expected(subject, layer=2, intervention="ablate"))
    assert not one(page, "input[id*=strength]").is_enabled()


@pytest.mark.parametrize(
    ("operation", "coeff", "most"), [("add", 6.0, 6), ("add", 1.37, 4), ("add", -1.2, 4), ("clamp", 12.3, 0)]
)
def test_the_slider_holds_the_directions_own_strength(driver, subject, operation, coeff, most):  # noqa: F811
    norm = float(subject.direction.vector.norm())
    own = replace(subject, direction=replace(subject.direction, operation=operation, coeff=coeff))
    with served(own) as address:
        driver.get(address)
        wait(driver, lambda: root(driver, "ready") == "true")
        slider = one(driver, "input[id*=strength]")
        assert float(slider.get_attribute("value")) == coeff
        assert float(slider.get_attribute("max")) == (most or max(math.ceil(4 * norm), 13))
        other = "add" if operation == "clamp" else "clamp"
        driver.execute_script(f"document.querySelector('input[value={other}]').click()")
        shown = float(slider.get_attribute("value"))
        assert shown == pytest.approx(coeff / norm if other == "add" else coeff * norm)
        driver.execute_script(f"document.querySelector('input[value={operation}]').click()")
        assert float(slider.get_attribute("value")) == coeff


def test_stop(page):
    Select(one(page, "select")).select_by_value("192")
    type_and_run(page, PROMPT)
    wait(page, lambda: len(all_of(page, ".tok")) > 1)
    page.execute_script(
        "[...document.querySelectorAll('button')].find(b => b.textContent === 'Stop').click()"
    )
    n = len(all_of(page, ".tok"))
    page.execute_async_script("setTimeout(arguments[0], 400)")
    assert len(all_of(page, ".tok")) == n
    assert one(page, ".say").text == "Stopped."


def test_a_safety_token_tells_its_story(page, subject):  # noqa: F811
    chips = all_of(page, ".chip")
    assert len(chips) == len(subject.tokens)
    chips[1].click()
    assert f"{subject.tokens.tokens[1].votes} votes" in one(page, ".safety .story").text


def test_keyboard(page):
    type_and_run(page, PROMPT)
    settle(page)
    first = all_of(page, ".tok")[0]
    page.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_RIGHT)
    assert page.execute_script("return document.activeElement.dataset.at") == "0,1"
    assert one(page, ".tok.on").get_attribute("data-at") == "0,1"
    canvas = one(page, "canvas")
    canvas.send_keys(Keys.ARROW_UP)
    assert "Layer 2" in one(page, ".strip .note").text


def test_cards_survive_a_reload(page, address):
    type_and_run(page, PROMPT)
    settle(page)
    page.get(address)
    wait(page, lambda: root(page, "ready") == "true")
    assert PROMPT in one(page, ".card").text
    one(page, ".card").click()
    settle(page)
    assert len(all_of(page, ".card")) == 1


def test_hostile_text_stays_text(page):
    assert page.execute_script("return document.querySelectorAll('img, iframe, script').length") == 1
    for text in HOSTILE[:7]:
        type_and_run(page, text)
        settle(page)
    assert len(all_of(page, ".card")) == 7
    assert page.execute_script("return document.querySelectorAll('img, iframe, script').length") == 1
    assert complaints(page) == []
    blocked = page.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        "document.body.append(s);"
    )
    assert blocked.startswith("script-src")


def test_a_wrong_token_gets_nothing(driver, address):
    driver.get(address[:-3] + "xyz")
    assert "needs the whole address" in driver.page_source
    driver.get_log("browser")


def test_two_tabs_do_not_disturb_each_other(page, subject, address):  # noqa: F811
    first = page.current_window_handle
    page.switch_to.new_window("tab")
    page.get(address)
    wait(page, lambda: root(page, "ready") == "true")
    second = page.current_window_handle
    type_and_run(page, "Name a river.")
    page.switch_to.window(first)
    type_and_run(page, PROMPT)
    settle(page)
    assert shown(page) == plain(page, expected(subject))
    page.switch_to.window(second)
    settle(page)
    assert shown(page) == plain(page, expected(subject, prompt="Name a river."))
    page.close()
    page.switch_to.window(first)


def test_a_saved_view_works_from_disk(page, driver, address, tmp_path):
    type_and_run(page, PROMPT)
    settle(page)
    texts = shown(page)
    saved = page.execute_async_script(
        "const done = arguments[arguments.length - 1], make = URL.createObjectURL;"
        "URL.createObjectURL = blob => { blob.text().then(done); return make(blob); };"
        "[...document.querySelectorAll('button')].find(b => b.textContent === 'Save this view').click();"
    )
    path = tmp_path / "lens.html"
    path.write_text(saved, encoding="utf-8")
    driver.get_log("performance")
    driver.get(path.as_uri())
    wait(driver, lambda: root(driver, "ready") == "true")
    assert shown(driver) == texts
    assert len(all_of(driver, "canvas")) == 1
    assert not one(driver, "button.run").is_enabled()
    urls = [
        message["params"]["request"]["url"]
        for entry in driver.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert [u for u in urls if u.startswith("http")] == []
    assert complaints(driver) == []


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen(page, width, dark):
    screen(page, width, dark=dark)
    type_and_run(page, PROMPT)
    settle(page)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 150) == dark


def test_a_stopped_server_is_one_sentence(page, monkeypatch):
    page.execute_script("window.fetch = () => Promise.reject(new TypeError('gone'))")
    type_and_run_text = "Is anybody there?"
    box = one(page, "textarea")
    page.execute_script("arguments[0].value = arguments[1]", box, type_and_run_text)
    box.send_keys(Keys.ENTER)
    wait(page, lambda: "does not answer" in one(page, ".say").text)


def test_the_page_is_answered_over_http(address):
    with urlopen(address) as reply:
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")


MANY = """
const [n, done] = arguments, box = document.querySelector('textarea'), say = document.querySelector('.say');
const busy = () => say.textContent !== 'Done.';
(async () => {
  for (let i = 0; i < n; i += 1) {
    box.value = `Prompt number ${i}`;
    document.querySelector('button.run').click();
    while (busy()) await new Promise(r => setTimeout(r, 5));
  }
  done();
})();
"""


def test_many_prompts_do_not_fill_the_memory(page):
    """At this rate 500 prompts stay below 100 MB: the heap, garbage collected, after a tenth of them.

    SAFESTEER_LENS_PROMPTS=500 sends them all: 0.08 MB in twelve minutes on two busy cores.
    """
    n = int(os.environ.get("SAFESTEER_LENS_PROMPTS", "50"))

    def heap():
        page.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        metrics = page.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "JSHeapUsedSize")

    page.execute_cdp_cmd("Performance.enable", {})
    page.set_script_timeout(600)
    page.execute_async_script(MANY, 3)
    before = heap()
    for start in range(0, n, 10):
        page.execute_async_script(MANY, min(10, n - start))
    grown = heap() - before
    print(f"{n} prompts: {grown / 1e6:.2f} MB")
    assert grown < 100e6 * n / 500
    assert page.execute_script("return document.querySelectorAll('*').length") < 5000
