"QuantExplorer, MergeReport and FitPlanner as a person meets them: every control used in a real JupyterLab, the numbers on screen those of the functions."
import ast
from pathlib import Path
import pytest
from browser import CHROMIUM, running, until

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no Chromium: python tests/install_browser.py')
CELLS = [f"""import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]
import torch
from merge_tiny import model, samples, tiny_report
from lora_nb.quantize import NF4, FP4, INT4, quantize
from lora_nb.sensitivity import mean_loss
from lora_nb.fit import plan
from lora_nb.widgets.fit_planner import FitPlanner, plan_words
from lora_nb.widgets.merge_report import MergeReport
from lora_nb.widgets.quant_explorer import QuantExplorer, facts
torch.set_num_threads(1)""",
         "explorer = QuantExplorer(model, samples, layer='model.layers.0.mlp.up_proj', a=NF4(double=True), b=FP4(blocksize=128))\nexplorer",
         "report = tiny_report()\nMergeReport(report)",
         "planner = FitPlanner('llama3-8b', 'T4')\nplanner",
         "0"]


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with running(tmp_path_factory.mktemp('work'), tmp_path_factory.mktemp('home'), 'explore', *CELLS) as page:
        until(lambda: page.page.locator('.lnb').count()==3 and page.page.locator('.js-plotly-plot .main-svg').count()>=9, what='nine plots')
        page.wait_idle()
        page.page.set_viewport_size(dict(width=1500, height=3400))
        page.page.wait_for_timeout(1500)
        yield page


def box(lab, i): return lab.page.locator('.lnb').nth(i)
def trace(lab, i, figure, t, key='y'): return box(lab, i).locator('.js-plotly-plot').nth(figure).evaluate('(el, [t, k]) => Array.from(el.data[t][k] ?? [])', [t, key])
def python(lab, code): return ast.literal_eval(lab.run_cell(4, code)[0][0])


def told(lab, side, layer, choice, loss=''):
    "Bits, error and loss of a choice as the page says them, beside what the functions give."
    weight = f'model.get_submodule({layer!r}).weight'
    f, loss = python(lab, f"[facts({weight}, quantize({weight}, {choice})), {loss or None}]")
    words = [f"{f['bits']:.3f}", f"{f['error']:.2%}"] + ([] if loss is None else [f'{loss:.4f}'])
    until(lambda: all(w in box(lab, 0).locator('[role=status]').nth(side).inner_text() for w in words), what=f'{words} for {choice}')


def test_each_control_of_the_explorer(lab):
    up, down = 'model.layers.0.mlp.up_proj', 'model.layers.1.mlp.down_proj'
    told(lab, 0, up, 'NF4(double=True)')
    told(lab, 1, up, 'FP4(128)')
    lists = box(lab, 0).locator('select')
    lists.nth(1).select_option('INT4')                          # layer, then type and block size of A and of B
    told(lab, 0, up, 'INT4(double=True)')
    lists.nth(2).select_option('256')
    told(lab, 0, up, 'INT4(256, double=True)')
    box(lab, 0).locator('input[type=checkbox]').nth(0).uncheck()
    told(lab, 0, up, 'INT4(256)')
    lists.nth(3).select_option('NF4')
    lists.nth(4).select_option('32')
    box(lab, 0).locator('input[type=checkbox]').nth(1).check()
    told(lab, 1, up, 'NF4(32, double=True)')
    lists.nth(0).select_option(down)
    told(lab, 0, down, 'INT4(256)')
    told(lab, 1, down, 'NF4(32, double=True)')
    for side, figure in (('A', 0), ('B', 3)):
        for name, f in (('histogram', figure), ('levels', figure+1), ('zoom', figure+2)):
            want = python(lab, f"[[float(v) for v in t.y] for t in explorer.figure({name!r}, {side!r}).data]")
            until(lambda: [trace(lab, 0, f, i) for i in range(len(want))]==[pytest.approx(w) for w in want], what=f'{name} of {side}')
    zoomed = trace(lab, 0, 2, 3)
    slider = box(lab, 0).locator('[role=slider]').first
    slider.focus()
    lab.page.keyboard.press('ArrowRight')
    until(lambda: trace(lab, 0, 2, 3)!=zoomed, what='the next weights')
    assert python(lab, 'explorer.start.value')==1
    for side, choice in ((0, 'INT4(256)'), (1, 'NF4(32, double=True)')):
        box(lab, 0).get_by_role('button', name='Whole model').nth(side).click()
        told(lab, side, down, choice, loss=f'mean_loss(model, samples, {choice}, 256)')
    assert not lab.errors


def test_the_merge_report_shows_the_reports_numbers(lab):
    ways, kl, loss = python(lab, "[list(report.index), report.kl.tolist(), report.loss.tolist()]")
    for figure, column in ((0, kl), (1, loss)):
        assert dict(zip(trace(lab, 1, figure, 0, 'y'), trace(lab, 1, figure, 0, 'x')))==pytest.approx(dict(zip(ways, column)))
    best = lab.run_cell(4, "from lora_nb.merge import chosen\nprint(chosen(report))")[0][0].strip()
    assert f'{best} ◀ recommended' in box(lab, 1).inner_text()
    summary = box(lab, 1).get_by_text('What each way loses')
    summary.focus()
    lab.page.keyboard.press('Enter')
    until(lambda: box(lab, 1).locator('details').evaluate('d => d.open'), what='the words')
    assert not lab.errors


def test_each_control_of_the_planner(lab):
    asked = {'config': 'llama3-8b', 'gpu': 'T4', 'r': 16, 'seq': 1024, 'batch': 4}
    def shows(**more):
        asked.update(more)
        words, kinds = python(lab, f"[plan_words(p), list(p.kinds.values())] if (p := plan(**{asked!r})) else 0")
        until(lambda: words in box(lab, 2).inner_text(), what=words)
        bars = [trace(lab, 2, 0, k, 'x')[-1] for k in range(5)]
        unit = kinds[0]/bars[0]
        assert bars == pytest.approx([k/unit for k in kinds]) and unit in (2**20, 2**30, 2**40)
    shows()
    lists = box(lab, 2).locator('select')
    for i, name, value in ((0, 'config', 'qwen2.5-7b'), (1, 'gpu', 'L4'), (4, 'optimizer', 'adamw8bit')):
        lists.nth(i).select_option(value)
        shows(**{name: value})
    lists.nth(2).select_option('none')
    shows(quant=None)
    lists.nth(3).select_option('attention')
    shows(targets='attention')
    for i, name, value in ((0, 'r', 32), (1, 'seq', 2048), (2, 'batch', 8)):
        box(lab, 2).locator('[role=slider]').nth(i).focus()
        lab.page.keyboard.press('ArrowRight')
        shows(**{name: value})
    for i, more in ((0, dict(checkpointing=True)), (1, dict(dropout=1.))):
        box(lab, 2).locator('input[type=checkbox]').nth(i).check()
        shows(**more)
    assert python(lab, 'planner.plan().total') == python(lab, f'plan(**{asked!r}).total')
    assert not lab.errors


def test_looks(lab):
    for theme in ('Light', 'Dark'):
        lab.theme(theme)
        for width in (600, 1000, 1600):
            lab.page.set_viewport_size(dict(width=width, height=4200))
            lab.page.wait_for_timeout(1500)
            for i, name in enumerate(('quant-explorer', 'merge-report', 'fit-planner')):
                box(lab, i).screenshot(path=lab.artifact(f'{name}-{width}-{theme.lower()}'))
                right = box(lab, i).bounding_box()['x']+box(lab, i).bounding_box()['width']+1
                until(lambda: all(p['x']+p['width'] <= right for p in (q.bounding_box() for q in box(lab, i).locator('.js-plotly-plot').all()) if p), what=f'{name} fits {width} pixels')
    assert not lab.errors
