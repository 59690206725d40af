"""The memory widget as a reader has it: moved by the keyboard, read in both themes, without a network."""

import pytest

from tests.browser.test_widgets import caption, picture

pytestmark = pytest.mark.browser

START = 'model="GPT-2", method="full fine-tuning", precision="float32", length=512, batch_size=32, gpu="T4"'


@pytest.fixture(scope="module")
def notebook(lab):
    return lab.open(
        "memory.ipynb",
        ["from pefttutor import widgets", f"widgets.memory.figure({START})", f"widgets.memory({START})"],
    )


def chosen(page, label):
    """The drop-down list with this label."""
    return page.locator(".widget-dropdown").filter(has_text=label).locator("select").first


def shows(page, words):
    page.wait_for_function(
        "words => document.querySelector('[role=status]').textContent.includes(words)", arg=words
    )


def test_the_keyboard_changes_the_batch_and_the_picture_follows(notebook):
    page = notebook.page
    assert page.locator(".jupyter-widgets-error-widget").count() == 0
    assert page.locator(".jp-RenderedImage img").count() == 1  # the figure that comes first
    assert "too much for the T4" in caption(page).text_content()
    assert "To make it fit: gradient checkpointing" in caption(page).text_content()
    before = picture(page)
    assert before[1] == 1920

    batch = chosen(page, "batch size")
    batch.focus()
    # A list is opened with Alt and the arrow: without Alt, up and down belong to JupyterLab's cells.
    for key in ("Alt+ArrowDown", *5 * ["ArrowUp"], "Enter"):  # 32, 16, 8, 4, 2, 1
        page.keyboard.press(key)
        page.wait_for_timeout(300)
    assert batch.evaluate("select => select.selectedOptions[0].textContent") == "1"
    shows(page, "fits the T4")
    after = picture(page)
    assert after[2] != before[2]

    page.locator(".widget-checkbox input").first.focus()
    page.keyboard.press("Space")
    page.wait_for_function(
        "before => document.querySelector('[role=status]').textContent !== before",
        arg=caption(page).text_content(),
    )
    assert notebook.problems() == []


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_every_word_can_be_read_in_both_themes(notebook, theme):
    notebook.switch_to(theme)
    for selector in ("[role=status]", ".widget-label"):
        assert notebook.contrast(f".jp-OutputArea-output {selector}") >= 4.5, selector  # WCAG 2, level AA
    notebook.shot(f"memory-{theme.replace(' ', '-').lower()}")
    assert notebook.problems() == []


def test_what_cannot_be_is_said_in_the_widget(notebook):
    page = notebook.page
    chosen(page, "length").select_option("8192")
    alert = page.locator("[role=alert]")
    alert.wait_for()
    assert "positions for 1024 tokens at most" in alert.text_content()
    chosen(page, "length").select_option("128")
    alert.wait_for(state="detached")
