"A notebook that ran without a page, as nbconvert's HTML: where no widget can live, each leaves its last state as plain HTML with the functions' numbers."
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
CELLS = dict(
    setup=f"""import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]
import json
from live_tiny import tiny_run
from merge_tiny import model, samples, tiny_report
from lora_nb.quantize import NF4, FP4
from lora_nb.widgets.adapter_inspector import AdapterInspector
from lora_nb.widgets.fit_planner import FitPlanner
from lora_nb.widgets.live_run import LiveRun
from lora_nb.widgets.merge_report import MergeReport
from lora_nb.widgets.quant_explorer import QuantExplorer
from lora_nb.widgets.rank_spectrum import RankSpectrum
from lora_nb.widgets.recall import Recall
run = tiny_run('run').wait(progress=False)""",
    explorer="explorer = QuantExplorer(model, samples, a=NF4(double=True), b=FP4(blocksize=128))\nexplorer.measure('A')\nexplorer",
    inspector="inspector = AdapterInspector(run.adapter)\ninspector",
    spectrum="spectrum = RankSpectrum(run.adapter)\nspectrum",
    report="report = tiny_report()\nMergeReport(report)",
    planner="planner = FitPlanner('llama3-8b', 'T4', seq=2048)\nplanner",
    past="LiveRun('run')",
    recall="recall = Recall('recall.json', seed=0).start()\nwhile not recall.finished: recall.answer(recall.item.wrong[0][0] if recall.item.wrong else recall.item.answer); recall.next_question()\nrecall",
    told="""f, n = explorer.data('facts'), inspector.norms('left').loc[inspector.layer]
print(json.dumps(dict(
    explorer=[f"{f['A']['bits']:.3f}", f"{f['A']['error']:.2%}", f"{f['B']['error']:.2%}", f"{f['A']['loss']:.4f}", 'not measured'],
    inspector=[inspector.layer, f"{n.BA:.4g}" if 'BA' in n else f"{n.iloc[-1]:.4g}"],
    spectrum=[f"effective rank {spectrum.data('ranks').value[spectrum.step()]:.2f} of 4"],
    report=[*report.index, f"{report.loss.iloc[0]:.4f}", 'recommended'],
    recall=[f'{recall.score:g} of 10 points', *recall.data('test').level, f'{recall.data().reviews.sum()} of {len(recall.items)} items seen'],
    planner=['too much', f'up to {planner.plan().longest:,} tokens', *[name for name, _ in planner.plan().changes()]],
    past=['finished', f'step {run.step} of {run.total_steps}', f"loss"])))""")


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The cells' outputs in HTML without widgets, and what the functions told."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS.values()])
    NotebookClient(nb, timeout=300, startup_timeout=300, store_widget_state=False, resources=dict(metadata=dict(path=str(tmp_path_factory.mktemp('static'))))).execute()
    def shown(cell):
        assert any('application/vnd.jupyter.widget-view+json' in o.get('data', {}) for o in cell.outputs)
        return HTMLExporter(template_name='basic').from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]
    names = list(CELLS)
    return {n: shown(c) for n, c in zip(names, nb.cells) if n not in ('setup', 'told')}, json.loads(nb.cells[-1].outputs[0].text)


@pytest.mark.parametrize('widget', [n for n in CELLS if n not in ('setup', 'told')])
def test_a_saved_notebook_shows_the_last_state(page, widget):
    html, told = page[0][widget], page[1][widget]
    assert all(words in html for words in told), [words for words in told if words not in html]
    assert '<script' not in html and ('<table' in html or '<svg' in html)
