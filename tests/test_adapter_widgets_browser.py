"AdapterInspector and RankSpectrum as a person meets them: zoom, click and measure in a real JupyterLab."
from pathlib import Path
import pytest
from browser import CHROMIUM, running, until

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no Chromium: python tests/install_browser.py')
CELLS = [f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]\nfrom live_tiny import tiny_trainer\nfrom lora_nb.widgets.adapter_inspector import AdapterInspector\nfrom lora_nb.widgets.rank_spectrum import RankSpectrum, watch_spectra",
         "run = tiny_trainer('runs/x', epochs=6, hidden=128, save_every=10, keep=9).start()\nwatch_spectra(run, every=.1)\nrun.wait(progress=False)\ninspector = AdapterInspector(run)\ninspector.controls['right'].value = 'step 10'\ninspector",
         "RankSpectrum(run.adapter, run)",
         "AdapterInspector(run)"]


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with running(tmp_path_factory.mktemp('work'), tmp_path_factory.mktemp('home'), 'adapter', *CELLS) as page:
        until(lambda: page.page.locator('.lnb').count()==3 and page.page.locator('.js-plotly-plot .main-svg').count()>=11, 240, 'eleven plots')
        page.page.set_viewport_size(dict(width=1500, height=2600))
        page.page.wait_for_timeout(1500)
        yield page


def test_one_side_alone_is_drawn_without_an_error(lab):
    alone = lab.page.locator('.lnb').nth(2)
    assert alone.locator('.lnb-panel').nth(0).is_visible() and not alone.locator('.lnb-panel').nth(1).is_visible() and not lab.errors


def plot(lab, box, i): return lab.page.locator('.lnb').nth(box).locator('.js-plotly-plot').nth(i)
def shape(p): return p.evaluate('el => [el.data[0].z.length, el.data[0].z[0].length]')
def at(p, x, y): return [p.bounding_box()[a]+p.bounding_box()[b]*part for a, b, part in (('x', 'width', x), ('y', 'height', y))]


def test_a_mouse_zooms_both_sides_and_a_double_click_shows_all(lab):
    left, right = plot(lab, 0, 3), plot(lab, 0, 7)
    whole = until(lambda: shape(left)==shape(right) and shape(left))
    mouse = lab.page.mouse
    mouse.move(*at(left, .3, .2)); mouse.down(); mouse.move(*at(left, .5, .4), steps=8); mouse.up()
    until(lambda: shape(left)[0] < whole[0] and shape(left)[1] < whole[1] and shape(left)==shape(right), what='both show the window')
    spans = lambda p: p.evaluate('el => [el.layout.xaxis.range, el.layout.yaxis.range]')
    until(lambda: spans(left)==spans(right), what='the same window')
    mouse.dblclick(*at(left, .4, .3))
    until(lambda: shape(left)==shape(right)==whole, what='all of it again')
    assert not lab.errors


def test_a_click_into_the_overview_chooses_that_layer(lab):
    box = lab.page.locator('.lnb').nth(0)
    chosen = lambda: box.locator('select').evaluate_all('s => s.map(x => x.selectedOptions[0].text)')[2:4]
    was = chosen()
    lab.page.mouse.click(*at(plot(lab, 0, 0), .7, .29))
    until(lambda: chosen()==['1', 'self_attn.v_proj'], what=f'the clicked layer, not {was}')
    assert 'no such layer' not in box.inner_text() and not lab.errors


def test_the_button_measures_and_the_choice_of_all_layers_has_its_name(lab):
    box = lab.page.locator('.lnb').nth(1)
    assert box.locator('select').first.evaluate('s => s.selectedOptions[0].text').replace('\xa0', ' ')=='all layers'
    box.get_by_role('button', name='Measure the loss').click()
    losses = until(lambda: (l := plot(lab, 1, 2).evaluate('el => Array.from(el.data[1].y ?? [])')) and len(l)==3 and l, what='three losses')
    until(lambda: all(f'{v:.4f}' in box.inner_text() for v in losses), what='the table has them too')
    box.locator('select').first.select_option(index=3)
    until(lambda: plot(lab, 1, 0).evaluate('el => Array.from(el.data[3].y ?? []).length')==4, what='bars of one layer')
    assert not lab.errors


def test_looks(lab):
    for theme in ('Light', 'Dark'):
        lab.theme(theme)
        for width in (700, 1500):
            lab.page.set_viewport_size(dict(width=width, height=3000))
            lab.page.wait_for_timeout(1500)
            for i, name in enumerate(('adapter-inspector', 'rank-spectrum')):
                box = lab.page.locator('.lnb').nth(i)
                box.screenshot(path=lab.artifact(f'{name}-{width}-{theme.lower()}'))
                right = box.bounding_box()['x']+box.bounding_box()['width']+1
                assert all(p['x']+p['width'] <= right for p in (q.bounding_box() for q in box.locator('.js-plotly-plot').all()) if p), (name, width)
    assert not lab.errors
