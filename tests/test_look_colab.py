"What a notebook needs before its first widget: Colab's switch, an ipywidgets that is new enough, no package upgraded under a running kernel."
import sys
from types import ModuleType

import ipywidgets
import pytest
from lora_nb.widgets import look


@pytest.fixture
def colab(monkeypatch):
    "A stand-in of Colab's module; the list holds what was switched on."
    on, colab, output = [], ModuleType('google.colab'), ModuleType('google.colab.output')
    output.enable_custom_widget_manager = lambda: on.append('custom widgets')
    colab.output = output
    for name, m in {'google.colab': colab, 'google.colab.output': output}.items(): monkeypatch.setitem(sys.modules, name, m)
    return on


def test_colab_gets_its_widget_manager(colab):
    look.ready_notebook()
    assert colab == ['custom widgets']


def test_elsewhere_nothing_is_changed(): assert look.ready_notebook() is None and 'google.colab' not in sys.modules


@pytest.mark.parametrize('version', ['7.7.1', '6.0.0'])
def test_an_old_ipywidgets_is_refused(monkeypatch, version):
    monkeypatch.setattr(ipywidgets, '__version__', version)
    monkeypatch.setattr(look, 'version', lambda name: {'ipywidgets': version}.get(name) or sys.modules[name].__version__)
    with pytest.raises(ImportError, match=f'ipywidgets {version} is too old.*pip install "ipywidgets>=8.1", then restart'): look.ready_notebook()


def test_a_package_upgraded_under_the_kernel_asks_for_a_restart(monkeypatch):
    monkeypatch.setattr(look, 'version', lambda name: '99.0' if name == 'transformers' else sys.modules[name].__version__)
    import transformers
    with pytest.raises(RuntimeError, match=f'Restart the kernel.*transformers {transformers.__version__} is loaded and 99.0 is installed'): look.ready_notebook()


def test_versions_agree_here(): assert look.stale_imports() == {}
