"""The widgets as a reader has them: a hand on the keyboard, a light and a dark theme, no network."""

import pytest

pytestmark = pytest.mark.browser

MODEL = """
import torch
from torch import nn
from pefttutor import LoRA, widgets

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 96)

torch.manual_seed(0)
model = nn.Module()
model.layers = nn.ModuleList(Block() for _ in range(4))
LoRA(r=8).attach(model)
for layer in (part for block in model.layers for part in (block.q_proj, block.v_proj)):
    layer.lora_B.data = torch.randn(layer.lora_B.shape) @ torch.diag(torch.linspace(1, 0, 8) ** 2)
"""
RANKS = """
def share(model):
    now = sum((b.q_proj.lora_B @ b.q_proj.lora_A).square().sum() for b in model.layers)
    return float(now / whole)

whole = 1.0
whole = share(model)
widgets.ranks(model, score=share, score_name="share", rank=2)
"""
MASKS = """
import torch
from pefttutor import widgets

drawn = torch.Generator().manual_seed(0)
shapes = {f"layers.{i}.{part}.weight": (40, 60) for i in range(4) for part in ("q_proj", "up_proj")}
scores = {name: torch.rand(shape, generator=drawn) for name, shape in shapes.items()}
mine = {name: torch.rand(shape, generator=drawn) < 0.05 for name, shape in shapes.items()}
"""
MOVING = """
from pefttutor import widgets

names = [f"layers.{i}.{part}" for i in range(4) for part in ("q_proj", "v_proj")]
ranks = [(8, 8), (7, 8), (5, 7), (6, 4), (2, 4)]
steps = [{name: of[i % 2] for i, name in enumerate(names)} for of in ranks]
"""
FAILING = """
def draw(rank):
    if rank == 2:
        raise ValueError("not this rank")
    return widgets.Picture(3, 1, alt=f"rank {rank} drawn")

widgets.Explorer(draw, "Fails at two.", rank=range(1, 4))
"""


@pytest.fixture(scope="module")
def notebook(lab):
    return lab.open("ranks.ipynb", [MODEL, "widgets.ranks.figure(model)", RANKS])


def caption(page):
    return page.locator(".jp-OutputArea-output [role=status]")


def shows(page, words):
    """Wait until the text under the picture says so."""
    page.wait_for_function(
        "words => document.querySelector('[role=status]').textContent.includes(words)", arg=words
    )


def picture(page):
    """Width on the page, width of the image, and its bytes."""
    return page.locator("figure img").evaluate(
        "async image => { await image.decode(); const bytes = await (await fetch(image.src)).arrayBuffer();"
        " return [image.width, image.naturalWidth, [...new Uint8Array(bytes)].join()] }"
    )


def test_arrow_keys_move_the_slider_and_the_picture_follows(notebook):
    page = notebook.page
    assert page.locator(".jupyter-widgets-error-widget").count() == 0
    static = page.locator(".jp-RenderedImage img")
    assert static.count() == 1  # the figure that comes first
    shown, pixels = static.evaluate("image => [image.width, image.naturalWidth]")
    assert pixels == 1920  # twice the intended width, to be sharp
    assert 600 < shown <= 960  # a narrow window makes it smaller
    assert "rank 2 of 8" in caption(page).text_content()
    before = picture(page)
    assert before[1] == 1920
    assert 600 < before[0] <= 960

    page.locator(".noUi-handle").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    shows(page, "rank 5 of 8")
    assert page.locator(".widget-readout").text_content() == "5"
    assert "All layers at rank 5: share" in caption(page).text_content()
    after = picture(page)
    assert after[2] != before[2]

    page.locator(".widget-dropdown select").select_option("layers.3.v_proj")
    shows(page, "layers.3.v_proj: rank 5")
    assert picture(page)[2] != after[2]
    assert notebook.problems() == []


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_every_word_can_be_read_in_both_themes(notebook, theme):
    notebook.switch_to(theme)
    for selector in ("[role=status]", ".widget-label", ".widget-readout"):
        assert notebook.contrast(f".jp-OutputArea-output {selector}") >= 4.5, selector  # WCAG 2, level AA
    notebook.shot(theme.replace(" ", "-").lower())
    assert notebook.problems() == []


def test_an_error_is_shown_where_the_reader_looks(lab):
    opened = lab.open("failing.ipynb", ["from pefttutor import widgets", FAILING])
    page = opened.page
    assert page.locator("[role=alert]").count() == 0
    page.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    alert = page.locator("[role=alert]")
    alert.wait_for()
    assert "ValueError: not this rank" in alert.text_content()
    assert opened.contrast("[role=alert]") >= 4.5
    opened.shot("error")
    page.keyboard.press("ArrowRight")
    alert.wait_for(state="detached")
    assert caption(page).text_content() == "rank 3 drawn"
    assert opened.problems() == []


def test_masks_follow_the_choice_of_method_tensor_and_fraction(lab):
    opened = lab.open(
        "masks.ipynb", [MASKS, "widgets.masks.figure({'drawn': scores, 'mine': mine})",
                        "widgets.masks({'drawn': scores, 'mine': mine})"],
    )  # fmt: skip
    page = opened.page
    assert page.locator(".jp-RenderedImage img").count() == 1  # the figure that comes first
    assert "drawn chooses 0.10% of all entries" in caption(page).text_content()
    before = picture(page)
    method, _, tensor, fraction = page.locator(".widget-dropdown select").all()
    fraction.focus()
    # A list is opened with Alt and the arrow: without Alt, up and down belong to JupyterLab's cells.
    for key in ("Alt+ArrowDown", *4 * ["ArrowDown"], "Enter"):  # 0.001, 0.005, 0.02, 0.1, 0.3
        page.keyboard.press(key)
        page.wait_for_timeout(300)
    shows(page, "drawn chooses 30.00% of all entries")
    more = picture(page)
    assert more[2] != before[2]
    tensor.select_option("layers.3.up_proj.weight")
    shows(page, "of layers.3.up_proj.weight (40, 60)")
    method.select_option("mine")
    shows(page, "mine chooses")
    assert picture(page)[2] != more[2]
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        opened.switch_to(theme)
        for selector in ("[role=status]", ".widget-label"):
            assert opened.contrast(f".jp-OutputArea-output {selector}") >= 4.5, (theme, selector)
        opened.shot(f"masks-{theme.split()[1].lower()}")
    assert opened.problems() == []


def test_ranks_are_followed_through_a_training(lab):
    opened = lab.open(
        "moving.ipynb", [MOVING, "widgets.moving_ranks.figure(steps)", "widgets.moving_ranks(steps, step=2)"]
    )
    page = opened.page
    assert page.locator(".jp-RenderedImage img").count() == 1  # the figure that comes first
    shows(page, "After step 2 all layers have 48 ranks together, layers.0.q_proj has 5.")
    before = picture(page)
    page.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    shows(page, "In this step 4 layers lost rank and 4 got some.")
    assert picture(page)[2] != before[2]
    page.locator(".widget-dropdown select").select_option("layers.3.v_proj")
    shows(page, "layers.3.v_proj has 4")
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        opened.switch_to(theme)
        for selector in ("[role=status]", ".widget-label", ".widget-readout"):
            assert opened.contrast(f".jp-OutputArea-output {selector}") >= 4.5, (theme, selector)
    assert opened.problems() == []
