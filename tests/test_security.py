"Each sentence of SECURITY.md, held: the test that bears its words fails where it is not true, and a sentence without a test fails too."
import json
import re
import socket
import struct
import time
from pathlib import Path

import pytest
import torch

from fuzz_cases import folder_of, text_bytes, tiny_model, tiny_tokenizer
from lora_nb.adapter import BadAdapterFile, add_lora, load_adapter
from lora_nb.data import DataError, encode_chat, render
from lora_nb.models import BadModel, TemplateRefused, load_model, render_chat, safetensors_files, save_model

SENTENCES = re.findall(r'^- (.*)$', (Path(__file__).resolve().parents[1]/'SECURITY.md').read_text(), re.M)
HELD, CHAT = {}, [dict(role='user', content='w3'), dict(role='assistant', content='w4')]


def holds(sentence):
    def keep(test):
        assert sentence not in HELD
        HELD[sentence] = test
        return test
    return keep


def test_every_sentence_has_its_test(): assert sorted(HELD) == sorted(SENTENCES)


@pytest.mark.parametrize('sentence', SENTENCES)
def test_sentence(sentence, tmp_path, monkeypatch): HELD[sentence](tmp_path, monkeypatch)


def adapter_in(folder, **changes):
    model = tiny_model()
    add_lora(model, r=2, alpha=4, targets='attention').save(folder)
    f = folder/'adapter_config.json'
    f.write_text(json.dumps(json.loads(f.read_text())|changes))
    return folder


class Evil:
    ran = []
    def __reduce__(self): return Evil.ran.append, (1,)


@holds('No pickle is read: weights come from safetensors and GGUF alone.')
def _(folder, monkeypatch):
    good = folder_of(folder/'m')
    (good/'model.safetensors').unlink()
    torch.save({'w': Evil()}, good/'pytorch_model.bin')
    with pytest.raises(ValueError, match='only as pickle'): load_model(good, device='cpu')
    torch.save({'w': Evil()}, good/'model.safetensors')     # a pickle under a good name
    with pytest.raises(BadModel, match='model.safetensors cannot be read'): load_model(good, device='cpu')
    a = adapter_in(folder/'a')
    torch.save({'w': Evil()}, a/'adapter_model.safetensors')
    with pytest.raises(BadAdapterFile, match='whole safetensors'): load_adapter(tiny_model(), a)
    (a/'adapter_model.safetensors').rename(a/'adapter_model.bin')
    with pytest.raises(FileNotFoundError, match='pickle'): load_adapter(tiny_model(), a)
    (folder/'m.gguf').write_bytes((a/'adapter_model.bin').read_bytes())
    with pytest.raises(BadModel, match='not a GGUF file'): load_model(folder/'m.gguf')
    assert not Evil.ran


@holds("A model's own Python code does not run unless trust_remote_code=True is passed.")
def _(folder, monkeypatch):
    good = folder_of(folder/'m')
    cfg = json.loads((good/'config.json').read_text())
    (good/'m.py').write_text(f"open({str(folder/'ran')!r}, 'w')")
    for part in ('config', 'tokenizer_config'):
        f = good/f'{part}.json'
        was = f.read_text()
        f.write_text(json.dumps(json.loads(was)|dict(auto_map=dict(AutoConfig='m.C', AutoModelForCausalLM='m.M', AutoTokenizer=['m.T', 'm.T']), tokenizer_class='T')|(dict(model_type='mystery') if part=='config' else {})))
        with pytest.raises(ValueError) as e: load_model(good, device='cpu')
        assert part=='tokenizer_config' or 'trust_remote_code=True' in str(e.value)
        f.write_text(was)
    assert not (folder/'ran').exists() and json.loads((good/'config.json').read_text()) == cfg


@holds('Nothing is downloaded unless a hub id is named.')
def _(folder, monkeypatch):
    def no(*args, **kw): raise AssertionError(f'a connection: {args}')
    monkeypatch.setattr(socket.socket, 'connect', no)
    monkeypatch.setattr(socket, 'getaddrinfo', no)
    load_model(folder_of(folder/'m'), device='cpu')
    load_adapter(tiny_model(), adapter_in(folder/'a'))
    for source in (folder/'nobody', './nobody', 'x.gguf'):
        with pytest.raises(FileNotFoundError): load_model(source)


@holds('An index that names a file outside of its folder is refused.')
def _(folder, monkeypatch):
    good = folder_of(folder/'m')
    (good/'model.safetensors').rename(folder/'outside.safetensors')
    for name in ('../outside.safetensors', str(folder/'outside.safetensors'), 'a/../../outside.safetensors', '..\\outside.safetensors', 'C:outside.safetensors'):
        (good/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'lm_head.weight': name})))
        with pytest.raises(BadModel, match='outside of its folder'): safetensors_files(good)


@holds('A damaged file gives an error of this package and leaves the model as it was.')
def _(folder, monkeypatch):
    a, model = adapter_in(folder/'a'), tiny_model()
    raw, before = (a/'adapter_model.safetensors').read_bytes(), {k: v.clone() for k, v in model.state_dict().items()}
    for spoiled in (raw[:-3], raw[:20], b'', struct.pack('<Q', 2**63)+raw[8:], raw[:8]+b'['*200+raw[208:]):
        (a/'adapter_model.safetensors').write_bytes(spoiled)
        with pytest.raises(BadAdapterFile): load_adapter(model, a)
    (a/'adapter_model.safetensors').write_bytes(raw)
    (a/'adapter_config.json').write_text('{"r": '+'9'*5000+'}')
    with pytest.raises(BadAdapterFile, match='not JSON'): load_adapter(model, a)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items()) and all(p.requires_grad for p in model.parameters())


@holds('A size that a header claims is compared with the file before memory is taken for it.')
def _(folder, monkeypatch):
    from lora_nb.models import gguf_header
    from lora_nb.memory import process_memory
    f, before = folder/'m.gguf', process_memory()['peak']
    head = lambda n, m: struct.pack('<4sIQQ', b'GGUF', 3, n, m)
    text = lambda n: struct.pack('<Q', n)
    row = lambda *shape: text_bytes('t')+struct.pack('<I', len(shape))+struct.pack(f'<{len(shape)}Q', *shape)+struct.pack('<IQ', 0, 0)
    for raw in (head(0, 2**63), head(2**63, 0), head(0, 1)+text(2**62), head(0, 1)+text(2**33), head(0, 1)+text_bytes('k')+struct.pack('<IIQ', 9, 4, 2**40), head(0, 1)+text_bytes('k')+struct.pack('<I', 9)+struct.pack('<IQ', 9, 1)*5000,
                head(1, 0)+row(2**40, 2**20), head(1, 0)+row(2**31), head(1, 0)+text_bytes('t')+struct.pack('<I', 2**32-1), head(0, 1)+text_bytes('general.alignment')+struct.pack('<II', 4, 0)):
        f.write_bytes(raw)
        with pytest.raises(BadModel): gguf_header(f)
    a = adapter_in(folder/'a')
    with open(a/'adapter_model.safetensors', 'wb') as f: # sparse: eight gigabytes of zeros that take no room
        h = json.dumps({'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight': dict(dtype='F32', shape=[2**31], data_offsets=[0, 2**33])}).encode()
        f.write(struct.pack('<Q', len(h))+h)
        f.truncate(8+len(h)+2**33)
    from lora_nb.adapter import AdapterMismatch
    with pytest.raises(AdapterMismatch, match='another shape'): load_adapter(tiny_model(), a)
    assert process_memory()['peak']-before < 500*2**20


@holds('A config that asks for more layers than the checkpoint has tensors is refused.')
def _(folder, monkeypatch):
    good = folder_of(folder/'m')
    f = good/'config.json'
    was = json.loads(f.read_text())
    for change, says in ((dict(num_hidden_layers=10**9, layer_types=None), 'layers'), (dict(head_dim=2**40), '.'), (dict(hidden_size=2**40), '.'), (dict(vocab_size=2**62), '.'), (dict(intermediate_size=2**20), 'in the model')):
        f.write_text(json.dumps(was|change))
        t = time.perf_counter()
        with pytest.raises(ValueError, match=says): load_model(good, device='cpu')
        assert time.perf_counter()-t < 5


@holds("A regular expression in an adapter's config is given half a second of the processor.")
def _(folder, monkeypatch):
    slow = r'((\w|\.)|(\w|\.))*(?<=!)'
    for field in (dict(target_modules=slow), dict(rank_pattern={slow: 3}), dict(exclude_modules=slow), dict(layers_to_transform=[0], layers_pattern=slow)):
        a, t = adapter_in(folder/next(iter(field)), **field), time.process_time()
        with pytest.raises(BadAdapterFile, match='not done after half a second'): load_adapter(tiny_model(), a)
        assert time.process_time()-t < 2


def templated(text):
    tok = tiny_tokenizer()
    tok.chat_template = text
    return tok


@holds("A chat template runs in jinja2's sandbox, reaches no attribute that begins with an underscore, and changes nothing that it is given.")
def _(folder, monkeypatch):
    for text in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__ }}", "{{ cycler.__init__.__globals__.os }}", "{{ lipsum.__globals__['os'] }}", "{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}", "{{ messages[0]['content'].__class__ }}", "{% include '/etc/passwd' %}", "{% import 'os' as o %}"):
        chat = json.loads(json.dumps(CHAT))
        try: said = render(templated(text), chat)
        except DataError: said = ''
        assert 'class' not in said and 'root' not in said and chat == CHAT, (text, said[:200])


@holds('A chat template that does not end is stopped.')
def _(folder, monkeypatch):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
    deep = "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    for text in (loop.replace('BODY', ''), loop.replace('BODY', 'x'*5000+'{{ j }}'), deep):
        t = time.perf_counter()
        with pytest.raises(DataError, match='did not end'): encode_chat(templated(text), CHAT)
        assert time.perf_counter()-t < 5
    with pytest.raises(TemplateRefused): render_chat(templated(loop.replace('BODY', '')), CHAT)
    assert encode_chat(tiny_tokenizer(), CHAT).n_labels     # and the next one renders


@holds('A chat template that computes a power is refused.')
def _(folder, monkeypatch):
    with pytest.raises(DataError, match='computes a power'): encode_chat(templated('{{ 9**9**9 }}'), CHAT)
    said = render(templated("**bold** {{ '**' }} {# 2**9 #} {{ messages[0]['content'] }}"), CHAT)  # two stars that are no operator
    assert said.startswith('**bold** **')


@holds('Text from files, models and data is escaped where a widget shows it.')
def _(folder, monkeypatch):
    from lora_nb.data import Preview, chat_data
    evil = '<script>alert(1)</script>'
    tok = templated("{% for m in messages %}{{ m['content'] }} </s> {% endfor %}")
    tok.decode = lambda ids, **kw: evil
    html = Preview(chat_data([dict(messages=CHAT)], tok, val=0))._repr_html_()
    assert '&lt;script&gt;' in html and '<script' not in html
    from lora_nb.trainer import PastRun
    from lora_nb.widgets.live_run import still_html
    (folder/'r').mkdir()
    (folder/'r/events.jsonl').write_text('\n'.join(map(json.dumps, [dict(kind='step', time=1, step=1, loss=1., lr=1e-3, epoch=1, tokens=3, grad_norm=1., tokens_per_s=1.), dict(kind='error', time=1, step=1, text=evil), dict(kind='warning', time=1, step=1, text=evil), dict(kind='state', time=1, step=1, state='failed')])))
    html = still_html(PastRun(folder/'r'))
    assert '<script>alert' not in html and 'alert(1)' in html


@holds('Reading writes nothing.')
def _(folder, monkeypatch):
    good, a = folder_of(folder/'m'), adapter_in(folder/'a')
    (folder/'rows.jsonl').write_text(json.dumps(dict(messages=CHAT)))
    monkeypatch.chdir(folder)
    state = lambda: {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob('*')}
    before = state()
    from lora_nb.data import chat_data
    load_model(good, device='cpu'); load_adapter(tiny_model(), a); chat_data(folder/'rows.jsonl', tiny_tokenizer(), val=0)
    assert state() == before


@holds('Writing is whole or not at all.')
def _(folder, monkeypatch):
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    model, tok = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr('lora_nb.models.save_torch_state_dict', full)
    with pytest.raises(OSError): save_model(model, folder/'m', tok)
    a = adapter_in(folder/'a')
    was = {p.name: p.read_bytes() for p in a.iterdir()}
    monkeypatch.setattr('lora_nb.adapter.save_file', full)
    with pytest.raises(OSError): add_lora(model, r=4).save(a)
    assert {p.name: p.read_bytes() for p in a.iterdir()} == was and [p.name for p in folder.iterdir()] == ['a']


@holds('The arguments that you pass, and the functions among them (`score`, probes, subscribers), run as your own code.')
def _(folder, monkeypatch):
    from live_tiny import tiny_trainer
    seen, run = [], tiny_trainer(folder/'r', epochs=1).start()
    run.subscribe(lambda e: seen.append(e['kind']))
    run.wait(False)
    assert 'state' in seen


@holds("A model's code runs with all your rights once trust_remote_code=True is passed.")
def _(folder, monkeypatch):
    good = folder_of(folder/'m')
    f = good/'config.json'
    f.write_text(json.dumps(json.loads(f.read_text())|dict(model_type='mystery', architectures=['M'], auto_map=dict(AutoConfig='own.C', AutoModelForCausalLM='own.M'))))
    (good/'own.py').write_text(f"from transformers import LlamaConfig, LlamaForCausalLM\nopen({str(folder/'ran')!r}, 'w')\nclass C(LlamaConfig): model_type='mystery'\nclass M(LlamaForCausalLM): config_class=C\n")
    load_model(good, device='cpu', trust_remote_code=True)
    assert (folder/'ran').exists()


@holds('What a model was trained to say is not checked.')
def _(folder, monkeypatch):
    from lora_nb.models import ask
    model, tok = load_model(folder_of(folder/'m'), device='cpu')
    x = tok(render_chat(tok, CHAT[:1], add_generation_prompt=True), return_tensors='pt', add_special_tokens=False).input_ids
    first = tok.decode(model(x).logits[0, -1].argmax()).strip()
    assert ask(model, tok, 'w3', 1) == ('' if first in tok.all_special_tokens else first)


@holds('The tokenizer\'s files are parsed by the tokenizers library, and its regular expressions are not limited in time.')
def _(folder, monkeypatch):
    from tokenizers import Regex, pre_tokenizers
    tok = tiny_tokenizer()
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('(a|a)*b'), 'isolated')   # taken as it is
    tok.save_pretrained(folder/'t')
    from lora_nb.models import load_tokenizer
    assert '(a|a)*b' in load_tokenizer(folder/'t').backend_tokenizer.to_str()


@holds('One single operation of a chat template, such as a text repeated a billion times, is not stopped while it lasts.')
def _(folder, monkeypatch):
    assert len(render_chat(templated("{{ 'x'*3000000 }}"), CHAT)) == 3_000_000
