"""The console in headless Chromium, at the real router with the demo model: the page loads without an error, groups appear, a chat
streams, a tool is called and answered, a wrong key is told."""

import hashlib
import shutil
import time

import pytest

from cluster import FIXTURES, Cluster, http, serve

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="scripts/setup --tests could not install chromium")

KEY = "console-key"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(f"tenants:\n- name: people\n  keys: [{{name: one, sha256: {hashlib.sha256(KEY.encode()).hexdigest()}}}]\n")
    with Cluster(registry="memory") as cluster:
        serve(cluster, "--served-model-name", "bora-demo", "--device", "cpu", "--num-kv-blocks", "64", "--api-key-file", keys,
              model_dir=FIXTURES / "bora-demo" / "fp8")
        yield cluster


@pytest.fixture
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(driver)
    finally:
        driver.quit()


class Page:
    def __init__(self, driver):
        self.driver = driver

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector, seconds=60, text=None):
        """The first visible element, once it is there (with that text in it)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for element in self.find(selector):
                try:
                    if element.is_displayed() and (text is None or text in element.text):
                        return element
                except Exception:  # replaced by the next look at the groups
                    continue
            time.sleep(0.05)
        raise AssertionError(f"no `{selector}` with {text!r} within {seconds} s; the page: {self.one('body', 1).text if selector != 'body' else ''}")

    def log(self):
        return self.driver.get_log("browser")

    def sign_in(self, url, key=KEY):
        self.driver.get(url)
        field = self.one("#key")
        field.send_keys(key, "\n")

    def ask(self, text):
        self.one("#prompt").send_keys(text, "\n")


def test_the_page_is_static_and_its_policy_strict(guarded):
    for path, kind in [("/", "text/html"), ("/console.js", "text/javascript"), ("/console.css", "text/css")]:
        status, headers, text = http("GET", guarded.router_url + path)
        assert status == 200 and headers["content-type"].startswith(kind)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "http://" not in text and "https://" not in text, "nothing is fetched from elsewhere"
        assert "innerHTML" not in text and "style=" not in text and "onclick" not in text


def test_a_wrong_key_is_told_and_a_good_one_opens(guarded, browser):
    browser.sign_in(guarded.router_url, "wrong")
    assert "unknown" in browser.one("#problem", text="key").text
    assert not browser.find(".group")
    browser.one("#key").send_keys(KEY, "\n")
    group = browser.one(".group", text="local")
    for word in ("bora-demo", "cpu", "0: ", "blocks in use", "ready"):
        assert word in group.text, group.text
    assert "1 of 1 groups take requests" in browser.one("#summary", text="take requests").text
    assert browser.one("#model").get_attribute("value") == "bora-demo"
    assert not browser.find("#problem")[0].is_displayed()
    # a 401 is the only thing that the browser itself complains of
    assert all("401" in line["message"] for line in browser.log()), browser.log()


def test_a_chat_streams_and_its_next_turn_knows_the_first(guarded, browser):
    browser.sign_in(guarded.router_url)
    browser.one(".group")
    browser.log()
    # what the answer looked like over time: it must have grown, but where the browser itself stood still it saw only the end
    for _ in range(5):
        browser.one("#clear").click()
        browser.driver.execute_script("""
            window.lengths = new Set();
            new MutationObserver(() => window.lengths.add(document.querySelector('.assistant pre')?.textContent.length ?? 0))
                .observe(document.querySelector('#messages'), {subtree: true, childList: true, characterData: true});""")
        browser.ask("Write a function that adds two numbers.")
        browser.one("#usage", text="answered")
        answer = browser.one(".assistant", text="def add")
        assert "return a + b" in answer.text
        if len(browser.driver.execute_script("return [...window.lengths]")) > 5:
            break
    else:
        raise AssertionError("the answer came in one piece, five times")
    assert browser.one("#send").is_enabled() and not browser.one("#stop").is_enabled()
    browser.ask("Hello")
    browser.one("#messages li:nth-child(4)")
    assert [item.get_attribute("class") for item in browser.find("#messages li")] == ["message user", "message assistant"] * 2
    browser.one("#clear").click()
    assert not browser.find("#messages li")
    assert not browser.log(), browser.log()


def test_a_tool_call_is_shown_and_its_result_goes_back(guarded, browser):
    browser.sign_in(guarded.router_url)
    browser.one(".group")
    browser.one("#more summary").click()
    browser.one("#with-tools").click()
    browser.log()
    browser.ask("What is the weather in Paris?")
    call = browser.one(".call", text='"Paris"')
    assert call.get_attribute("data-tool") == "get_weather" and "calls get_weather" in call.text
    browser.one(".call input").send_keys('{"city": "Paris", "temperature": 21, "sky": "sunny"}', "\n")
    answer = browser.one("#messages li:nth-child(3) pre", text="Paris")
    assert "21 degrees" in answer.text
    assert not browser.log(), browser.log()


def test_what_a_model_or_a_user_says_is_text_and_never_markup(guarded, browser):
    browser.sign_in(guarded.router_url)
    browser.one(".group")
    browser.log()
    browser.ask("<img src=x onerror=alert(1)><script>alert(2)</script>")
    message = browser.one(".user pre", text="<script>")
    assert message.text.startswith("<img") and not browser.find("#messages img, #messages script")
    assert not browser.log(), browser.log()


def test_an_error_of_the_router_is_shown(guarded, browser):
    browser.sign_in(guarded.router_url)
    browser.one(".group")
    browser.one("#more summary").click()
    browser.one("#with-tools").click()
    tools = browser.one("#tools")
    tools.clear()
    tools.send_keys('[{"type": "function", "function": {"name": "bad name"}}]')
    browser.ask("Hello")
    assert "name" in browser.one(".assistant .error").text
    tools.clear()
    tools.send_keys("no json")
    browser.ask("Hello")
    assert "not valid" in browser.one("#problem").text


def test_it_can_be_used_by_keyboard_and_in_the_dark(guarded, browser):
    browser.sign_in(guarded.router_url)
    browser.one(".group")
    reached = []
    for _ in range(16):
        browser.driver.switch_to.active_element.send_keys("\ue004")  # Tab
        reached.append(browser.driver.switch_to.active_element.get_attribute("id"))
    assert {"prompt", "model", "clear", "send", "messages"} <= set(reached), reached
    for control in browser.find("input, select, textarea"):
        name = browser.driver.execute_script("return arguments[0].labels.length || arguments[0].getAttribute('aria-label')", control)
        assert name, f"{control.get_attribute('id')} has no label"

    def contrast():
        return browser.driver.execute_script("""
            const of = (color) => { const [r, g, b] = color.match(/[0-9.]+/g).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                                    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            return ['body', '#send', '.group dt', '.state'].map((selector) => {
              const element = document.querySelector(selector), style = getComputedStyle(element);
              let behind = element; while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
              const [one, two] = [of(style.color), of(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
              return [selector, (one + 0.05) / (two + 0.05), getComputedStyle(document.body).backgroundColor]; });""")

    backgrounds = set()
    for scheme in ("light", "dark"):
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        for selector, ratio, background in contrast():
            assert ratio >= 4.5, (scheme, selector, ratio)
            backgrounds.add(background)
    assert len(backgrounds) == 2
