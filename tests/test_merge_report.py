"MergeReport shows the report's own numbers, and says what recommend says."
import pandas as pd, plotly.graph_objects as go, pytest
from lora_nb.merge import recommend
from lora_nb.widgets.merge_report import MergeReport, merge_html, merge_rows

@pytest.fixture
def report():
    rows = [('base', 'fp32', 1e-12, 2., 400), ('base', 'bf16', 1e-5, 2.001, 200), ('original', 'bf16', .2, 1.9, 200), ('base', '4bit', .5, 2.7, 60)]
    table = pd.DataFrame([dict(into=i, dtype=d, logits=.1, kl=kl, loss=l, delta=l-2, error=.01, changed=.1, bytes=b*2**20) for i,d,kl,l,b in rows], index=[f'{r[0]}, {r[1]}' for r in rows])
    table.attrs.update(unmerged=2., without=3., tokens=100, samples=10, adapters=['default'], compute='fp32')
    return table

def test_pictures_hold_the_reports_numbers(report):
    w = MergeReport(report)
    for name,column in (('kl', 'kl'), ('loss', 'loss')):
        bars = w.figure(name).data[0]
        assert isinstance(w.figure(name), go.Figure) and dict(zip(bars.y, bars.x))==report[column].to_dict()
    assert sorted(s.x0 for s in w.figure('loss').layout.shapes)==[2., 3.]
    assert w.data() is report

def test_one_way_is_marked_as_recommended(report):
    assert [r['way'] for r in merge_rows(report) if 'recommended' in r['way']]==['base, bf16 ◀ recommended']
    assert recommend(report).split('\n')[-1].split(':')[0] in merge_html(report)

def test_names_are_shown_as_text(report):
    evil = report.rename(index={'base, fp32': '<script>x</script>'})
    assert '<script>' not in merge_html(evil)

def test_refusals(report):
    with pytest.raises(TypeError, match='merge_report'): MergeReport(report.drop(columns='kl'))
    with pytest.raises(KeyError, match="'kl' or 'loss'"): MergeReport(report).figure('kld')
