"""The page in normal use, and its error messages."""

import re

import numpy as np
import pytest
import soundfile
from playwright.sync_api import expect

from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME
from tests.doubles.waiting import wait_until


pytestmark = pytest.mark.slow

LOW_CONTRAST = """() => {
  const parse = (color) => color.match(/[0-9.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const color = e ? parse(getComputedStyle(e).backgroundColor) : [255, 255, 255];
    return color.length === 3 || color[3] === 1 ? color : ground(e.parentElement);
  };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const hasText = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!hasText || !e.checkVisibility() || e.closest(':disabled')) continue;
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.textContent.trim().slice(0, 30), ratio]);
  }
  return bad;
}"""


def start(page):
    page.locator("#talk").click()
    expect(page.locator("#status")).to_contain_text("Connected.")
    expect(page.locator("#talk")).to_have_text("Stop")


def problem(page):
    return page.locator("#problem").inner_text()


def download(page, selector, folder):
    with page.expect_download() as started:
        page.locator(selector).click()
    path = folder / f"{len(list(folder.iterdir()))}-{started.value.suggested_filename}"
    started.value.save_as(path)
    assert path.suffix == ".wav"
    return path


# ---- conversation ----


def test_conversation(open_page, url, microphone, tmp_path):
    page = open_page(url)
    expect(page.locator("#model")).to_contain_text("expressive")
    start(page)
    expect(page.locator("#transcript .said").first).to_be_visible()
    expect(page.locator("#steering")).to_have_text("Now: expressive, no emotion, 1.00.")
    page.get_by_label("sad").check()
    expect(page.locator("#steering")).to_contain_text("expressive, sad, 1.00")
    if page.locator("#now").is_visible():  # Moshi did not pause yet
        page.locator("#now").click()
    expect(page.locator("#steering")).to_have_text("Now: expressive, sad, 1.00.")
    page.locator("#strength").fill("0.3")
    expect(page.locator("#steering")).to_contain_text("Now: expressive, sad, 0.30.")
    page.get_by_label("base (no adapter)").check()
    expect(page.locator("#strength")).to_be_disabled()
    expect(page.locator("#steering")).to_contain_text("base")
    if page.locator("#now").is_visible():
        page.locator("#now").click()
    expect(page.locator("#steering")).to_have_text("Now: base, sad, 0.30.")
    for name in ("mic", "moshi"):  # `wait_for_function` polls with eval, which the page's policy forbids
        level = page.locator(f"#{name}-level")
        wait_until(lambda level=level: level.evaluate("e => e.value") > 0.02)
    assert float(page.locator("#delay").inner_text().removesuffix(" s")) > 0.1
    page.locator("#talk").click()
    expect(page.locator("#status")).to_contain_text("Ended after")
    assert problem(page) == ""
    check_recording(download(page, "#download", tmp_path), microphone)


def check_recording(path, microphone):
    """The fake microphone is on the left channel, Moshi on the right."""
    samples, rate = soundfile.read(path)
    assert rate == SAMPLE_RATE and samples.shape[1] == 2 and len(samples) % SAMPLES_PER_FRAME == 0
    user, moshi = samples.T
    assert np.sqrt(np.mean(moshi**2)) > 1e-3
    heard, spoken = envelope(user), envelope(soundfile.read(microphone)[0])
    spoken = np.tile(spoken, 1 + 2 * len(heard) // len(spoken))
    lags = range(len(spoken) - len(heard))
    assert (
        max(np.corrcoef(heard, spoken[lag : lag + len(heard)])[0, 1] for lag in lags) > 0.5
    )  # audio glitches on a busy machine


def envelope(samples):
    """Level of each 40 ms."""
    block = SAMPLES_PER_FRAME // 2
    return np.sqrt(np.mean(samples[: len(samples) // block * block].reshape(-1, block) ** 2, axis=1))


def test_microphone_with_another_sample_rate(open_page, url, microphone, tmp_path):
    # As Firefox does it: a microphone connects only to a context of its own rate.
    page = open_page(
        url,
        """const create = AudioContext.prototype.createMediaStreamSource;
        AudioContext.prototype.createMediaStreamSource = function (stream) {
          if (this.sampleRate === 24000) throw new DOMException('rates differ', 'NotSupportedError');
          window.rate = this.sampleRate;
          return create.call(this, stream);
        };""",
    )
    start(page)
    expect(page.locator("#time")).to_have_text(re.compile("0:0[3-9]|[1-9]"))
    assert page.evaluate("window.rate") in (44100, 48000)
    check_recording(download(page, "#download", tmp_path), microphone)


def test_compares_two_answers_to_one_question(open_page, url, tmp_path):
    page = open_page(url)
    expect(page.locator("#compare")).to_be_disabled()
    start(page)
    expect(page.locator("#question")).to_contain_text(re.compile("Your question: [1-9]"))
    page.locator("#answer-s").fill("1.5")
    page.locator("#compare").click()  # ends the conversation: the server may have one slot
    expect(page.locator("#talk")).to_be_disabled()
    expect(page.locator("#comparison")).to_have_text("Comparison complete.")
    assert problem(page) == ""
    answers = page.locator(".answer")
    assert answers.nth(0).locator(".adapter").input_value() == "base"
    assert answers.nth(1).locator(".adapter").input_value() == "expressive"
    assert answers.nth(1).locator(".emotion").input_value() == "happy"
    recordings = []
    for i in range(2):
        expect(answers.nth(i).locator(".said")).not_to_be_empty()
        recordings.append(soundfile.read(download(page, f".answer >> nth={i} >> .save", tmp_path))[0].T)
    users, moshis = zip(*recordings, strict=True)
    begin, end = int(1.04 * SAMPLE_RATE), int(2.24 * SAMPLE_RATE)
    assert np.array_equal(users[0][:end], users[1][:end]) and np.abs(users[0][begin:end]).max() > 0.01
    assert 0 < np.abs(users[0][:begin]).max() < 1e-3  # no digital silence
    assert all(np.sqrt(np.mean(moshi**2)) > 1e-3 for moshi in moshis)
    position = float(answers.nth(1).locator(".seek").input_value())
    page.get_by_role("button", name="Play answer B").click()
    expect(page.get_by_role("button", name="Pause answer B")).to_be_visible()
    page.get_by_role("button", name="Play answer A").click()  # one at a time
    expect(page.get_by_role("button", name="Play answer B")).to_be_visible()
    assert float(answers.nth(1).locator(".seek").input_value()) >= position
    page.get_by_role("button", name="Pause answer A").click()
    page.locator("#new-question").click()
    expect(page.locator("#compare")).to_be_disabled()


def test_page_is_usable_with_the_keyboard(open_page, url):
    page = open_page(url)
    press_until(page, "Tab", "#talk")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Connected.")
    press_until(page, "Tab", "input[name=voice]")
    press_until(page, "Tab", "input[name=emotion]")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("happy")).to_be_checked()
    expect(page.locator("#steering")).to_contain_text("expressive, happy")
    press_until(page, "Tab", "#strength")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#steering")).to_contain_text("1.05")
    outline = page.locator("#strength").evaluate(
        "e => getComputedStyle(e).outlineStyle + getComputedStyle(e).outlineWidth"
    )
    assert outline == "solid3px"
    press_until(page, "Shift+Tab", "#talk")
    page.keyboard.press("Space")
    expect(page.locator("#status")).to_contain_text("Ended")


def press_until(page, key, selector):
    for _ in range(12):
        page.keyboard.press(key)
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{key} does not lead to {selector}")


def test_choosing_an_emotion_selects_an_adapter_that_supports_it(open_page, serve, calm):
    page = open_page(serve(calm).url)
    page.get_by_label("angry").check()
    assert page.locator(".answer .emotion").nth(1).input_value() == "angry"  # what will be compared
    page.locator(".choices").get_by_text("calm").last.click()
    expect(page.locator("input[name=voice][value=calm]")).to_be_checked()
    start(page)
    expect(page.locator("#steering")).to_have_text("Now: calm, calm, 1.00.")
    page.get_by_label("expressive").check()
    expect(page.locator("input[name=emotion]").first).to_be_checked()
    page.locator("#now").click()
    expect(page.locator("#steering")).to_have_text("Now: expressive, no emotion, 1.00.")


def test_default_emotion_of_the_server_is_shown(open_page, serve):
    page = open_page(serve(default_emotion="sad").url)
    start(page)
    expect(page.locator("#steering")).to_have_text("Now: expressive, sad, 1.00.")
    expect(page.get_by_label("sad")).to_be_checked()


# ---- errors ----


ENDINGS = {
    1001: "The server is shutting down.",
    1008: "The server ended the conversation: too fast.",
    1009: "a message was too large",
    1011: "internal error. See the server log.",
    1013: "The server is too fast.",
    4000: "The server ended the conversation (4000 too fast).",
}


def test_close_codes_are_explained(open_page, url):
    page = open_page(url)
    codes = iter(ENDINGS)

    def hold(connection):
        connection.send(b"\0")
        connection.send('{"type": "error", "message": "Not this."}')
        expect(page.locator("#problem")).to_have_text("Not this.")
        connection.close(code=next(codes), reason="too fast")

    page.route_web_socket("**/api/chat*", hold)
    for words in ENDINGS.values():
        page.locator("#talk").click()
        expect(page.locator("#problem")).to_contain_text(words)
        expect(page.locator("#talk")).to_have_text("Start talking")


def test_busy_server(open_page, url):
    first, second = open_page(url), open_page(url)
    start(first)
    second.locator("#talk").click()
    expect(second.locator("#problem")).to_contain_text("busy: all 1 slots are in use; try again later")
    expect(second.locator("#talk")).to_have_text("Start talking")
    third = open_page(url, status="Busy: all 1 slots are in use.")
    first.locator("#talk").click()
    expect(first.locator("#status")).to_contain_text("Ended")
    connect_until_free(third)


def connect_until_free(page):
    while True:  # the server processes its backlog before it sees that the other client left
        page.locator("#talk").click()
        expect(page.locator("#status")).to_have_text(re.compile("Connected|Not connected"))
        if "Not" not in page.locator("#status").inner_text():
            return
        page.wait_for_timeout(300)


def test_blocked_microphone(open_page, url):
    page = open_page(url, permissions=[])
    page.locator("#talk").click()
    expect(page.locator("#problem")).to_contain_text("Microphone access is blocked. Allow it for this page")
    expect(page.locator("#status")).to_have_text("Not connected.")


BROKEN = {
    "delete window.WebSocket": "does not support WebSocket",
    "delete window.AudioWorkletNode": "does not support AudioWorklet",
    "Object.defineProperty(Navigator.prototype, 'mediaDevices', {value: undefined})": "not support microphone access",
}


@pytest.mark.parametrize("lack", BROKEN)
def test_unsupported_browsers(open_page, url, lack):
    page = open_page(url, lack, status="This browser is not supported.")
    expect(page.locator("#problem")).to_contain_text(BROKEN[lack])
    expect(page.locator("#talk")).to_be_disabled()


def test_insecure_address_has_no_microphone(open_page, url):
    page = open_page(url.replace("localhost", "moshi.test"), status="This browser is not supported.")
    expect(page.locator("#problem")).to_contain_text("only on https:// and localhost")
    expect(page.locator("#problem")).to_contain_text("moshi.test) and open http://localhost")


def test_page_behind_a_tunnel(open_page, serve):
    url = serve().url.replace("localhost", "moshi.localhost")  # a safe name, but not one of this machine's
    page = open_page(url, status="Not connected.", errors="403")
    expect(page.locator("#problem")).to_contain_text(f"--allow-origin {url[:-1]}.")


REFUSALS = {"NotFoundError": "No microphone found.", "NotReadableError": "another program may be using it"}


@pytest.mark.parametrize("name", REFUSALS)
def test_missing_microphone(open_page, url, name):
    refusal = f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('no', '{name}') }}"
    page = open_page(url, refusal)
    page.locator("#talk").click()
    expect(page.locator("#problem")).to_contain_text(REFUSALS[name])
    expect(page.locator("#status")).to_have_text("Not connected.")


def test_muted_or_unplugged_microphone(open_page, url):
    page = open_page(
        url,
        """const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        navigator.mediaDevices.getUserMedia = async (wanted) => (window.stream = await open(wanted));""",
    )
    start(page)
    page.evaluate("stream.getTracks()[0].enabled = false")
    expect(page.locator("#status")).to_have_text("No sound from the microphone. Is it muted?")
    page.evaluate("stream.getTracks()[0].dispatchEvent(new Event('ended'))")
    expect(page.locator("#problem")).to_contain_text("microphone was disconnected.")
    expect(page.locator("#download")).to_be_enabled()


def test_suspended_audio_resumes(open_page, url):
    page = open_page(
        url, "AudioContext = class extends AudioContext { constructor(...o) { super(...o); window.context = this; } }"
    )
    start(page)
    page.evaluate("context.suspend()")
    expect(page.locator("#status")).to_contain_text("Audio is suspended.")
    page.locator("h1").click()
    expect(page.locator("#status")).to_contain_text("Connected.")


@pytest.mark.parametrize("way", ["stop", "cut"])
def test_server_stops_or_connection_is_lost(open_page, serve, tmp_path, way):
    server = serve()
    page = open_page(server.url, errors="WebSocket|ERR_CONNECTION")
    start(page)
    expect(page.locator("#question")).to_contain_text("Your question")
    getattr(server, way)()
    words = {"stop": "The server is shutting down.", "cut": "Connection lost."}
    expect(page.locator("#problem")).to_contain_text(words[way])
    expect(page.locator("#talk")).to_have_text("Start talking")
    assert len(soundfile.read(download(page, "#download", tmp_path))[0])
    server.stop()
    page.locator("#talk").click()
    expect(page.locator("#problem")).to_contain_text("Cannot reach the server.")


def test_access_token(open_page, serve):
    url = serve(token="open sesame").url
    page = open_page(url, status="Not connected.", errors="401")
    expect(page.locator("#problem")).to_have_text("This server requires a token.")
    page.get_by_label("Server token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_have_text("The server rejected this token.")
    page.get_by_label("Server token").fill("open sesame")
    page.get_by_role("button", name="Use token").click()
    expect(page.locator("#status")).to_have_text("Ready.")
    linked = open_page(f"{url}#token=open%20sesame")
    assert linked.url == url and not linked.locator("#access").is_visible()
    start(linked)


# ---- accessibility ----


def test_contrast_and_accessible_names(open_page, url):
    page = open_page(url)
    start(page)
    expect(page.locator("#transcript .said").first).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(LOW_CONTRAST) == []
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    kinds = {"button", "slider", "radio", "combobox", "spinbutton", "meter", "log", "group", "region", "article"}
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    named = [(role, name) for role, name in found if role in kinds]
    assert [role for role, name in named if not name.strip()] == []
    assert {"button", "slider", "radio", "combobox", "meter", "log"} <= {role for role, _ in named}
    buttons = [name for role, name in named if role == "button"]
    assert len(buttons) == len(set(buttons))
    assert {"status", "alert"} <= {node["role"]["value"] for node in nodes}


def test_fits_a_phone_screen(open_page, url):
    page = open_page(url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#talk").tap()
    expect(page.locator("#transcript .said").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = page.locator("button:visible, .choices span, select").evaluate_all(
        "all => all.filter((e) => e.getBoundingClientRect().height < 40).map((e) => e.textContent)"
    )
    assert small == []
