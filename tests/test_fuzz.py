"Cases that the fuzzer found, and properties of the readers. `python benchmarks/fuzz.py` looks for more."
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from fuzz_cases import fuzz
from lora_nb.data import DataError, chat_data
from lora_nb.models import BadModel, gguf_header
from lora_nb.quantize import NF4, QuantizedTensor, quantize
from lora_nb.trainer import read_events

FOUND = dict(checkpoint=[2, 8, 17, 23, 26, 31, 53, 99, 137, 152, 192, 258], adapter=[121, 389], inspector=[0, 4, 13, 44, 80, 109, 185], folder=[0, 1, 2, 4, 5, 6, 7, 36, 45, 68, 84, 114, 134], four_bit=[0, 1, 6, 65, 110, 127, 130, 185, 193],
             gguf=[14, 31, 33, 41, 86, 132, 139, 172, 412, 558, 879], codes=[39, 2129], jsonl=[19, 216], events=[238, 397])  # numbers of benchmarks/fuzz.py
tame = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=8)


@pytest.fixture(scope='module')
def readers(tmp_path_factory):
    made = {}
    def get(name):
        if name not in made: made[name] = fuzz.READERS[name](tmp_path_factory.mktemp(name))
        return made[name]
    return get


@pytest.mark.parametrize('name', FOUND)
def test_what_was_found_is_refused_or_read(name, readers):
    for i in FOUND[name]:
        outcome, *_ = fuzz.one(readers(name), name, 0, i)
        assert outcome in ('accepted', 'refused'), f'python benchmarks/fuzz.py --reader {name} --only {i}: {outcome}'


@pytest.mark.parametrize('name', [n for n in fuzz.READERS if n not in ('gguf_model', 'template')])
def test_a_few_more(name, readers):
    wrong = {i: o for i in range(10_000, 10_025) if (o := fuzz.one(readers(name), name, 0, i)[0]) not in ('accepted', 'refused')}
    assert not wrong


GGUF = lambda tensors, keys, rest=b'': struct.pack('<4sIQQ', b'GGUF', 3, tensors, keys)+rest
KEY = fuzz.text_bytes('general.alignment')
ROW = lambda shape, kind=0, at=0: fuzz.text_bytes('t')+struct.pack('<I', len(shape))+struct.pack(f'<{len(shape)}Q', *shape)+struct.pack('<IQ', kind, at)


@pytest.mark.parametrize('raw', [GGUF(0, 1, KEY+struct.pack('<I', 8)+fuzz.text_bytes('x')), GGUF(0, 1, KEY+struct.pack('<II', 4, 0)), GGUF(0, 1, KEY+struct.pack('<IIQ', 9, 4, 0)), GGUF(0, 1, KEY+struct.pack('<If', 6, 3.)),
    GGUF(0, 1, KEY+struct.pack('<I', 9)+struct.pack('<IQ', 9, 1)*5000), GGUF(1, 0, ROW(())), GGUF(1, 0, ROW((4,), 99)), GGUF(1, 0, ROW((4,), 2**31)), GGUF(1, 0, ROW((2**63, 2))), GGUF(1, 0, ROW((4,), 0, 2**63)), GGUF(1, 0, ROW((5,), 3)), GGUF(2, 0, ROW((0,))*2)])
def test_odd_gguf_headers(tmp_path, raw):
    (tmp_path/'m.gguf').write_bytes(raw)
    with pytest.raises(BadModel, match='m.gguf'): gguf_header(tmp_path/'m.gguf')


@pytest.mark.parametrize('line,says', [('{"text": '+'9'*5000+'}', 'thousands of digits'), ('{"text": "a \\ud83d"}', 'surrogate'), ('{"prompt": "\\udc00", "completion": "w3"}', 'surrogate')])
def test_odd_rows(tmp_path, line, says):
    (tmp_path/'rows.jsonl').write_text(line)
    with pytest.raises(DataError, match=f'line 1: .*{says}'): chat_data(tmp_path/'rows.jsonl', fuzz.tiny_tokenizer(), val=0)


@pytest.mark.parametrize('name,change', [('config.json', dict(model_type=['llama'])), ('config.json', dict(model_type=None)), ('config.json', dict(use_cache=[True])), ('config.json', dict(hidden_size=7)), ('config.json', dict(quantization_config=3)),
    ('config.json', dict(vocab_size=2**70)), ('generation_config.json', dict(max_length='x')), ('tokenizer.json', dict(post_processor={'type': 3})), ('tokenizer.json', dict(model=3)), ('model.safetensors.index.json', dict(weight_map={'w': 3})), ('model.safetensors.index.json', dict(weight_map={'w': 'x'*1000})), ('model.safetensors.index.json', dict(weight_map=3))], ids=str)
def test_odd_model_folders(tmp_path, name, change):
    from fuzz_cases import folder_of
    from lora_nb.models import load_model
    f = folder_of(tmp_path/'m')/name
    f.write_text(json.dumps((json.loads(f.read_text()) if f.exists() else {})|change))
    try: load_model(f.parent, device='cpu')
    except (ValueError, FileNotFoundError) as e: assert fuzz.in_lora_nb(e), repr(e)
    else: assert name == 'generation_config.json'


@tame
@given(st.lists(anything, min_size=1, max_size=3))
def test_any_json_is_read_or_refused_by_line(tmp_path, rows):
    f = tmp_path/'rows.jsonl'
    f.write_text('\n'.join(map(json.dumps, rows)))
    try: chat_data(f, fuzz.tiny_tokenizer(), val=0)
    except DataError as e: assert 'rows.jsonl' in str(e) or 'No sample' in str(e)


@tame
@given(st.binary(max_size=200))
def test_any_bytes_as_rows(tmp_path, raw):
    for name in ('a.jsonl', 'a.csv', 'a.txt'):
        (tmp_path/name).write_bytes(raw)
        try: chat_data(tmp_path/name, fuzz.tiny_tokenizer(), val=0)
        except DataError: pass


@tame
@given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 3))
def test_any_bytes_after_a_gguf_head(tmp_path, raw, tensors, keys):
    f = tmp_path/'m.gguf'
    f.write_bytes(struct.pack('<4sIQQ', b'GGUF', 3, tensors, keys)+raw)
    try: meta, table = gguf_header(f)
    except BadModel: return
    assert len(table) == tensors and len(meta) <= keys


@tame
@given(st.dictionaries(st.sampled_from(['quant_type', 'blocksize', 'dtype', 'shape', 'nested_blocksize', 'nested_dtype', 'nested_offset']), anything))
def test_any_facts_about_four_bits(facts):
    sd = quantize(torch.ones(4, 64), NF4(double=True)).state_dict()
    key = next(k for k in sd if 'quant_state' in k)
    sd[key] = torch.tensor(list(json.dumps(json.loads(bytes(sd[key].tolist()))|facts).encode()), dtype=torch.uint8)
    try: q = QuantizedTensor.from_state_dict(sd)
    except ValueError: return
    assert q.dequantize().numel() == 256


@tame
@given(st.lists(anything, max_size=3), st.integers(0, 40))
def test_any_events(tmp_path, events, cut):
    f = tmp_path/'events.jsonl'
    text = '\n'.join(map(json.dumps, events))+'\n'
    f.write_text(text[:len(text)-cut])
    try: found = read_events(f)
    except ValueError as e: assert 'no event of a run' in str(e); return
    assert all({'kind', 'step', 'time'} <= e.keys() for e in found)
