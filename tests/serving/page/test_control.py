"""Messages of the page: steering messages, and the audio of a muted microphone."""

import json

import numpy as np
import pytest
from playwright.sync_api import expect


pytestmark = pytest.mark.slow


@pytest.fixture
def talking(open_page, url):
    """The function that opens the page with an emotion selected and starts; returns it with the messages sent."""

    def begin(emotion, script=None):
        page, sent = open_page(url, script), []
        page.on("websocket", lambda ws: ws.on("framesent", lambda message: sent.append(message)))
        page.get_by_label(emotion).check()
        page.locator("#talk").click()
        expect(page.locator("#steering")).to_contain_text("Now:")
        return page, sent

    return begin


def controls(sent):
    return [json.loads(message) for message in sent if isinstance(message, str)]


def test_intermediate_choices_are_not_sent(talking):
    page, sent = talking("happy")
    page.evaluate("for (const name of ['sad', 'angry', 'sad']) document.querySelector(`[value=${name}]`).click()")
    expect(page.locator("#steering")).to_contain_text("expressive, sad")
    page.wait_for_timeout(500)
    assert controls(sent) == [{"type": "steer", "voice": "expressive", "emotion": "sad"}]
    page.evaluate("document.querySelector('[value=angry]').click(), document.querySelector('#now').click()")
    expect(page.locator("#steering")).to_have_text("Now: expressive, angry, 1.00.")
    page.wait_for_timeout(300)
    assert [(message["emotion"], message.get("now")) for message in controls(sent)[1:]] == [("angry", True)]


def test_page_warns_that_a_previous_emotion_persists(talking):
    page, _ = talking("happy")
    expect(page.locator("#previous-emotion")).to_be_empty()
    for choice in ("none", "base (no adapter)"):
        page.locator(".choices").get_by_text(choice, exact=True).click()
        expect(page.locator("#previous-emotion")).to_contain_text("previous emotion still affects")
    page.locator("#talk").click()
    expect(page.locator("#previous-emotion")).to_be_empty()
    page.get_by_label("none").check()
    page.locator("#talk").click()
    expect(page.locator("#steering")).to_contain_text("Now:")
    expect(page.locator("#previous-emotion")).to_be_empty()


def test_muted_microphone_sends_room_tone(talking):
    page, sent = talking(
        "happy",
        """const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        navigator.mediaDevices.getUserMedia = async (wanted) => (window.stream = await open(wanted));""",
    )
    page.evaluate("stream.getTracks()[0].enabled = false")
    expect(page.locator("#status")).to_have_text("No sound from the microphone. Is it muted?")
    last = np.frombuffer([message for message in sent if isinstance(message, bytes)][-1][1:], "<i2")
    assert np.count_nonzero(last) > len(last) / 2
    assert np.abs(last).max() <= 3
